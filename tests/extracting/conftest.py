"""Pictures whose colour tells the class, and settings for features of a tiny network."""
from pathlib import Path

import pytest

import extract_features
from support.images import write_images


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('pictures'))


@pytest.fixture
def settings(pictures, tmp_path) -> extract_features.Settings:
    return extract_features.Settings(
        data_dir=str(pictures), model='test_resnet', img_size=32, batch_size=4, shard_size=10, workers=0, device='cpu',
        output=str(tmp_path / 'features'))
