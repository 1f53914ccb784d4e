"""scripts/compare_runs.py: comparison of runs of one recipe, and rejection of others."""
import json
import shutil
from pathlib import Path

import pytest
import timm
from PIL import Image

import compare_runs
import finetune
from coatnet_train.experiments import compare_runs as comparison
from coatnet_train.runtime.cli import ConfigError
from support.commands import run_main
from support.images import write_images


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> list[str]:
    """Two finished runs of one epoch."""
    root = tmp_path_factory.mktemp('runs')
    write_images(root / 'data', ('a', 'b'), train=3, val=3)
    for model in ('test_resnet', 'test_vit'):
        finetune.main(finetune.FinetuneSettings(
            data_dir=str(root / 'data'), model=model, img_size=32, epochs=1, workers=0, device='cpu', batch_size=4,
            output=str(root)))
    return [str(root / 'test_resnet'), str(root / 'test_vit')]


def test_runs_stand_side_by_side_with_what_they_reached(runs, tmp_path, capsys):
    report = compare_runs.main(compare_runs.CompareRunsSettings(
        runs=tuple(runs), results_file=str(tmp_path / 'two.json')))
    assert json.loads((tmp_path / 'two.json').read_text()) == json.loads(json.dumps(report))
    printed = capsys.readouterr().out
    for folder in map(Path, runs):
        summary = json.loads((folder / 'summary.json').read_text())
        run = report['runs'][folder.name]
        assert run['summary'] == summary and run['metrics'][-1]['eval_top1'] == summary['top1']
        model = timm.create_model(f'local-dir:{folder}', pretrained=False)
        assert run['parameters'] == sum(p.numel() for p in model.parameters())
        assert f'{folder.name:28} top-1 after the last epoch {summary["top1"]:6.2f} %' in printed
    assert Image.open(tmp_path / 'two.png').size[0] > 500
    assert report['recipe']['epochs'] == 1 and 'model' not in report['recipe']


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(runs[1], other)
    args = json.loads((other / 'args.json').read_text())
    (other / 'args.json').write_text(json.dumps(args | {'lr': 0.5, 'seed': 1}))
    for settings, message in (
            (dict(runs=(runs[0], str(other))),
             r'of test_resnet \| other differ lr: 0\.0005 \| 0\.5, seed: 42 \| 1; .*--allow-different'),
            (dict(runs=(runs[0], f'{runs[0]}/../test_resnet')), 'different folders, .*named twice'),
            (dict(runs=(runs[0],)), 'two to 5 run folders, got 1; give folders'),
            (dict(runs=(runs[0], str(tmp_path))), 'has no summary.json'),
            (dict(runs=tuple(runs), results_file='two.csv'), r'must end in \.json, got two\.csv')):
        with pytest.raises(ConfigError, match=message):
            compare_runs.main(compare_runs.CompareRunsSettings(**settings))


def test_folders_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for paths, names in (
            (('a/x', 'b/y'), ['x', 'y']), (('a/x', 'b/x', 'b/y'), ['a/x', 'b/x', 'b/y']),
            (('x', 'a/x'), [f'{tmp_path.name}/x', 'a/x']), (('a/b/x', 'c/b/x'), ['a/b/x', 'c/b/x'])):
        assert comparison.name_runs(tuple(map(Path, paths))) == names


def test_other_recipes_are_compared_on_request_and_what_differs_is_listed(runs, tmp_path, capsys):
    """The runs have the same model, other settings, and folders of the same name."""
    other = tmp_path / 'slow' / 'test_resnet'
    shutil.copytree(runs[0], other)
    args = json.loads((other / 'args.json').read_text())
    (other / 'args.json').write_text(json.dumps(args | {'lr': 0.5, 'new_setting': 3}))
    report = compare_runs.main(compare_runs.CompareRunsSettings(runs=(runs[0], str(other)), allow_different=True))
    first, second = report['runs']
    assert second == 'slow/test_resnet' and first == str(Path(*Path(runs[0]).parts[-2:]))
    assert report['different'] == {'lr': [0.0005, 0.5], 'new_setting': [None, 3]}
    assert not {'lr', 'new_setting'} & {*report['recipe']} and report['recipe']['seed'] == 42
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        f'NOT of one recipe: {first} | slow/test_resnet', '  lr: 0.0005 | 0.5', '  new_setting: None | 3']
    assert [line.split()[0] for line in printed[3:]] == [first, second]


def test_run_that_cannot_be_read_is_refused(runs, tmp_path):
    def broken(name: str, content: str) -> str:
        folder = tmp_path / f'broken {content[:5]}'
        shutil.copytree(runs[1], folder)
        (folder / name).write_text(content)
        return str(folder)

    for name, content, message in (
            ('args.json', '{', 'cannot be read'), ('metrics.csv', 'epoch\nfirst\n', 'cannot be read'),
            ('config.json', '{}', r'its config\.json does not give the model'),
            ('metrics.csv', 'epoch\n', 'an epoch in metrics.csv'), ('summary.json', '{"top1": 1}', 'train it again')):
        with pytest.raises(ConfigError, match=message) as error:
            compare_runs.main(compare_runs.CompareRunsSettings(runs=(runs[0], broken(name, content))))
        assert '\n' not in str(error.value)
        shutil.rmtree(tmp_path / f'broken {content[:5]}')


def test_results_file_is_written_into_a_new_folder_or_refused(runs, tmp_path):
    compare_runs.main(compare_runs.CompareRunsSettings(
        runs=tuple(runs), results_file=str(tmp_path / 'new' / 'two.json')))
    assert {path.name for path in (tmp_path / 'new').iterdir()} == {'two.json', 'two.png'}
    with pytest.raises(ConfigError, match=r'--results-file .* cannot be written: .*choose another'):
        compare_runs.main(compare_runs.CompareRunsSettings(
            runs=tuple(runs), results_file=str(tmp_path / 'new' / 'two.png' / 'a.json')))


def test_help_shows_a_command_that_can_be_copied(monkeypatch, capsys):
    assert run_main(monkeypatch, 'compare_runs.py', '--help') == 0
    assert ' \\\n        --results-file' in capsys.readouterr().out
