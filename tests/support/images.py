"""Images for tests: generated ones with one colour per class, and packed sets of real ones."""
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.constants import CLASSES, DATA

__all__ = ['needs_images', 'unpack_images', 'write_images']


def write_images(folder: Path, classes=CLASSES, train: int = 12, val: int = 5) -> Path:
    """Write noisy images with one colour per class into FOLDER/train/CLASS and FOLDER/val/CLASS; returns FOLDER."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 150, (36, 40, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder


def needs_images(name: str) -> pytest.MarkDecorator:
    """Mark that skips a test if the packed set NAME.zip is missing."""
    return pytest.mark.skipif(
        not (DATA / f'{name}.zip').is_file(),
        reason=f'needs {name}.zip in $COATNET_ZOO_DATA, which is ../shared/data beside the checkout if unset')


def unpack_images(name: str, folder: Path, every: int = 1) -> Path:
    """Write one in `every` images of the packed set NAME.zip to FOLDER/val/CLASS/FILE.jpg; returns FOLDER.

    JPEG of quality 95 without chroma subsampling: timm's folder reader does not list the WebP files of the set.
    """
    with zipfile.ZipFile(DATA / f'{name}.zip') as archive:
        for member in sorted(archive.namelist())[::every]:
            path = folder / 'val' / Path(*Path(member).parts[-2:]).with_suffix('.jpg')
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(archive.read(member))).save(path, quality=95, subsampling=0)
    return folder
