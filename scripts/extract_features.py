"""Write the features of images to safetensors or Parquet shards, and say how well they tell the classes apart.

    python scripts/extract_features.py --data-dir flowers --model coatnet_0 --checkpoint coatnet_0.safetensors
    python scripts/extract_features.py --data-dir flowers --model local-dir:output/coatnet_pico --pretrained \\
        --knn --linear-probe
    python scripts/extract_features.py --data-dir snapshots --split '' --model resnet50 --pretrained --format parquet
    accelerate launch scripts/extract_features.py --data-dir flowers --model coatnet_0 --features pyramid \\
        --out-indices 3 4 --dtype float16

Pooled features are what the classifier takes, (C,) for an image: the last map, pooled and normalised as the model does
it, without the hidden layer `pre_logits` that some heads put between the two (CoAtNet's and MaxViT's ends in tanh, and
is untrained in a model without classes). Attention pooling and the hidden layers of MobileNetV3, GhostNet,
CAFormer and their like stay, as in timm's own embeddings. Pyramid features are the maps of timm's features_only=True,
(C, H, W) each.

OUTPUT/SPLIT/ holds the shards and index.json. A shard has a row for each image that can be read: index (its place in
the data), label (-1 where there are no classes), path, and embedding or level_0, level_1, ...; in safetensors the
paths are a JSON list in the metadata. Images that cannot be read have no row, and index.json lists them. A run that
was stopped, begun again with the same settings, writes the shards that are missing. Several processes share the shards
out, so that the files are those of one process.
"""
from coatnet_train.evaluation.extraction_config import ExtractionSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: ExtractionSettings) -> dict:
    """Extract as `settings` say; the main process returns the summary that is also written to summary.json."""
    check_values(settings)
    from coatnet_train.evaluation.extraction import extract_features  # here: torch and timm take seconds to import
    return extract_features(settings)


if __name__ == '__main__':
    run_cli('extract_features.py', lambda: main(parse_flags(ExtractionSettings, __doc__)))
