"""Images with one colour per class, and settings for features of a tiny network."""
from pathlib import Path

import pytest

import extract_features
from support.images import write_images


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def settings(image_folder, tmp_path) -> extract_features.ExtractionSettings:
    return extract_features.ExtractionSettings(
        data_dir=str(image_folder), model='test_resnet', img_size=32, batch_size=4, shard_size=10, workers=0,
        device='cpu', output=str(tmp_path / 'features'))
