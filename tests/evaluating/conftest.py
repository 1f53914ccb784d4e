"""Ten of ImageNet's classes, a model with random weights, and settings to evaluate it on them."""
import csv
from pathlib import Path

import pytest
from safetensors.torch import save_file

import eval_imagenet
from support.imagenet_runs import SYNSETS, random_model, run, write_images


@pytest.fixture(scope='module')
def ten(tmp_path_factory) -> Path:
    """A validation folder with ten of ImageNet's synsets, whose labels are not 0 to 9."""
    folder = tmp_path_factory.mktemp('ten')
    write_images(folder / 'val', SYNSETS[5:1000:100], each=3)
    return folder


@pytest.fixture
def weights(tmp_path, randomize) -> str:
    path = tmp_path / 'random.safetensors'
    save_file(random_model(randomize).state_dict(), path)
    return str(path)


@pytest.fixture
def settings(ten, weights) -> eval_imagenet.EvaluationSettings:
    return eval_imagenet.EvaluationSettings(
        data_dir=str(ten), model=('test_resnet',), checkpoint=(weights,), img_size=32, batch_size=8, workers=0,
        device='cpu')


@pytest.fixture
def classes_of(tmp_path):
    """Evaluate with --output and return classes.csv by class."""

    def read(settings: eval_imagenet.EvaluationSettings, **changes) -> tuple[dict, dict[str, dict]]:
        row = run(settings, output=str(tmp_path / 'files'), **changes)
        path, = (tmp_path / 'files').glob('*/classes.csv')
        with path.open(encoding='utf-8') as file:
            return row, {item['class']: item for item in csv.DictReader(file)}

    return read
