"""Uploads of the page: size and format are checked before decoding, with error messages for users."""
from pathlib import Path

from PIL import Image, ImageOps

from coatnet_train.data.image_files import UNREADABLE, to_mode
from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['FORMATS', 'MAX_BYTES', 'MAX_PIXELS', 'MAX_SIDE', 'read_upload']

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')  # Pillow knows more formats, some through external programs
MAX_BYTES = 10 * 2 ** 20
MAX_SIDE = 12_000  # pixels
MAX_PIXELS = 60_000_000


def read_upload(path: Path) -> tuple[Image.Image, list[str]]:
    """Read an image file as upright RGB; returns the image and a note for each noteworthy change.

    EXIF orientation is applied, because phones store photographs rotated; of several frames the first is taken. The
    conversion is otherwise that of the scripts (`image_files.to_mode`), so that predictions agree.

    Raises ConfigError for a file that is not an image, damaged or too large.
    """
    if not path.is_file():
        raise ConfigError('This file is kept no longer; choose it again.')
    size, notes = path.stat().st_size, []
    if not size:
        raise ConfigError('This file is empty (0 bytes); choose an image.')
    if size > MAX_BYTES:
        raise ConfigError(f'This file has {size / 2 ** 20:.1f} MiB, and at most {MAX_BYTES // 2 ** 20} are read; '
                          f'choose a smaller one.')
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_size(image)
            if getattr(image, 'is_animated', False) and image.format != 'MPO':  # MPO: a phone's photo with its preview
                notes.append('This file has several frames: only the first one was read.')
            image.load()
            return upright_rgb(image, notes), notes
    except ConfigError:
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(f'This image has too many pixels: at most {MAX_PIXELS // 10 ** 6} million are read; '
                          f'make it smaller.') from error
    except Image.UnidentifiedImageError as error:
        raise ConfigError('This is not an image that can be read here (JPEG, PNG, WebP, GIF, BMP or TIFF); '
                          'choose another file.') from error
    except UNREADABLE as error:
        raise ConfigError(f'This image is damaged or cut short ({one_line(error)}); choose another.') from error


def check_size(image: Image.Image) -> None:
    """Raise ConfigError for an image with too many pixels, from its header alone."""
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ConfigError(
            f'This image has {width:,} x {height:,} pixels, and at most {MAX_SIDE:,} a side and '
            f'{MAX_PIXELS // 10 ** 6} million in all are read; make it smaller.')


def upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply EXIF orientation and convert to RGB; appends a note for each noteworthy change."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        notes.append('Transparency was dropped, as in training.')
    if image.mode.startswith('I;16'):
        notes.append('16-bit grey was brought to 8 bits.')
    if image.mode == 'CMYK':
        notes.append('CMYK was converted to RGB without a colour profile, as in training.')
    return to_mode(image)
