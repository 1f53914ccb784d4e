"""Accuracy at other image sizes and on corrupted images, without any retraining.

    python scripts/robustness.py --data-dir tiny-imagenet --results-file results/robustness_tin200_cpu.json \\
        --model coatnet_pico_64.dist_tin200 lightconvnet_pico_64.dist_tin200

Sizes resize the whole image; crop and colours stay those of the weights. Corruptions apply to the image as it is
stored, before it is resized: JPEG at quality 30, Gaussian blur of radius 1 pixel, Gaussian noise of deviation 0.1 (of
1), the same noise for an image each time. Models that the results file holds are not measured again.
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
