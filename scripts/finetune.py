"""Fine-tune any timm or zoo model on a folder of pictures, a torchvision data set, or one of the Hugging Face Hub.

    python scripts/finetune.py --recipe small_data --data-dir flowers \\
        --model lightconvnet_pico_64.tin200_preview --pretrained
    python scripts/finetune.py --data-dir data --dataset torch/cifar10 --dataset-download --model resnet18 --pretrained
    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20 --resume auto
    torchrun --nproc-per-node 8 scripts/finetune.py --recipe coatnet_in1k --data-dir imagenet --model coatnet_0

The folder has train/ and val/ (or validation/, test/), with one sub-folder per class in each. The run goes to
OUTPUT/EXPERIMENT: best weights with their config, metrics.csv, curves.png, summary.json, and of these weights
confusion.png, misclassified.png and predictions.csv (file, label, prediction and confidence of each held-out image).
Once `coatnet_zoo` is imported, `timm.create_model('local-dir:OUTPUT/EXPERIMENT', pretrained=True)`
loads it. Exit codes: 2 for a setting that cannot work, 75 when a SIGTERM was answered by saving (--resume auto goes
on from there), 1 for a loss that is not finite.
"""

import argparse
import sys

from coatnet_train.runtime.cli import Preempted, SettingsError, end_with_sentence, one_line, parse_flags
from coatnet_train.training.config import Settings, check_values
from coatnet_train.training.recipes import RECIPES, settings_of

PREEMPTED = 75  # exit code: stopped by SIGTERM, everything saved


def main(settings: Settings) -> dict:
    """Fine-tune as `settings` say, and return the summary that is also written to summary.json."""
    check_values(settings)
    from coatnet_train.training.run import finetune  # here: torch and timm take seconds to import
    return finetune(settings)


def read_settings(arguments: list[str] | None = None) -> Settings:
    """The command line, over the settings of --recipe if there is one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--recipe', default='')
    first.add_argument('--model', default='')
    first.add_argument('--amp', action=argparse.BooleanOptionalAction)
    given, _ = first.parse_known_args(arguments)
    defaults = {}
    if given.recipe:
        if given.recipe not in RECIPES:
            raise SettingsError(f'--recipe must be one of {", ".join(RECIPES)}, got {given.recipe!r}.')
        defaults = settings_of(given.recipe, given.model) | {'amp_if_native': given.amp is None}
    return parse_flags(Settings, __doc__, arguments, defaults)


if __name__ == '__main__':
    try:
        end_with_sentence('finetune.py', lambda: main(read_settings()))
    except Preempted as reason:
        print(f'finetune.py: {reason}; --resume auto goes on from there.', file=sys.stderr)
        sys.exit(PREEMPTED)
    except FloatingPointError as error:
        sys.exit(f'finetune.py: {error}')
    except OSError as error:
        sys.exit(f'finetune.py: {one_line(error)}; nothing saved before is lost, --resume auto goes on from there.')
