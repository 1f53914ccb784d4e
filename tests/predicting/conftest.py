"""One picture and settings to predict it with a small model."""
from pathlib import Path

import pytest

import predict
from support.overlay_runs import SMALL_FLAGS, write_image


@pytest.fixture
def picture(tmp_path) -> Path:
    return write_image(tmp_path / 'pictures' / 'kite.png')


@pytest.fixture
def settings(picture, tmp_path) -> predict.Settings:
    return predict.Settings(
        images=(picture,), model='coatnet_pico_64', img_size=32, num_classes=4, model_kwargs=SMALL_FLAGS,
        device='cpu', output=tmp_path / 'overlays')
