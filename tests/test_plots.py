"""Fonts of coatnet_train/plotting, and names that are not UTF-8 in the files of runs."""
import csv
import io
import json
import os
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import eval_imagenet
import extract_features
import finetune
from coatnet_train.evaluation.evaluator import Misclassified
from coatnet_train.plotting import plots
from coatnet_train.runtime import console
from coatnet_train.runtime.cli import ConfigError, run_cli
from coatnet_train.runtime.files import write_csv, write_figure
from support.images import write_images

SHIPPED = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'


@pytest.fixture(autouse=True)
def few_fonts(monkeypatch):
    """Only the fonts that come with Matplotlib, on any machine."""
    fonts = [entry for entry in font_manager.fontManager.ttflist if Path(entry.fname).parent == SHIPPED]
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', fonts)
    console.note.cache_clear()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings('error', 'Glyph')
        yield


def draw(names: list[str], path: Path, file: str = '0.png') -> None:
    labels = torch.tensor([0, 1])
    write_figure(path, plots.confusion_figure(labels, labels, names))
    write_figure(path, plots.misclassified_figure(
        [Misclassified(0.9, 0, torch.zeros(3, 8, 8), 0, 1)], [file], names, (0.5,), (0.5,)))


def test_an_installed_font_is_found_for_names_that_the_usual_one_lacks(tmp_path, capsys):
    usual, other = (set(FT2Font(str(SHIPPED / name)).get_charmap()) for name in ('DejaVuSans.ttf', 'STIXGeneral.ttf'))
    character = next(chr(code) for code in sorted(other - usual) if chr(code).isalpha())
    draw([f'name {character}', 'dog'], tmp_path / 'plot.png')
    assert capsys.readouterr().err == '' and len(matplotlib.rcParams['font.family']) == 2
    draw(['cat', 'dog'], tmp_path / 'plot.png')
    assert len(matplotlib.rcParams['font.family']) == 2


def test_characters_that_no_font_has_are_said_once(tmp_path, capsys):
    for names in (['猫', 'dog'], ['犬', '猫']):
        draw(names, tmp_path / 'plot.png')
    assert capsys.readouterr().err.count('note: no installed font has all characters') == 1


def test_names_of_files_have_fonts_too(tmp_path, capsys):
    draw(['cat', 'dog'], tmp_path / 'plot.png', '猫.png')
    assert capsys.readouterr().err.count('note: no installed font has all characters') == 1


def test_usual_names_change_no_font(tmp_path, capsys):
    before = list(matplotlib.rcParams['font.family'])
    draw(['café', 'Ωmega\n'], tmp_path / 'plot.png')
    assert matplotlib.rcParams['font.family'] == before and capsys.readouterr().err == ''


# Names that are no UTF-8


def test_a_run_and_its_evaluation_on_names_that_are_no_utf8(tmp_path, capsys):
    data = write_images(tmp_path / os.fsdecode(b'photos\xff'), train=3, val=2)
    for split in ('train', 'val'):
        (data / split / 'red').rename(data / split / os.fsdecode(b'r\xe9d'))
    (data / 'train' / 'blue' / os.fsdecode(b'bad\xff.png')).write_bytes(b'')
    (data / 'val' / 'blue' / os.fsdecode(b'bad\xff.png')).write_bytes(b'')
    options = dict(img_size=32, batch_size=4, workers=0, device='cpu', data_dir=str(data), max_bad_images=1.0)
    run_cli('finetune.py', lambda: finetune.main(finetune.FinetuneSettings(
        model='test_resnet', epochs=1, output=str(tmp_path), experiment='run', **options)))
    run = tmp_path / 'run'
    summary = json.loads((run / 'summary.json').read_text())
    assert [Path(name).name for name in summary['unreadable']] == [r'bad\xff.png'] * 2
    names = json.loads((run / 'config.json').read_text())['label_names']
    assert names == ['blue', 'green', r'r\xe9d'] and (run / 'confusion.png').is_file()
    printed = capsys.readouterr()
    assert printed.out.count(r'bad\xff.png: cannot identify') == 2

    run_cli('eval_imagenet.py', lambda: eval_imagenet.main(eval_imagenet.EvaluationSettings(
        model=(f'local-dir:{run}',), output=str(tmp_path / 'eval'), results_file=str(tmp_path / 'table.csv'),
        **options)))
    (classes,) = (tmp_path / 'eval').rglob('classes.csv')
    with pytest.raises(ConfigError, match=r'--output .*photos\\xff/run must be a path in UTF-8'):
        finetune.main(finetune.FinetuneSettings(model='test_resnet', output=str(data), experiment='run', **options))
    with pytest.raises(ConfigError, match=r'--output .*photos\\xff must be a path in UTF-8'):
        extract_features.main(extract_features.ExtractionSettings(model='test_resnet', output=str(data), **options))
    with classes.open(encoding='utf-8') as file:
        assert [row['class'] for row in csv.DictReader(file)] == ['blue', 'green', r'r\xe9d']
    assert r'photos\udcff' in (tmp_path / 'table.csv').read_text(encoding='utf-8')


def test_csv_and_console_take_any_name(tmp_path, monkeypatch):
    write_csv(tmp_path / 'a.csv', [{'name': os.fsdecode(b'caf\xe9'), 'number': 1}])
    assert (tmp_path / 'a.csv').read_text(encoding='utf-8') == 'name,number\ncaf\\udce9,1\n'
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(buffer, encoding='utf-8'))
    run_cli('a.py', lambda: print(os.fsdecode(b'caf\xe9'), flush=True))
    assert buffer.getvalue() == b'caf\\udce9\n'
