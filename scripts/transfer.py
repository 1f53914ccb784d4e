"""Measure pretrained weights on few labels: fine-tuning and linear probe, against training from random weights.

    python scripts/transfer.py --data-dir imagenette --model coatnet_pico_64.dist_tin200 \\
        --results-file results/transfer_imagenette_cpu.json

Each fraction of the training split is drawn several times, stratified by class, and all three methods use the same
draws. Fine-tuning and random start make the same number of updates under the same settings, set by --updates for each
fraction. Nothing is chosen on the validation split: the last epoch counts. Rows in the results file are not repeated; a
file made under other settings is rejected.
"""
from coatnet_train.experiments.transfer_config import TransferSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: TransferSettings) -> dict:
    """Make the missing rows, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.transfer import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('transfer.py', lambda: main(parse_flags(TransferSettings, __doc__)))
