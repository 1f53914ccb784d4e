"""scripts/demo.py without its full training: the digits, the figure, and the exit codes."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

import demo
from coatnet_train.experiments import demo as demo_run
from coatnet_train.models.released import best_release


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Use one thread: tiny steps gain nothing from more, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def digits_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('digits')
    demo_run.write_digits(folder)
    return folder


def test_every_digit_is_written_once_under_its_label(digits_dir):
    digits, seen = load_digits(), []
    for path in digits_dir.rglob('*.png'):
        index = int(path.stem)
        seen.append(index)
        assert path.parent.name == str(digits.target[index])
        image = Image.open(path)
        assert (image.size, image.mode) == ((32, 32), 'RGB')
        if index % 100 == 0:  # shrunk again, it is the original
            small = np.asarray(image.convert('L').resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
            assert np.abs(small - digits.images[index]).mean() < 1
    assert sorted(seen) == list(range(1797))


def test_held_out_fifth_is_stratified_and_always_the_same(digits_dir, tmp_path):
    held_out = [path.relative_to(digits_dir) for path in sorted((digits_dir / 'val').rglob('*.png'))]
    assert len(held_out) == 360
    per_digit = np.bincount([int(path.parent.name) for path in held_out])
    assert len(per_digit) == 10 and per_digit.min() >= 34 and per_digit.max() <= 37
    demo_run.write_digits(tmp_path)
    assert [path.relative_to(tmp_path) for path in sorted((tmp_path / 'val').rglob('*.png'))] == held_out


def history(least: float) -> list[dict]:
    return [{'epoch': epoch, 'eval_top1': 99 - least / epoch} for epoch in range(1, 6)]


def test_image_shows_errors_in_red_before_the_rest(digits_dir, tmp_path):
    files = [str(path) for path in sorted((digits_dir / 'val').rglob('*.png'))]
    labels = np.array([int(Path(file).parent.name) for file in files])
    probabilities = torch.nn.functional.one_hot(torch.from_numpy(labels), 10) * 0.9 + 0.01
    for index in (7, 200, 359):
        probabilities[index] = probabilities[index].roll(1)
    overlays = [tmp_path / 'cat.png', tmp_path / 'coffee.png']
    for path in overlays:
        Image.new('RGB', (64, 32)).save(path)
    histories = {'pretrained': history(20), 'from random weights': history(80)}
    figure = demo_run.draw_demo(overlays, histories, probabilities, labels, files)

    *photographs, accuracy = figure.axes[:3]
    assert [axes.images[0].get_size() for axes in photographs] == [(32, 64)] * 2
    assert accuracy.get_xlabel() == 'epoch' and '%' in accuracy.get_ylabel()
    assert {line.get_label(): list(line.get_ydata()) for line in accuracy.lines} == {
        name: [row['eval_top1'] for row in rows] for name, rows in histories.items()}
    digits = figure.axes[3:]
    titles = [axes.get_title() for axes in digits]
    assert titles[:3] == [f'{(labels[index] + 1) % 10}, not {labels[index]}  91 %' for index in (7, 200, 359)]
    assert len(titles) == 32 and all('not' not in title and title.endswith('  91 %') for title in titles[3:])
    colours = [to_hex(axes.title.get_color()) for axes in digits]
    assert set(colours[:3]) == {'#dc2626'} and '#dc2626' not in colours[3:]
    said = figure.subfigs[1].subfigs[1].get_suptitle()
    assert '3 misclassified' in said and '99.17 %' in said


def test_first_epoch_is_the_first_that_was_good_enough():
    rows = [{'epoch': epoch, 'eval_top1': top1} for epoch, top1 in enumerate((50.0, 90.0, 80.0, 95.0), 1)]
    assert [demo_run.first_epoch(rows, least) for least in (10, 90, 90.5, 96)] == [1, 2, 4, None]


def test_photographs_are_looked_at_by_the_weights_that_ship(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, 'DEMO_DIR', tmp_path)
    overlays = demo_run.look_at_photographs()
    assert [path.stem.partition('-')[0] for path in overlays] == ['coffee', 'cat']  # a known class is first
    said = capsys.readouterr().out
    assert f'{best_release()}: its own weights' in said and said.count('  1  ') == 2
    assert said.index('coffee.png') < said.index('espresso') < said.index('cat.png')


@pytest.mark.slow
def test_demo_fails_on_low_accuracy_and_starts_afresh(tmp_path, monkeypatch, capsys):
    digits, photograph = load_digits(), tmp_path / 'photograph.png'
    Image.new('RGB', (64, 32)).save(photograph)
    monkeypatch.setattr(demo_run, 'look_at_photographs', lambda: [photograph] * 2)
    monkeypatch.setattr(demo_run, 'load_digits', lambda: Bunch(images=digits.images[:300], target=digits.target[:300]))
    monkeypatch.setattr(demo_run, 'DEMO_DIR', tmp_path)
    monkeypatch.setattr(demo_run, 'RECIPE', dataclasses.replace(
        demo_run.RECIPE, model='test_resnet', pretrained=False, model_kwargs=(), epochs=1, workers=0,
        data_dir=str(tmp_path / 'digits'), output=str(tmp_path)))
    assert demo.main() == 1  # one epoch of a tiny network cannot reach 97 %
    assert 'is below the expected 97.0 %' in capsys.readouterr().out
    assert Image.open(tmp_path / 'demo.png').size[0] > 1000

    results = tmp_path / 'results.json'
    monkeypatch.setattr(demo_run, 'MIN_ACCURACY', 0.0)
    assert demo.main(str(results)) == 0
    said, report = capsys.readouterr().out, json.loads(results.read_text())
    assert 'of 60 held-out digits correct' in said
    assert list(report['top1']) == ['pretrained', 'from random weights']
    for name, rows in report['top1'].items():
        assert len(rows) == 1 and f'{name:20}{rows[0]:7.2f}   below 90 %' in said

    train = demo_run.finetune
    monkeypatch.setattr(demo_run, 'finetune', lambda settings: {**train(settings), 'top1': 12.5})
    assert demo.main() == 1
    assert 'training reported 12.50 %' in capsys.readouterr().out
