"""Fine-tune the same models on the same few images by several recipes, and compare them on held-out images.

    python scripts/compare_recipes.py --imagenette imagenette/train --samples samples/val \\
        --results-file results/small_data_cpu.json

The sets: 100 of scikit-learn's digits, 60 images of five classes of Imagenette, and some 200 images of six coarse
groups (birds, dogs, ...) of ImageNet, one image a class. Each seed draws its own images, which all recipes share. The
held-out images are other training images; no validation split is used. The last epoch counts, not the best one. Rows in
the results file are not repeated, so the same command continues an interrupted call.
"""
from coatnet_train.experiments.compare_recipes_config import CompareRecipesSettings, check_values
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: CompareRecipesSettings) -> dict:
    """Make the missing rows, and return the report."""
    check_values(settings)
    from coatnet_train.experiments.compare_recipes import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('compare_recipes.py', lambda: main(parse_flags(CompareRecipesSettings, __doc__)))
