"""Image files: the suffixes that Pillow reads, and the conversion of every image to 8-bit RGB or grey."""
import os
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from coatnet_train.runtime.cli import ConfigError

__all__ = ['UNREADABLE', 'image_suffixes', 'is_image_name', 'to_mode']

# What PIL raises for a file that is not an image, truncated or corrupted; to_mode's ConfigError is a ValueError.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
# Formats that Pillow recognises without decoding any pixels, and EPS, which it hands to Ghostscript.
NOT_DECODED = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that this Pillow decodes by itself: .jpg, .jfif, .gif, .avif, ..."""
    known = Image.registered_extensions()  # imports the plugins that fill Image.OPEN
    decoded = {suffix for suffix, name in known.items() if name in Image.OPEN and name not in NOT_DECODED}
    return frozenset(decoded | {'.mpo'})  # opened as the JPEG that an .mpo begins with


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def to_mode(image: Image.Image, mode: str = 'RGB') -> Image.Image:
    """Convert a decoded image to 8-bit 'RGB' or grey 'L', in the same way for every source, script and the Space.

    16-bit grey is scaled linearly, to its upper byte. Transparency is dropped and CMYK is 255 - ink without a colour
    profile, as in timm's training and evaluation, so that accuracies are those of timm. 32-bit images (modes I and F)
    raise ConfigError, because they have no defined white point.

    EXIF orientation is not applied: training, evaluation, feature extraction and predict.py ignore it for every source,
    as timm does, because published accuracies were measured that way. Only the Space (hub/space) applies it, because
    phones store photographs rotated and no accuracies are compared there.
    """
    if image.mode.startswith('I;16'):  # convert() would clip values above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise ConfigError(f'This image has 32 bits a pixel (mode {image.mode}), which have no defined white point; '
                          f'save it with 8 bits a channel.')
    if 'transparency' in image.info:
        image.load()  # decoders may set it late
        image.info.pop('transparency')  # convert() would warn and keep it
    return image.convert(mode)
