"""Pictures whose colour tells the class, and settings for a run of some seconds on them."""
from pathlib import Path

import pytest

import finetune
from support.images import write_images


@pytest.fixture(autouse=True)
def plain_figures_of_runs(plain_figures) -> None:
    """Tests in this folder save their figures as a pixel."""


@pytest.fixture(scope='session')
def pictures(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('pictures'))


@pytest.fixture
def settings(pictures, tmp_path) -> finetune.Settings:
    return finetune.Settings(
        data_dir=str(pictures), model='test_resnet', img_size=32, epochs=2, batch_size=8, lr=1e-3, warmup_epochs=0.5,
        workers=0, device='cpu', output=str(tmp_path), experiment='run')
