"""hub/space/upload.py and the files of the Space: accepted and rejected uploads, and the completeness of the folder."""
import ast
import re
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import upload
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.releases import RELEASES
from support.constants import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPACE = ROOT / 'hub' / 'space'


def noise(mode: str = 'RGB', size: tuple[int, int] = (40, 30)) -> Image.Image:
    bands = {'L': 1, 'RGB': 3, 'CMYK': 4, 'RGBA': 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_without_pixels(width: int, height: int) -> bytes:
    """A PNG with a valid header and no pixels: its size can be read, but decoding fails."""
    chunks = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0), b'IDAT' + zlib.compress(b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)) for chunk in chunks)


def read(tmp_path: Path, content: bytes, name: str = 'image') -> tuple[Image.Image, list[str]]:
    (tmp_path / name).write_bytes(content)
    return upload.read_upload(tmp_path / name)


@pytest.mark.parametrize(('content', 'message'), [
    (b'', r'empty \(0 bytes\); choose'),
    (b'hello, this is a text' * 100, 'not an image that can be read'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not an image that can be read'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n', 'not an image that can be read'),  # ghostscript's
    (png_without_pixels(100, 100), 'damaged or cut short'),
    (png_without_pixels(20_000, 10), r'20,000 x 10 pixels, and at most 12,000 a side'),
    (png_without_pixels(10_000, 10_000), r'10,000 x 10,000 pixels, .* 60 million in all'),
    (png_without_pixels(60_000, 60_000), 'too many pixels: at most 60 million'),
    (encoded(noise('RGB', (64, 64)), 'JPEG')[:900], 'damaged or cut short'),
    (encoded(noise('RGB', (64, 64)), 'PNG')[:900], 'damaged or cut short'),
    (encoded(Image.new('F', (8, 8)), 'TIFF'), '32 bits a pixel'),
], ids=['empty', 'text', 'svg', 'postscript', 'no pixels', 'wide', 'many pixels', 'bomb', 'cut jpeg', 'cut png',
        'float'])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bad_files_get_a_sentence(content, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as refused:
        read(tmp_path, content)
    sentence = str(refused.value)
    assert str(tmp_path) not in sentence and re.search(r'(choose|make it smaller|save it)', sentence)


def test_large_files_are_not_opened_and_lost_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(upload.Image, 'open', lambda *args, **kwargs: pytest.fail('opened'))
    with pytest.raises(ConfigError, match=r'10\.0 MiB, and at most 10 are read'):
        read(tmp_path, bytes(upload.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match='kept no longer; choose it again'):
        upload.read_upload(tmp_path / 'nowhere')


def test_plain_images_are_read_as_they_are(tmp_path):
    image = noise()
    for form in ('PNG', 'BMP', 'TIFF'):
        found, notes = read(tmp_path, encoded(image, form))
        assert notes == [] and found.mode == 'RGB' and np.array_equal(found, image)
    assert read(tmp_path, encoded(noise('L'), 'PNG'))[0].mode == 'RGB'
    assert read(tmp_path, encoded(image, 'WEBP', lossless=True))[0].getpixel((3, 4)) == image.getpixel((3, 4))


def test_sixteen_bits_keep_their_order(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    found, notes = read(tmp_path, encoded(Image.fromarray(ramp), 'PNG'))
    assert notes == ['16-bit grey was brought to 8 bits.']
    assert np.array_equal(np.asarray(found)[..., 1], (ramp / 257).astype(np.uint8))


def test_cmyk_is_converted_by_its_inks_alone(tmp_path):
    cyan = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
    found, notes = read(tmp_path, encoded(cyan, 'JPEG', quality=100))
    assert found.mode == 'RGB' and np.abs(np.subtract(found.getpixel((5, 5)), (0, 255, 255))).max() <= 3
    assert notes == ['CMYK was converted to RGB without a colour profile, as in training.']
    # with a profile too: training and evaluation use none
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    image = noise('CMYK')
    found, said = read(tmp_path, encoded(image, 'TIFF', icc_profile=srgb))
    assert said == notes and np.array_equal(found, image.convert('RGB'))


def test_of_an_animation_the_first_frame_is_read_and_that_is_said(tmp_path):
    frames = [Image.new('RGB', (20, 10), colour) for colour in ('red', 'lime', 'blue')]
    for form in ('GIF', 'PNG', 'WEBP'):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        found, notes = read(tmp_path, content)
        assert notes == ['This file has several frames: only the first one was read.']
        assert found.size == (20, 10) and found.getpixel((5, 5)) == (255, 0, 0)


def test_transparency_is_dropped_and_phones_are_held_upright(tmp_path):
    clear = Image.new('RGBA', (4, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    found, notes = read(tmp_path, encoded(clear, 'PNG'))
    assert [found.getpixel((0, 0)), found.getpixel((3, 1))] == [(0, 0, 255), (255, 0, 0)]
    assert notes == ['Transparency was dropped, as in training.']
    lying = Image.new('RGB', (40, 20), 'white')
    lying.paste('black', (0, 0, 20, 20))
    tags = Image.Exif()
    tags[0x0112] = 6  # the phone was turned: the left side is the top
    found, notes = read(tmp_path, encoded(lying, 'JPEG', exif=tags))
    assert found.size == (20, 40) and notes == []
    assert max(found.getpixel((10, 5))) < 20 and min(found.getpixel((10, 35))) > 235


# The files of the Space


def imports(file: Path) -> set[str]:
    """Modules that a file imports: anywhere in it for the page's files, at the top level for coatnet_train's."""
    tree = ast.parse(file.read_text())
    at_start = [part for top in tree.body for part in (top.body if isinstance(top, ast.Try) else [top])]
    found = set()
    for node in ast.walk(tree) if file.parent == SPACE else at_start:
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f'{node.module}.{name.name}' for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_requirements_bring_what_the_page_imports():
    """The Space contains all of coatnet_train, but its requirements only cover the modules that the page imports."""
    todo, seen, packages = sorted(SPACE.glob('*.py')), set(), set()
    while todo:
        seen.add(file := todo.pop())
        for module in imports(file):
            inside = ROOT / 'scripts' / f'{module.replace(".", "/")}.py'
            if module.startswith('coatnet_train') and inside.is_file() and inside not in seen:
                todo.append(inside)
            packages.add(module.partition('.')[0])
    own = {'coatnet_train', 'coatnet_zoo', *(file.stem for file in SPACE.glob('*.py')), *sys.stdlib_module_names}
    asked = (SPACE / 'requirements.txt').read_text().lower()
    assert {'accelerate', 'matplotlib', 'tyro'} <= packages
    names = {'PIL': 'pillow', 'huggingface_hub': 'huggingface-hub'}
    assert [name for name in sorted(packages - own - {'gradio', 'numpy'})  # brought by the Space's sdk, and by torch
            if not re.search(rf'^{names.get(name, name)}\b', asked, re.MULTILINE)] == []


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    known = [*project['dependencies'], *project['optional-dependencies']['scripts']]
    asked = (SPACE / 'requirements.txt').read_text().split()
    assert set(project['dependencies']) <= set(asked) <= set(known)


def test_header_is_what_the_hub_reads():
    yaml, version = pytest.importorskip('yaml'), pytest.importorskip('packaging.specifiers')
    text = (SPACE / 'README.md').read_text()
    header = yaml.safe_load(text.split('---')[1])
    assert header['sdk'] == 'gradio' and (SPACE / header['app_file']).is_file()
    assert len(header['short_description']) <= 60 and header['license'] == 'other'
    assert all(entry['release']['license_name'] in header['license_name'] for entry in RELEASES.values())
    space = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']['space']
    bounds = next(item for item in space if item.startswith('gradio')).removeprefix('gradio')
    assert header['sdk_version'] in version.SpecifierSet(bounds)
    pixels = f'{upload.MAX_SIDE:,} pixels a side and {upload.MAX_PIXELS // 10 ** 6} million'
    for bound in (f'{upload.MAX_BYTES >> 20} MiB', pixels):
        assert bound in ' '.join(text.split())
