"""How much pretrained weights help on few labels: fine-tuned, and frozen under a linear probe, beside a random start.

    python scripts/transfer.py --data-dir imagenette --model coatnet_pico_64.dist_tin200 \\
        --results-file results/transfer_imagenette_cpu.json

Each fraction of the training split is drawn several times, evenly over the classes; all three methods see the same
images, and fine-tuning and random start take the same number of updates under the same settings, more where there are
more images. Nothing is chosen on the validation split: the last epoch counts. Rows in the results file are not made
again; a file that was made under other settings is refused.
"""
from coatnet_train.experiments.transfer_config import TransferSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: TransferSettings) -> dict:
    """Make the rows that are missing, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.transfer import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('transfer.py', lambda: main(parse_flags(TransferSettings, __doc__)))
