"""Write the features of images to safetensors or Parquet shards, and evaluate them by k-NN or a linear probe.

    python scripts/extract_features.py --data-dir flowers --model coatnet_0 --checkpoint coatnet_0.safetensors
    python scripts/extract_features.py --data-dir flowers --model local-dir:output/coatnet_pico --pretrained \\
        --knn --linear-probe
    python scripts/extract_features.py --data-dir snapshots --split '' --model resnet50 --pretrained --format parquet
    accelerate launch scripts/extract_features.py --data-dir flowers --model coatnet_0 --features pyramid \\
        --out-indices 3 4 --dtype float16

Pooled features (C,) are the input of the classifier: the last feature map, pooled and normalised as in the model. The
hidden layer `pre_logits` between norm and classifier is left out, as in a model without classes it is untrained
(CoAtNet's and MaxViT's heads have one, ending in tanh). Attention pooling and the hidden layers of MobileNetV3,
GhostNet, CAFormer and similar models stay, as in timm's own embeddings. Pyramid features are the maps (C, H, W) of
timm's features_only=True.

OUTPUT/SPLIT/ holds the shards and index.json. A shard has a row for each readable image: index (in dataset order),
label (-1 without classes), path, and embedding or level_0, level_1, ...; in safetensors the paths are a JSON list in
the metadata. index.json lists the unreadable images, which have no row. Rerunning an interrupted call with the same
settings writes the missing shards. Several processes divide the shards among them and write the files that a single
process would.
"""
from coatnet_train.evaluation.extraction_config import ExtractionSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: ExtractionSettings) -> dict:
    """Extract features and measure them; the main process returns the summary that is also written to summary.json."""
    check_values(settings)
    from coatnet_train.evaluation.extraction import extract_features  # here: torch and timm take seconds to import
    return extract_features(settings)


if __name__ == '__main__':
    run_cli('extract_features.py', lambda: main(parse_flags(ExtractionSettings, __doc__)))
