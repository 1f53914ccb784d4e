"""Train layouts and switches of the zoo's design space under one recipe, and set them side by side.

    python scripts/ablation.py --data-dir imagenette --grid cpu --amp
    python scripts/ablation.py --data-dir imagenette --grid full --seeds 0 1 2 --amp --device cuda

A row is a layout of four block types and perhaps options of `BackboneCfg`, as in 'LLLL glu=False'; every row is
--model with that layout, trained from random weights by finetune.py for --epochs. Interrupted, the same command goes
on from the last finished epoch. After each run the table so far goes to --results-file, and beside it a plot and a
folder with the metrics of every run; a row's top-1 is that of its last epoch, never the best one. --speed then times
all rows side by side, in inference.
"""
from coatnet_train.experiments.ablation_config import AblationSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: AblationSettings) -> dict:
    """Train what is missing, report, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.ablation import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('ablation.py', lambda: main(parse_flags(AblationSettings, __doc__)))
