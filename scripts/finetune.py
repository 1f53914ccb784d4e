"""Fine-tune any timm or zoo model on a folder of images, or a data set of torchvision or the Hugging Face Hub.

    python scripts/finetune.py --recipe small_data --data-dir flowers \\
        --model lightconvnet_pico_64.dist_tin200 --pretrained
    python scripts/finetune.py --data-dir data --dataset torch/cifar10 --dataset-download --model resnet18 --pretrained
    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20 --resume auto
    torchrun --nproc-per-node 8 scripts/finetune.py --recipe coatnet_in1k --data-dir imagenet --model coatnet_0

The folder has train/ and val/ (or validation/, test/), with one sub-folder per class in each. The run
directory OUTPUT/EXPERIMENT gets the best weights with their config, metrics.csv, curves.png and summary.json, and for
these weights confusion.png, misclassified.png and predictions.csv (file, label, prediction and confidence of each
held-out image). After `import coatnet_zoo`, `timm.create_model('local-dir:OUTPUT/EXPERIMENT', pretrained=True)` loads
them. Exit codes: 2 for a setting that cannot work, 75 after SIGTERM with everything saved (--resume auto continues), 1
for a loss that is not finite.
"""
import sys

from coatnet_train.runtime.cli import PREEMPTED, Preempted, one_line, run_cli
from coatnet_train.training.config import FinetuneSettings, check_values, read_settings


def main(settings: FinetuneSettings) -> dict:
    """Fine-tune a model, and return the summary that is also written to summary.json."""
    check_values(settings)
    from coatnet_train.training.run import finetune  # here: torch and timm take seconds to import
    return finetune(settings)


if __name__ == '__main__':
    try:
        run_cli('finetune.py', lambda: main(read_settings(description=__doc__)))
    except Preempted as reason:
        print(f'finetune.py: {reason}; --resume auto goes on from there.', file=sys.stderr)
        sys.exit(PREEMPTED)
    except FloatingPointError as error:
        sys.exit(f'finetune.py: {error}')
    except OSError as error:
        sys.exit(f'finetune.py: {one_line(error)}; nothing saved before is lost, --resume auto goes on from there.')
