"""One image, and settings that predict it with a small model."""
from pathlib import Path

import pytest

import predict
from support.overlay_runs import SMALL_FLAGS, write_image


@pytest.fixture
def image_path(tmp_path) -> Path:
    return write_image(tmp_path / 'images' / 'kite.png')


@pytest.fixture
def settings(image_path, tmp_path) -> predict.PredictionSettings:
    return predict.PredictionSettings(
        images=(image_path,), model='coatnet_pico_64', img_size=32, num_classes=4, model_kwargs=SMALL_FLAGS,
        device='cpu', output=tmp_path / 'overlays')
