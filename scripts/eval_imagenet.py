"""Evaluate models with timm's own preprocessing: ImageNet-1k, its relatives, or a folder of a model's own classes.

    python scripts/eval_imagenet.py --data-dir imagenet --model resnet50.a1_in1k convnext_tiny.fb_in1k
    python scripts/eval_imagenet.py --data-dir images --model local-dir:output/coatnet_pico --output output/eval
    python scripts/eval_imagenet.py --data-dir imagenet --model coatnet_0 --checkpoint first.pth second.safetensors
    python scripts/eval_imagenet.py --data-dir imagenet --model resnet50.a1_in1k --real-labels timm
    torchrun --nproc-per-node 8 scripts/eval_imagenet.py --data-dir imagenet-c --model resnet50.a1_in1k

The folder has val/ (or validation/, test/), or itself holds the class folders: synsets for ImageNet-1k, -A, -R and
-Sketch, numbers for -V2, a model's own class names after fine-tuning, CORRUPTION/SEVERITY/ with synsets for -C. Several
models or checkpoints share one table. Metrics are those of timm's validate.py: top-1, top-5 (%), loss (nats); and ECE
(%) over 15 bins.
"""
from coatnet_train.evaluation.config import EvaluationSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: EvaluationSettings) -> list[dict]:
    """Evaluate all requested models and return the rows of the table."""
    check_values(settings)
    from coatnet_train.evaluation.imagenet import evaluate  # here: torch and timm take seconds to import
    return evaluate(settings)


if __name__ == '__main__':
    run_cli('eval_imagenet.py', lambda: main(parse_flags(EvaluationSettings, __doc__)))
