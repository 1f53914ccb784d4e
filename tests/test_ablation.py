"""scripts/ablation.py: rows can be built, finished runs are read back, and the table agrees with the runs."""
import csv
import json
from pathlib import Path

import pytest
import timm

import ablation
import finetune
from coatnet_train.experiments import ablation as ablation_run
from coatnet_train.experiments import ablation_config as ablation_settings
from coatnet_train.runtime.cli import ConfigError, parse_argument


@pytest.fixture
def runs(monkeypatch) -> list[finetune.FinetuneSettings]:
    """Replace training by a stub that writes a run's files; top-1 falls in the last epoch and depends on the seed.

    Returns the list of settings with which it was called.
    """
    seen = []

    def train(settings: finetune.FinetuneSettings) -> None:
        seen.append(settings)
        folder = Path(settings.output) / settings.experiment
        folder.mkdir(parents=True)
        rows = [dict(epoch=epoch, eval_top1=top1 + settings.seed, eval_loss=1.) for epoch, top1 in ((1, 60.), (2, 50.))]
        with (folder / 'metrics.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (folder / 'summary.json').write_text('{}')

    monkeypatch.setattr(ablation_run, 'finetune', train)
    return seen


def settings(folder: Path, **changes) -> ablation.AblationSettings:
    return ablation.AblationSettings(**{
        'data_dir': 'images', 'rows': ('LLLL', 'DDDD glu=False'), 'output': str(folder / 'runs'), 'device': 'cpu',
        'results_file': str(folder / 'ablation.json'), 'img_size': 64, **changes})


@pytest.mark.parametrize('row', ablation_settings.GRIDS['full'])
def test_every_row_of_the_full_grid_can_be_built(row):
    options = ablation_run.model_kwargs(ablation.AblationSettings('images'), row)
    kwargs = dict(map(parse_argument, options))
    model = timm.create_model('coatnet_pico', img_size=64, device='meta', **kwargs)
    assert model.cfg.layout == row.split()[0]
    for key, value in kwargs.items():
        assert getattr(model.cfg, key) == value


def test_grids_hold_what_they_promise():
    grids = ablation_settings.GRIDS
    assert set(ablation_settings.LAYOUTS) < set(grids['cpu']) < set(grids['full'])
    assert len(grids['cpu']) == 12 and len(set(grids['full'])) == len(grids['full'])


def test_table_is_of_the_last_epoch_over_all_seeds(tmp_path, runs):
    report = ablation.main(settings(tmp_path, seeds=(1, 3)))
    row = report['rows']['LLLL']
    assert [run['top1'] for run in row['runs']] == [51, 53] and row['top1'] == 52
    assert row['standard_error'] == pytest.approx(1) and row['images_per_second'] == 'not measured'
    assert json.loads((tmp_path / 'ablation.json').read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / 'ablation.png').stat().st_size > 1000
    assert [run.experiment for run in runs] == [
        'LLLL-seed1', 'DDDD-glu-False-seed1', 'LLLL-seed3', 'DDDD-glu-False-seed3']
    assert runs[1].model_kwargs[-2:] == ('layout=DDDD', 'glu=False') and runs[1].resume == 'auto'
    assert len({(run.lr, run.epochs, run.batch_size, run.scale) for run in runs}) == 1


def test_finished_runs_are_not_run_again(tmp_path, runs):
    ablation.main(settings(tmp_path))
    again = ablation.main(settings(tmp_path, rows=('LLLL', 'CCCC'), seeds=(1,)))
    assert [(run.experiment, run.seed) for run in runs[2:]] == [('LLLL-seed1', 1), ('CCCC-seed1', 1)]
    assert {row: [run['seed'] for run in cells['runs']] for row, cells in again['rows'].items()} == {
        'LLLL': [0, 1], 'CCCC': [1], 'DDDD glu=False': [0]}
    assert again['settings']['seeds'] == [0, 1]
    assert json.loads((tmp_path / 'ablation.json').read_text()) == json.loads(json.dumps(again))


def test_each_run_says_where_and_when_it_was_made(tmp_path, runs, monkeypatch):
    ablation.main(settings(tmp_path))
    monkeypatch.setattr(ablation_run, 'provenance', lambda device: dict(hardware='new', commit='c', date='d'))
    rows = ablation.main(settings(tmp_path, seeds=(0, 1)))['rows']
    first, second = rows['LLLL']['runs']
    assert first['hardware'] != 'new' and second['hardware'] == 'new' and second['date'] == 'd'


def test_other_settings_are_not_mixed_into_a_results_file(tmp_path, runs):
    ablation.main(settings(tmp_path))
    with pytest.raises(ConfigError, match=r'--epochs was 10 and is 5; --lr was 0.001 and is 0.002\. Give another file'):
        ablation.main(settings(tmp_path, epochs=5, lr=2e-3, seeds=(1,)))
    assert len(runs) == 2


def test_one_seed_has_no_standard_error(tmp_path, runs):
    assert ablation.main(settings(tmp_path))['rows']['LLLL']['standard_error'] == 'not measured'


def test_speed_is_added_to_what_was_trained(tmp_path, runs, monkeypatch):
    ablation.main(settings(tmp_path))
    monkeypatch.setattr(ablation_run.benchmark_models, 'images_per_second', lambda step, timing: step() or 7.)
    report = ablation.main(settings(tmp_path, speed=True, batch_size=1))
    assert report['rows']['DDDD glu=False']['images_per_second'] == 7 and report['rows']['LLLL']['top1'] == 50
    assert report['speed']['batch_size'] == 1 and report['settings']['batch_size'] == 64


def test_speed_needs_trained_rows(tmp_path):
    with pytest.raises(ConfigError, match='--speed needs a --results-file with trained rows'):
        ablation.main(settings(tmp_path, speed=True))
    with pytest.raises(ConfigError, match='its folder does not exist; make it first'):
        ablation.main(settings(tmp_path, results_file=str(tmp_path / 'none' / 'ablation.json')))
