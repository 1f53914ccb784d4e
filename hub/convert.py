"""Weights that others trained, as a run folder that export.py, verify.py and publish.py take.

    python hub/convert.py coatnet_0_kecam.in1k --check-chelsea
    python hub/convert.py coatnet0_224_imagenet.h5 --output output/coatnet_0_kecam --check-chelsea
    python hub/convert.py coatnet_0_224.pth --model coatnet_0 --class-names classes.txt --license apache-2.0

SOURCE is a Keras .h5 file of keras_cv_attention_models (CoAtNet0), the name of one that is downloaded to the cache, or
a .pth or .safetensors file of timm's coatnet_N_224 or of this zoo. OUTPUT gets config.json, model.safetensors and
origin.json, which says where the weights come from, their MD5 and their licence; the released card and
coatnet_zoo/weights/releases.json repeat that. --check-chelsea shows kecam's weights scikit-image's cat, and writes
nothing unless they see what their author says: Egyptian cat 0.99324566, tiger cat 0.00381939.
Then: python hub/export.py OUTPUT --name NAME.TAG.
"""
from pathlib import Path

import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli
from convert_settings import ConvertSettings, check_values


def main(settings: ConvertSettings) -> Path:
    """Convert as `settings` say and return the folder."""
    check_values(settings)
    from convert_run import run  # here: torch and timm take seconds to import
    return run(settings)


if __name__ == '__main__':
    run_cli('convert.py', lambda: main(parse_flags(ConvertSettings, __doc__)))
