"""Ask any timm or zoo model what is in an image, and see what it looked at.

    python scripts/predict.py kite.jpg
    python scripts/predict.py kite.jpg flowers/val --model local-dir:output/coatnet_pico --output overlays

Prints the top-5 predictions for each image and writes OUTPUT/predictions.csv, a row an image in the order they were
given: file, then label_1, description_1 (empty where a label is not described) and confidence_1 (0 to 1) to label_5,
description_5 and confidence_5. Also writes OUTPUT/IMAGE-KIND.png, an overlay of one KIND: attention of
the last T stage, the kernels that the last D stage predicts, or Grad-CAM of the predicted class for models without them
(also timm's own with attention). Folders are searched with their sub-folders. Images are read as in evaluation:
orientation tags are not applied, transparency is dropped. An image that cannot be read is named and left out; the
exit code is then 1, or 2 if none could be read.
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
