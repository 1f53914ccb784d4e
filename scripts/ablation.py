"""Train layouts and switches of the zoo's design space under one recipe, and compare them in a table.

    python scripts/ablation.py --data-dir imagenette --grid cpu --amp
    python scripts/ablation.py --data-dir imagenette --grid full --seeds 0 1 2 --amp --device cuda

A row is a layout of four block types, optionally with options of `BackboneCfg`, as in 'LLLL glu=False'. Every row is
--model with that layout, trained from random weights by finetune.py for --epochs. After an interruption the same
command resumes from the last finished epoch. After each run the table so far is written to --results-file, with a plot
and a folder of the metrics of every run beside it. The top-1 of a row is that of its last epoch, not of its best one.
--speed then times the inference of all rows in turns.
"""
from coatnet_train.experiments.ablation_config import AblationSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: AblationSettings) -> dict:
    """Train the missing runs, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.ablation import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('ablation.py', lambda: main(parse_flags(AblationSettings, __doc__)))
