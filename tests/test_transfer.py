"""scripts/transfer.py: drawn subsets, compared methods, and reuse of finished rows."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import finetune
import transfer
from coatnet_train.experiments import transfer as transfer_run
from coatnet_train.runtime.cli import ConfigError
from support.images import write_images


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(Image folder, run folder of a model trained on it)."""
    folder = tmp_path_factory.mktemp('transfer')
    data = write_images(folder / 'colours')
    finetune.main(finetune.FinetuneSettings(
        data_dir=str(data), model='test_resnet', img_size=32, epochs=12, batch_size=12, lr=3e-3, workers=0,
        device='cpu', output=str(folder), experiment='run', color_jitter=0.0, scale=(0.6, 1.0)))
    return data, folder / 'run'


@pytest.fixture
def settings(trained, tmp_path) -> transfer.TransferSettings:
    data, run = trained
    return transfer.TransferSettings(
        data_dir=str(data), model=f'local-dir:{run}', fractions=(0.5, 1.0), subsets=(2, 1), updates=(4, 6),
        batch_size=6, workers=0, device='cpu', output=str(tmp_path / 'out'),
        results_file=str(tmp_path / 'transfer.json'))


def test_draws_are_even_different_and_repeatable():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    first = transfer_run.draw(labels, 0.1, 0)
    assert np.bincount(labels[first]).tolist() == [10, 5, 2] and len(set(first)) == 17  # at least two of a class
    assert np.array_equal(first, transfer_run.draw(labels, 0.1, 0))
    assert not np.array_equal(first, transfer_run.draw(labels, 0.1, 1))
    assert np.array_equal(transfer_run.draw(labels, 1.0, 3), np.arange(160))


def test_pretrained_weights_win_and_rows_are_kept(settings, monkeypatch):
    report = transfer.main(settings)
    for method in transfer_run.METHODS:
        assert [row['images'] for row in report['rows'] if row['method'] == method] == [18, 18, 36]
    assert all(row['hardware'] == report['hardware'] and row['date'] == report['date'] for row in report['rows'])
    table = report['table']
    assert table['fine-tuned']['0.5']['top1'] > table['random start']['0.5']['top1'] + 10
    assert table['linear probe']['1.0']['top1'] > 80 and table['fine-tuned']['1.0']['deviation'] == 'not measured'
    assert Path(settings.results_file).with_suffix('.png').stat().st_size > 10_000

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(transfer_run, 'finetune', never)
    monkeypatch.setattr(transfer_run, 'read_features', never)
    assert transfer.main(settings)['rows'] == report['rows'] == json.loads(
        Path(settings.results_file).read_text())['rows']


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'subsets': (2,)}, '--subsets must give a number of at least 1 for each of --fractions'),
    ({'updates': (4, 6, 8)}, '--updates must give a number of at least 1 for each of --fractions'),
    ({'fractions': (0.5, 2.0)}, '--fractions must be above 0 and at most 1'),
    ({'updates': (4, 0)}, '--updates must give a number of at least 1 for each of --fractions'),
    ({'batch_size': 0}, '--batch-size must be at least 1, got 0'),
    ({'methods': ('prayer',)}, "--methods must be of fine-tuned, linear probe, random start, got 'prayer'"),
    ({'methods': ()}, '--methods must name at least one of fine-tuned, linear probe, random start, got none'),
    ({'workers': -1}, '--workers must be at least 0, got -1'),
    ({'output': __file__}, f'--output {__file__} cannot be made'),
    ({'model': 'nope'}, '--model nope is not a name'),
    ({'model': 'local-dir:/no/such'}, '--model local-dir:/no/such must be a folder with config.json and weights'),
    ({'model': 'coatnet_0'}, '--model coatnet_0 cannot be built'),
    ({'results_file': 'curve.png'}, "--results-file must end in .json, got 'curve.png'"),
    ({'results_file': 'no/such/file.json'}, '--results-file no/such/file.json: its folder does not exist'),
])
def test_bad_settings_are_refused(settings, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        transfer.main(dataclasses.replace(settings, **changes))


def test_rows_of_other_settings_are_refused(settings):
    settings = dataclasses.replace(settings, methods=('linear probe',), subsets=(1, 1))
    first = transfer.main(settings)
    more = transfer.main(dataclasses.replace(settings, subsets=(2, 1), workers=1))
    assert len(more['rows']) == len(first['rows']) + 1  # more draws, or other --workers, reuse finished rows
    # a command for other rows keeps these in the table and in the settings
    other = transfer.main(dataclasses.replace(
        settings, methods=('fine-tuned',), fractions=(0.5,), subsets=(1,), updates=settings.updates[:1]))
    assert other['table'].pop('fine-tuned').keys() == {'0.5'} and other['table'] == more['table']
    assert other['settings']['updates'] == settings.updates and len(other['settings']['methods']) == 2
    for changes, said in (({'model': 'local-dir:other'}, "--model was 'local-dir:.*' and is 'local-dir:other'"),
                          ({'updates': (4, 7)}, '--updates was 6 and is 7 for fraction 1'),
                          ({'lr': 1.0}, '--lr was 0.0005 and is 1.0')):
        with pytest.raises(ConfigError, match=said):
            transfer.main(dataclasses.replace(settings, **changes))
