"""Measure accuracy at other image sizes and on corrupted images, without retraining.

    python scripts/robustness.py --data-dir tiny-imagenet --results-file results/robustness_tin200_cpu.json \\
        --model coatnet_pico_64.dist_tin200 lightconvnet_pico_64.dist_tin200

For other sizes the whole image is resized; crop and normalisation stay those of the weights. Corruptions are applied to
the stored image, before it is resized: JPEG at quality 30, Gaussian blur of radius 1 pixel, and Gaussian noise of
standard deviation 0.1 (pixels in 0 to 1), which is the same for an image each time. Models in the results file are not
measured again.
"""
from coatnet_train.experiments.robustness_config import RobustnessSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: RobustnessSettings) -> dict:
    """Measure every row, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.robustness import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('robustness.py', lambda: main(parse_flags(RobustnessSettings, __doc__)))
