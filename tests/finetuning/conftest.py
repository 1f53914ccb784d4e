"""Images with one colour per class, and settings for a run of some seconds on them."""
from pathlib import Path

import pytest

import finetune
from support.images import write_images


@pytest.fixture(autouse=True)
def plain_figures_of_runs(plain_figures) -> None:
    """Tests in this folder save every figure as a pixel."""


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def settings(image_folder, tmp_path) -> finetune.FinetuneSettings:
    return finetune.FinetuneSettings(
        data_dir=str(image_folder), model='test_resnet', img_size=32, epochs=2, batch_size=8, lr=1e-3,
        warmup_epochs=0.5, workers=0, device='cpu', output=str(tmp_path), experiment='run')
