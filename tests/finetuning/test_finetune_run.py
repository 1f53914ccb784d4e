"""scripts/finetune.py: files of a run, and the command line."""
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_data_config

import finetune
from coatnet_train.plotting import plots
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training import recipes, trainer
from coatnet_train.training import run as training_run
from support.closeness import assert_same_up_to_rounding
from support.commands import run_main
from support.constants import CLASSES
from support.finetune_runs import assert_everything_loads, read_checkpoint, read_metrics, run, run_command


def test_run_leaves_a_loadable_model_with_its_own_classes_and_data_settings(settings):
    base = timm.create_model('test_resnet').pretrained_cfg
    assert base['tag'] and base['crop_pct'] != 0.9  # otherwise a leak would pass the checks below
    run_dir = run(settings, epochs=1, mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.2), crop_pct=0.9)

    model = timm.create_model(f'local-dir:{run_dir}', pretrained=True).eval()
    config = json.loads((run_dir / 'config.json').read_text())
    assert config['label_names'] == list(CLASSES) == model.pretrained_cfg['label_names']
    assert model.num_classes == config['num_classes'] == 3
    assert not {'tag', 'license', 'origin_url', 'test_crop_pct', 'test_input_size', 'hf_hub_id'} & {
        *config, *config['pretrained_cfg']}
    data_config = resolve_data_config(model=model, use_test_size=True)
    assert data_config['input_size'] == (3, 32, 32) or data_config['input_size'] == [3, 32, 32]
    assert tuple(data_config['mean']) == (0.4, 0.5, 0.6) and tuple(data_config['std']) == (0.3, 0.3, 0.2)
    assert data_config['crop_pct'] == 0.9

    trained = timm.create_model('test_resnet', num_classes=3).eval()
    trained.load_state_dict(read_checkpoint(run_dir)['state_dict'])
    val_set = create_dataset(
        '', root=f'{settings.data_dir}/val', search_split=False, transform=create_transform(**data_config))
    images, labels = torch.utils.data.default_collate([val_set[index] for index in range(len(val_set))])
    with torch.no_grad():
        logits = model(images)
        assert_same_up_to_rounding(logits, trained(images))
        assert logits.std() > 0
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['top1'] == 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    assert summary['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)


@pytest.mark.draws_figures
def test_run_folder_is_complete_and_readable(settings):
    run_dir = run(settings)
    for name in ('confusion.png', 'curves.png', 'misclassified.png'):
        assert min(Image.open(run_dir / name).size) > 300
    assert {path.relative_to(run_dir).as_posix() for path in run_dir.rglob('*') if path.is_file()} == {
        'args.json', 'config.json', 'confusion.png', 'curves.png', 'last/checkpoint.pt', 'metrics.csv',
        'misclassified.png', 'model.safetensors', 'predictions.csv', 'summary.json'}
    assert assert_everything_loads(run_dir) == 10
    assert json.loads((run_dir / 'args.json').read_text())['lr'] == settings.lr
    with safe_open(run_dir / 'model.safetensors', 'pt') as weights:
        assert weights.metadata() == {'format': 'pt'}

    history, summary = read_metrics(run_dir), json.loads((run_dir / 'summary.json').read_text())
    assert [row['epoch'] for row in history] == [1, 2]
    best = max(history, key=lambda row: (row['eval_top1'], -row['eval_loss']))
    assert (summary['best_epoch'], summary['top1'], summary['loss']) == (
        best['epoch'], best['eval_top1'], best['eval_loss'])
    assert summary['torch'] == torch.__version__ and summary['seed'] == settings.seed
    assert history[0]['lr'] > history[1]['lr'] > settings.min_lr


@pytest.mark.parametrize(('seconds', 'rows'), [(0, [1, 2, 2]), (1000, [2])], ids=['every_epoch', 'only_at_the_end'])
def test_curves_are_drawn_after_some_time_and_at_the_end(settings, monkeypatch, seconds, rows):
    drawn = []

    def write_curves(run_dir: Path, history: list[dict]) -> None:
        assert len(read_metrics(run_dir)) == len(history)
        drawn.append(len(history))

    monkeypatch.setattr(trainer, 'write_curves', write_curves)
    monkeypatch.setattr(trainer, 'CURVES_SECONDS', seconds)
    run(settings)
    assert drawn == rows


def test_closing_line_loads_the_model_as_it_stands(settings, capsys):
    run_dir = run(settings, epochs=1, experiment='it\'s "my" run')
    said, line = capsys.readouterr().out.splitlines()[-2:]
    assert said.endswith('Load it with') and line.startswith('import timm, coatnet_zoo; ')
    names = {}
    exec(line, names)  # as a user pastes it
    assert load_file(run_dir / 'model.safetensors').keys() == names['model'].state_dict().keys()
    assert names['model'].pretrained_cfg['label_names'] == list(CLASSES)


def test_held_out_predictions_have_names_and_are_those_of_the_best_epoch(settings, monkeypatch):
    figures = {}
    monkeypatch.setattr(training_run, 'misclassified_figure', lambda *args: figures.update(files=args[1], wrong=args[0])
                        or plots.misclassified_figure(*args))
    run_dir = run(settings, epochs=3)
    with (run_dir / 'predictions.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ['file', 'label', 'prediction', 'confidence'] and len(rows) == 15
    model = timm.create_model(f'local-dir:{run_dir}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    for row in rows:
        path = Path(row['file'])
        assert path.is_relative_to(f'{settings.data_dir}/val') and path.parent.name == row['label']
        with torch.no_grad():
            shares = model(transform(Image.open(path).convert('RGB'))[None])[0].softmax(-1)
        assert CLASSES[shares.argmax()] == row['prediction']
        assert float(row['confidence']) == pytest.approx(shares.max().item(), abs=1e-4)
    wrong = [row for row in rows if row['label'] != row['prediction']]
    assert 0 < len(wrong) < 15 and 100 * (1 - len(wrong) / 15) == pytest.approx(
        json.loads((run_dir / 'summary.json').read_text())['top1'])
    assert {Path(row['file']).name for row in wrong} == {*figures['files']} and len(wrong) == len(figures['wrong'])
    for name, item in zip(figures['files'], figures['wrong'], strict=True):
        file = Path(rows[item.index]['file'])
        assert file.name == name
        assert torch.allclose(item.image, transform(Image.open(file).convert('RGB')), atol=1e-6)


def test_model_learns_the_colours(settings):
    run_dir = run(settings, epochs=12, color_jitter=0.0, scale=(0.6, 1.0), lr=3e-3)
    assert json.loads((run_dir / 'summary.json').read_text())['top1'] > 90


# The command line


def test_help_explains_each_setting():
    result = run_command('--help', columns=100)  # a wider help has groups in columns
    assert result.returncode == 0
    for field in dataclasses.fields(finetune.FinetuneSettings):
        shown = f'--{field.name.replace("_", "-")} ' in result.stdout or f'--no-{field.name}'.replace('_', '-') in (
            result.stdout)
        assert shown == (field.name != 'amp_if_native'), field.name  # a field that only recipes set
    said = ' '.join(result.stdout.replace('│', ' ').split())  # lines break anywhere
    for text in ('Label smoothing.', 'Processes that read images', '(default: adamw)', '--amp, --no-amp'):
        assert text in said


def test_command_trains_and_a_bad_one_ends_with_code_2(settings, monkeypatch, capsys):
    arguments = ['--data-dir', settings.data_dir, '--model', 'test_resnet', '--img-size', '32', '--epochs', '1',
                 '--batch-size', '8', '--workers', '0', '--no-channels-last', '--scale', '0.5', '1.0', '--model-kwargs',
                 'zero_init_last=False', '--output', settings.output]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    assert 'epoch   1/1' in result.stdout and '\r' not in result.stdout + result.stderr  # no bar in a log
    assert assert_everything_loads(Path(settings.output) / 'test_resnet') == 10
    assert run_main(monkeypatch, 'finetune.py', *arguments) == 2
    said = capsys.readouterr()
    assert said.out == '' and said.err.startswith('finetune.py: --output') and said.err.count('\n') == 1


# Recipes


@pytest.mark.parametrize('recipe', recipes.RECIPES)
def test_recipe_holds_settings_that_can_work(recipe):
    found = recipes.recipe_settings(recipe, 'coatnet_0')
    teacher = 'a_teacher' if 'kd_loss_weight' in found else ''
    finetune.check_values(finetune.FinetuneSettings(model='coatnet_0', data_dir='images', teacher=teacher, **found))


def test_recipe_with_a_teacher_does_not_train_from_labels_alone():
    arguments = ['--recipe', 'tin200_dist', '--data-dir', 'images', '--model', 'coatnet_pico_64']
    with pytest.raises(ConfigError, match=r'--recipe tin200_dist sets --kd-loss-weight 0\.9 and needs a teacher'):
        finetune.check_values(finetune.read_settings(arguments))
    with pytest.raises(ConfigError, match=r'The command line sets --kd-temperature 3\.0 and needs a teacher'):
        finetune.check_values(finetune.read_settings([*arguments[2:], '--kd-temperature', '3']))


def test_recipe_is_taken_from_the_command_line_and_flags_win():
    arguments = ['--data-dir', 'imagenet', '--model', 'coatnet_1', '--lr', '0.002']
    for flags in (['--recipe', 'coatnet_in1k'], ['--recipe=coatnet_in1k']):
        settings = finetune.read_settings([*arguments, *flags])
        assert (settings.epochs, settings.mixup, settings.aa, settings.drop_path) == (300, 0.8, 'rand-m15-n2', 0.3)
        assert (settings.lr, settings.lr_base_size, settings.weight_decay) == (0.002, 4096, 0.05)
    larger = finetune.read_settings([*arguments[:4], '--recipe', 'coatnet_in1k_384'])
    assert (larger.img_size, larger.epochs, larger.lr, larger.min_lr, larger.model_ema) == (384, 30, 5e-5, 5e-5, True)
    expected = finetune.FinetuneSettings(data_dir='imagenet', model='coatnet_1', lr=0.002)
    assert finetune.read_settings(arguments) == expected
    with pytest.raises(ConfigError, match=r'--recipe must be one of coatnet_in1k, .*, got .coatnet.'):
        finetune.read_settings([*arguments, '--recipe', 'coatnet'])


@pytest.mark.parametrize('recipe', ['coatnet_in1k', 'coatnet_in1k_384', 'finetune_small', 'linear_probe'])
def test_recipe_runs_from_one_command(settings, recipe):
    small = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)', 'stem_width=16')
    chosen = finetune.read_settings([
        '--recipe', recipe, '--model', 'coatnet_0', '--data-dir', settings.data_dir, '--output', settings.output,
        '--experiment', 'run', '--model-kwargs', *small, '--img-size', '32', '--epochs', '1', '--warmup-epochs', '0',
        '--batch-size', '12', '--workers', '0', '--device', 'cpu'])
    finetune.main(chosen)
    assert assert_everything_loads(Path(settings.output) / 'run') == 10
