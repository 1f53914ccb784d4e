"""Classify two photographs with the best packaged model, then fine-tune a faster one on digits, pretrained and not.

    python scripts/demo.py
    python scripts/demo.py --results-file results/demo_cpu.json

The photographs are scikit-image's cup of coffee and cat, the digits scikit-learn's 1,797. Both trainings have the same
settings and seed. Takes about 4 minutes on 2 CPU cores, and writes output/demo/demo.png. The exit code is 1 if the
pretrained model has an accuracy below 97 % on the held-out digits, or another accuracy once reloaded.
"""
import sys

from coatnet_train.runtime.cli import run_cli, tyro


def main(results_file: str = '') -> int:
    """Run the demo and return the exit code.

    Args:
        results_file: JSON to write, with hardware and versions.
    """
    from coatnet_train.experiments.demo import run  # here: torch and timm take seconds to import
    return run(results_file)


if __name__ == '__main__':
    run_cli('demo.py', lambda: sys.exit(tyro.cli(main, description=__doc__)))
