"""Convert third-party weights into a run folder that export.py accepts.

    python hub/convert.py coatnet_0_kecam.in1k --check-chelsea
    python hub/convert.py coatnet0_224_imagenet.h5 --output output/coatnet_0_kecam --check-chelsea
    python hub/convert.py coatnet_0_224.pth --model coatnet_0 --class-names classes.txt --license apache-2.0

SOURCE is a Keras .h5 file of keras_cv_attention_models (CoAtNet0), the name of one that is downloaded to the cache, or
a .pth or .safetensors file of timm's coatnet_N_224 or of this zoo. OUTPUT gets config.json, model.safetensors and
origin.json with the source, MD5 and licence of the weights, which the released card and
coatnet_zoo/weights/releases.json repeat. --check-chelsea runs kecam's weights on scikit-image's cat, and writes nothing
unless the probabilities are those reported by their author: Egyptian cat 0.99324566, tiger cat 0.00381939.
Next step: python hub/export.py OUTPUT --name NAME.TAG.
"""
from pathlib import Path

import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli
from convert_settings import ConvertSettings, check_values


def main(settings: ConvertSettings) -> Path:
    """Convert the weights and return the run folder."""
    check_values(settings)
    from convert_run import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('convert.py', lambda: main(parse_flags(ConvertSettings, __doc__)))
