"""scripts/compare_recipes.py: drawn images, recorded rows, and reuse of finished rows."""
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

import compare_recipes
import finetune
from coatnet_train.experiments import compare_recipes as compare_recipes_run
from coatnet_train.experiments import small_sets
from coatnet_train.experiments.compare_recipes_config import CompareRecipesSettings
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training import recipes


def write_classes(folder: Path, names: list[str], count: int) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new('RGB', (8, 8)).save(folder / name / f'{name}-{index}.png')
        (folder / name / 'Thumbs.db').write_text('no image')
    return folder


@pytest.fixture
def settings(tmp_path) -> CompareRecipesSettings:
    imagenette = write_classes(tmp_path / 'imagenette', list('abcde'), 52)
    samples = write_classes(tmp_path / 'samples', ImageNetInfo('imagenet-1k').label_names()[:400], 1)
    write_classes(tmp_path / 'samples', ImageNetInfo('imagenet-1k').label_names()[923:966], 1)
    return CompareRecipesSettings(
        imagenette=str(imagenette), samples=str(samples), seeds=(0, 1), output=str(tmp_path / 'out'),
        models=('lightconvnet_pico_64.dist_tin200',), results_file=str(tmp_path / 'recipes.json'))


@pytest.fixture
def runs(monkeypatch) -> list[finetune.FinetuneSettings]:
    """Replace training by a stub that scores higher with the recipe; returns the list of settings that it was given."""
    made = []

    def train(settings: finetune.FinetuneSettings) -> dict:
        made.append(settings)
        run_dir = Path(settings.output) / settings.experiment
        run_dir.mkdir(parents=True)
        (run_dir / 'args.json').write_text(json.dumps(dict(batch_size=settings.batch_size, epochs=settings.epochs)))
        return dict(top1=60.0 + settings.seed + 10 * (settings.batch_size is None), loss=1.0, train_seconds=2.0)

    monkeypatch.setattr(compare_recipes_run, 'finetune', train)
    return made


def files_of(folder: Path) -> dict[str, set[str]]:
    return {split: {path.name for path in (folder / split).glob('*/*')} for split in ('train', 'validation')}


def test_seeds_draw_other_images_and_none_is_in_both_splits(settings, tmp_path):
    for name, train, held_out, classes in (
            ('digits', 100, 500, 10), ('imagenette_60', 60, 200, 5), ('imagenet_groups', 200, 199, 6)):
        draws = []
        for folder, seed in (('first', 0), ('again', 0), ('other', 1)):
            small_sets.MAKERS[name][0](settings, tmp_path / name / folder, seed)
            draws.append(files_of(tmp_path / name / folder))
        first, again, other = draws
        assert first == again and first['train'] != other['train']
        assert not first['train'] & first['validation'] and 'Thumbs.db' not in first['train'] | first['validation']
        assert abs(len(first['train']) - train) < 10 and abs(len(first['validation']) - held_out) < 10
        assert len(list((tmp_path / name / 'first' / 'train').iterdir())) == classes
        with Image.open(next((tmp_path / name / 'first' / 'validation').glob('*/*'))) as image:  # links are not broken
            image.load()


def test_table_rows_and_plot_and_finished_rows_stay(settings, runs, monkeypatch):
    report = compare_recipes.main(settings)
    assert len(runs) == len(report['rows']) == 3 * 1 * 2 * 2
    assert all(run.val_interval > 1000 and run.pretrained and not run.amp for run in runs)  # the last epoch counts
    assert {run.bn_momentum for run in runs if run.batch_size is None} == {recipes.RECIPES['small_data']['bn_momentum']}
    cells = report['table']['imagenette_60']['lightconvnet_pico_64.dist_tin200']
    assert cells['defaults'] == dict(top1=60.5, deviation=pytest.approx(0.5 ** 0.5), seeds=2)
    assert cells['small_data']['top1'] == 70.5
    row = report['rows'][0]
    assert (row['images'], row['held_out'], row['epochs']) == (100, 500, 10) and row['hardware'] and row['commit']
    assert Path(settings.results_file).with_suffix('.png').stat().st_size > 10_000

    runs.clear()
    assert compare_recipes.main(settings)['rows'] == json.loads(Path(settings.results_file).read_text())['rows']
    assert not runs
    compare_recipes.main(dataclasses.replace(settings, seeds=(2,), sets=('digits',)))
    assert len(runs) == 2 and len(json.loads(Path(settings.results_file).read_text())['rows']) == 14
    compare_recipes.main(dataclasses.replace(settings, seeds=(2,), sets=('digits',), recipes=('linear_probe',)))
    written = json.loads(Path(settings.results_file).read_text())
    assert list(written['recipes']) == ['linear_probe', 'defaults', 'small_data'] and len(written['rows']) == 15
    monkeypatch.setitem(recipes.RECIPES, 'small_data', recipes.RECIPES['small_data'] | dict(lr=1.0))
    with pytest.raises(ConfigError, match='rows of another --recipes small_data, with other lr'):
        compare_recipes.main(settings)


def test_defaults_are_no_recipe():
    assert compare_recipes_run.recipe_of('defaults', 'test_resnet') == {'amp': False}


@pytest.mark.parametrize('changes, message', [
    (dict(sets=('flowers',)), '--sets must be of digits, '), (dict(recipes=('x',)), '--recipes must be of defaults, '),
    (dict(seeds=()), '--seeds must name at least one'), (dict(imagenette=''), '--imagenette must be a folder'),
    (dict(samples='no/where'), '--samples must be a folder for --sets imagenet_groups'),
    (dict(threads=0), '--threads must be from 1')])
def test_bad_settings_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        compare_recipes.check_values(dataclasses.replace(settings, **changes))


def test_folders_without_enough_images_are_refused(settings, tmp_path):
    settings = dataclasses.replace(settings, imagenette=settings.samples, samples=settings.imagenette)
    with pytest.raises(ConfigError, match=r'--imagenette .* must hold 5 classes of at least 52 images'):
        small_sets.MAKERS['imagenette_60'][0](settings, tmp_path / 'x', 0)
    with pytest.raises(ConfigError, match=r'--samples .* must hold an image of most classes of ImageNet'):
        small_sets.MAKERS['imagenet_groups'][0](settings, tmp_path / 'y', 0)
