"""Export a run of scripts/finetune.py as a release folder: weights, config, model card and golden logits.

    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --trained-on Tiny-ImageNet-200
    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --dtype float16 --data-dir tiny-imagenet
    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --with-onnx

OUTPUT gets README.md, config.json, model.safetensors, golden.safetensors (images and their logits) and curves.png, with
--with-onnx also model.onnx and model.pt2. An earlier export there is replaced as a whole. The figures of the card come
from RUN_DIR/evaluation.json, if eval_imagenet.py --results-file wrote one, else from the split that picked the best
epoch, which the card then states. The run's model must be the registered one up to classes, channels and image size; a
run with other changes (another act, other depths) is rejected. Next step: python hub/verify.py OUTPUT.
"""
from pathlib import Path

import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli
from export_settings import ExportSettings, check_values


def main(settings: ExportSettings) -> Path:
    """Export a run and return the folder."""
    check_values(settings)
    from export_run import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('export.py', lambda: main(parse_flags(ExportSettings, __doc__)))
