"""Images with one colour per class, and settings for a run of some seconds on them."""
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import finetune
from coatnet_train.training import run as training_run
from coatnet_train.training import run_dir
from support.images import write_images


@pytest.fixture(autouse=True)
def plain_figures_of_runs(plain_figures, request, monkeypatch) -> None:
    """Tests in this folder draw empty figures and save them as a pixel, unless they are marked draws_figures."""
    if not request.node.get_closest_marker('draws_figures'):
        for name in ('confusion_figure', 'misclassified_figure'):
            monkeypatch.setattr(training_run, name, lambda *args: Figure())
        monkeypatch.setattr(run_dir, 'curves_figure', lambda history: Figure())


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def settings(image_folder, tmp_path) -> finetune.FinetuneSettings:
    return finetune.FinetuneSettings(
        data_dir=str(image_folder), model='test_resnet', img_size=32, epochs=2, batch_size=8, lr=1e-3,
        warmup_epochs=0.5, workers=0, device='cpu', output=str(tmp_path), experiment='run')
