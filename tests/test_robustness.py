"""scripts/robustness.py: accuracy at other sizes and under corruptions against an independent evaluation."""
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import finetune
import robustness
from coatnet_train.experiments import robustness as robustness_run
from coatnet_train.runtime.cli import ConfigError
from support.constants import CLASSES
from support.images import write_images


@pytest.fixture(scope='module')
def settings(tmp_path_factory) -> robustness.RobustnessSettings:
    folder = tmp_path_factory.mktemp('robustness')
    data = write_images(folder / 'colours')
    finetune.main(finetune.FinetuneSettings(
        data_dir=str(data), model='test_resnet', img_size=32, epochs=2, batch_size=12, lr=3e-3, workers=0,
        device='cpu', output=str(folder), experiment='run', color_jitter=0.0))
    return robustness.RobustnessSettings(
        data_dir=str(data), model=(f'local-dir:{folder / "run"}',), sizes=(32, 48), workers=0, batch_size=4,
        device='cpu', results_file=str(folder / 'robustness.json'))


def by_hand(settings: robustness.RobustnessSettings, size: int, corruption=lambda image: image) -> float:
    model = timm.create_model(settings.model[0], pretrained=True).eval()
    config = timm.data.resolve_data_config({'img_size': size}, model=model)
    transform, right = timm.data.create_transform(**config), []
    for label, name in enumerate(CLASSES):
        for path in sorted((Path(settings.data_dir) / 'val' / name).iterdir()):
            with torch.no_grad():
                logits = model(transform(corruption(Image.open(path).convert('RGB')))[None])
            right.append(int(logits.argmax()) == label)
    return 100 * sum(right) / len(right)


def test_numbers_are_those_of_timm_alone(settings):
    [found] = robustness.main(settings)['top1'].values()
    assert found['32 px'] == pytest.approx(by_hand(settings, 32))
    assert found['48 px'] == pytest.approx(by_hand(settings, 48))
    for name, corruption in robustness_run.CORRUPTIONS.items():
        assert found[name] == pytest.approx(by_hand(settings, 32, corruption))
    written = json.loads(Path(settings.results_file).read_text())
    assert list(written['top1'].values()) == [found] and written['made'][settings.model[0]]['hardware']


def test_models_of_the_file_are_not_measured_again(settings, monkeypatch, tmp_path):
    file = str(tmp_path / 'robustness.json')
    monkeypatch.setattr(robustness_run, 'measure_top1', lambda settings, accelerator, name, *_: float(len(name)))
    monkeypatch.setattr(robustness_run, 'check_model', lambda settings, name: None)
    robustness.main(dataclasses.replace(settings, model=('first',), results_file=file))
    monkeypatch.setattr(robustness_run, 'measure_top1', lambda *arguments: 0.0)
    found = robustness.main(dataclasses.replace(settings, model=('second', 'first'), results_file=file))
    assert found == json.loads(Path(file).read_text()) and Path(file).with_suffix('.png').stat().st_size > 10_000
    assert set(found['top1']['first'].values()) == {5.0} and set(found['top1']['second'].values()) == {0.0}
    with pytest.raises(ConfigError, match='holds rows made with --sizes'):
        robustness.main(dataclasses.replace(settings, sizes=(32,), results_file=file))


def test_plot_shows_every_number():
    titles = '32 px', '48 px', *robustness_run.CORRUPTIONS
    rows = {f'x_64.{tag}': {title: base + place for place, title in enumerate(titles)}
            for tag, base in (('a', 10.0), ('b', 40.0))}
    left, right = robustness_run.plot(dict(settings=dict(sizes=[32, 48]), top1=rows)).axes
    assert [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in left.lines] == [
        ('x_64.a', [32, 48], [10.0, 11.0]), ('x_64.b', [32, 48], [40.0, 41.0])]
    assert [bar.get_height() for bar in right.patches] == [12.0, 13.0, 14.0, 42.0, 43.0, 44.0]
    assert [label.get_text() for label in right.get_xticklabels()] == list(robustness_run.CORRUPTIONS)


@pytest.mark.parametrize('name', robustness_run.CORRUPTIONS)
def test_corruption_is_done_and_repeats(name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    first, second = (np.asarray(robustness_run.CORRUPTIONS[name](image)).astype(float) for _ in range(2))
    assert first.shape == pixels.shape and np.array_equal(first, second)
    assert 5 < np.abs(first - pixels).mean() < 100


def test_noise_has_the_deviation_it_says():
    grey = Image.new('RGB', (200, 200), (128, 128, 128))
    assert np.asarray(robustness_run.noise(grey)).std() == pytest.approx(25.5, rel=0.02)


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'sizes': ()}, '--model and --sizes must name at least one each'),
    ({'results_file': 'no/such/file.json'}, '--results-file no/such/file.json: its folder'),
    ({'results_file': 'table.csv'}, "--results-file must end in .json, got 'table.csv'"),
    ({'batch_size': 0}, '--batch-size must be at least 1, got 0'),
    ({'workers': -1}, '--workers must be at least 0, got -1'),
    ({'model': ('test_resnet',)}, '--model test_resnet'),
])
def test_bad_settings_are_refused(settings, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        robustness.main(dataclasses.replace(settings, **changes))


@pytest.mark.parametrize(('content', 'sentence'), [
    ('hello', 'cannot be read or written'), ('{}', 'is no file that this script wrote, which has settings, top1, made'),
    ('[1]', 'is no file that this script wrote'), (None, 'cannot be read or written: .*directory')])
def test_files_of_others_are_refused_and_stay(settings, tmp_path, content, sentence):
    file = tmp_path / 'other.json'
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        robustness.main(dataclasses.replace(settings, results_file=str(file)))
    assert content is None or file.read_text() == content


def test_every_model_is_looked_at_before_the_first_is_measured(settings, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(robustness_run, 'measure_top1', never)
    again = dataclasses.replace(settings, results_file=str(tmp_path / 'robustness.json'))
    with pytest.raises(ConfigError, match='--model nope is not a name'):
        robustness.main(dataclasses.replace(again, model=(*settings.model, 'nope')))
    run = Path(shutil.copytree(settings.model[0].removeprefix('local-dir:'), tmp_path / 'run'))
    config = json.loads((run / 'config.json').read_text())
    config['pretrained_cfg']['label_names'] = config['label_names'] = ['another', *CLASSES[1:]]
    (run / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f'but has 3 for 3; the first that differ are another and {CLASSES[0]}'):
        robustness.main(dataclasses.replace(again, model=(*settings.model, f'local-dir:{run}')))
