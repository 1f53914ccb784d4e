"""Classify images with any timm or zoo model, and draw attention, dynamic kernels or Grad-CAM over them.

    python scripts/predict.py kite.jpg
    python scripts/predict.py kite.jpg flowers/val --model local-dir:output/coatnet_pico --output overlays

Prints the top-5 predictions for each image and writes OUTPUT/predictions.csv, one row per image in the given order:
file, then label_1, description_1 (empty where a label has none) and confidence_1 (0 to 1) to label_5, description_5 and
confidence_5. Also writes the overlay OUTPUT/IMAGE-KIND.png. KIND is the attention of the last T stage, the kernels
predicted by the last D stage, or Grad-CAM of the predicted class for models without such stages (also timm's own models
with attention). Folders are searched with their sub-folders. Images are read as in evaluation: EXIF orientation is not
applied, transparency is dropped. Unreadable images are named and left out; the exit code is then 1, or 2 if none could
be read.
"""
import sys

from coatnet_train.explain.config import PredictionSettings, check_values
from coatnet_train.models.released import released_models
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: PredictionSettings) -> int:
    """Predict and explain every image; returns the exit code."""
    check_values(settings)
    from coatnet_train.explain.prediction import predict_images  # here: torch and timm take seconds to import
    return predict_images(settings)


if __name__ == '__main__':
    run_cli('predict.py', lambda: sys.exit(main(parse_flags(
        PredictionSettings, f'{__doc__}\nReleased, or in the cache: {", ".join(released_models()) or "nothing"}.'))))
