"""coatnet_train/data/image_files.py: one conversion for images of every source, and file names that are not UTF-8."""
import io
import json
import logging
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import upload
from coatnet_train.data.config import DataSettings, is_stream
from coatnet_train.data.dataset import IndexedImageDataset, StreamingImageDataset, create_dataset
from coatnet_train.data.image_files import to_mode
from coatnet_train.data.loader import UnreadableImages
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.console import printable

SOURCES = ('folder', 'torch', 'hfds', 'hfids', 'wds')
RAMP = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)  # mean 0.5


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(source: str, content: bytes, suffix: str, folder: Path, mode: str = 'RGB') -> list[torch.Tensor]:
    """Training images read from a source with three equal files of class 0 and a white one of class 1."""
    white = encoded(Image.new('RGB', (40, 30), 'white'), 'PNG')
    files = [(f'one/{number}.{suffix}', content) for number in range(3)] + [('two/0.png', white)]
    options = dict(workers=0, data_dir=str(folder / 'data'))
    for split in ('train', 'validation'):
        for name, part in files:
            path = folder / 'data' / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part)
    if source == 'torch':
        settings = DataSettings(**options | dict(dataset='torch/image_folder'))
    elif source in ('hfds', 'hfids'):
        settings = DataSettings(**options | dict(dataset=f'{source}/{folder / "data"}', data_dir=str(folder / 'cache')))
    elif source == 'wds':
        settings = DataSettings(**options | dict(dataset='wds/', data_dir=str(folder)))
        with tarfile.open(folder / 'train-0.tar', 'w') as tar:
            for number, (name, part) in enumerate(files):
                for end, stored in ((name.rpartition('.')[2], part), ('cls', b'1' if 'two' in name else b'0')):
                    info = tarfile.TarInfo(f'{number:03}.{end}')
                    info.size = len(stored)
                    tar.addfile(info, io.BytesIO(stored))
        split = dict(name='train', num_samples=4, filenames=['train-0.tar'], shard_lengths=[4])
        (folder / '_info.json').write_text(json.dumps(dict(splits=dict(train=split))))
    else:
        settings = DataSettings(**options)
    dataset, _ = create_dataset(settings, 'train', num_classes=2, num_samples=4)
    if is_stream(settings):
        items = list(StreamingImageDataset(dataset, pil_to_tensor, mode=mode))
    else:
        images = IndexedImageDataset(dataset, pil_to_tensor, mode=mode)
        items = [images[0, index] for index in range(len(images))]
        bad = UnreadableImages(dataset, 1, lambda line: logging.getLogger('test').warning(line))
        bad.add(torch.tensor([index for _, _, index in items]))
    return [image for image, label, _ in items if label == 0]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('source', SOURCES)
def test_sixteen_bits_have_one_value_from_every_source(source, mode, tmp_path):
    images = read(source, encoded(Image.fromarray(RAMP), 'PNG'), 'png', tmp_path, mode)
    assert len(images) == 3
    for image in images:
        assert image.shape == (3 if mode == 'RGB' else 1, 30, 40)
        assert image.float().mean().item() / 255 == pytest.approx(0.5, abs=1 / 255)
        assert torch.equal(image[0], torch.from_numpy((RAMP >> 8).astype(np.uint8)))


def test_the_page_reads_what_the_scripts_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    palette = Image.fromarray(noise[..., :3]).quantize(16)
    plain = {'RGBA': Image.fromarray(noise), 'LA': Image.fromarray(noise[..., :2], 'LA'), 'P': palette,
             'L': Image.fromarray(noise[..., 0]), 'I;16': Image.fromarray(RAMP), 'grey': Image.fromarray(RAMP)}
    options = {'P': dict(transparency=bytes(range(0, 256, 16))), 'grey': dict(transparency=300),
               'L': dict(transparency=7)}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name, image in plain.items():
            path = tmp_path / f'{name}.png'
            image.save(path, **options.get(name, {}))
            with Image.open(path) as file:
                ours = to_mode(file)
            theirs, notes = upload.read_upload(path)
            assert np.array_equal(ours, theirs) and ours.mode == 'RGB'
            # transparency is dropped, as timm does
            expected = RAMP >> 8 if image.mode == 'I;16' else np.asarray(image.convert('RGB'))[..., 0]
            assert np.array_equal(np.asarray(ours)[..., 0], expected), name
            dropped = 'Transparency was dropped, as in training.'
            assert (dropped in notes) == (name in ('RGBA', 'LA', 'P', 'grey', 'L')), name


@pytest.mark.parametrize('form', ['I;16', 'I;16B', 'I;16L'])
def test_byte_orders_of_sixteen_bits(form):
    values = RAMP.astype('>u2' if form.endswith('B') else '<u2')
    image = Image.frombytes(form, (40, 30), values.tobytes())
    assert np.array_equal(to_mode(image, 'L'), RAMP >> 8)


@pytest.mark.parametrize('number', ['I', 'F'])
@pytest.mark.parametrize('source', SOURCES)
def test_images_of_32_bits_are_unreadable_from_every_source(source, number, tmp_path, caplog):
    content = encoded(Image.fromarray(RAMP.astype(dict(I=np.int32, F=np.float32)[number])), 'TIFF')
    assert read(source, content, 'tiff', tmp_path) == []
    said = [record.getMessage() for record in caplog.records if 'unreadable' in record.getMessage()]
    assert len(said) == 3
    for line in said:
        assert f'32 bits a pixel (mode {number}), which have no defined white point; save it with 8 bits' in line
    with pytest.raises(ConfigError, match=rf'32 bits a pixel \(mode {number}\)'):
        upload.read_upload(tmp_path / 'data' / 'train' / 'one' / '0.tiff')


@pytest.mark.parametrize('source', SOURCES)
def test_no_script_applies_orientation_and_the_page_does(source, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    content = encoded(Image.new('RGB', (40, 30), 'red'), 'JPEG', exif=tags)
    assert {image.shape for image in read(source, content, 'jpg', tmp_path)} == {(3, 30, 40)}
    assert upload.read_upload(tmp_path / 'data' / 'train' / 'one' / '0.jpg')[0].size == (30, 40)


def test_cmyk_and_palettes_are_those_of_timm():
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    for image in (Image.fromarray(noise, 'CMYK'), Image.fromarray(noise[..., :3]).quantize(16), Image.new('1', (4, 4))):
        for mode in ('RGB', 'L'):
            assert np.array_equal(to_mode(image, mode), image.convert(mode))


# File names


@pytest.mark.parametrize(('raw', 'shown'), [
    (b'cat.png', 'cat.png'), ('猫.png'.encode(), '猫.png'), (b'caf\xe9', r'caf\xe9'), (b'back\\slash', r'back\slash'),
    (b'a\\b\xff', r'a\\b\xff'), (b'caf\\xe9', r'caf\\xe9')])
def test_every_name_can_be_printed_and_turned_back(raw, shown):
    text = printable(os.fsdecode(raw))
    assert text == shown
    back = text.encode().decode('unicode_escape').encode('latin-1') if '\\x' in text else text.encode()
    assert back == raw
