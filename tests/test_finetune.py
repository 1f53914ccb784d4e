"""scripts/finetune.py on a tiny network and generated pictures: what it writes, repeats, resumes and refuses."""
import csv
import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import finetune
import numpy as np
import pytest
import run_folder
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import random_seed

ROOT = Path(__file__).parents[1]

CLASSES = ('blue', 'green', 'red')


def write_pictures(folder: Path, classes=CLASSES, train: int = 12, val: int = 5) -> Path:
    """Write noisy pictures whose colour tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 150, (36, 40, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture
def settings(pictures, tmp_path) -> finetune.Settings:
    return finetune.Settings(
        data_dir=str(pictures), model='test_resnet', img_size=32, epochs=2, batch_size=8, lr=1e-3, warmup_epochs=0.5,
        workers=0, device='cpu', output=str(tmp_path), experiment='run')


def run(settings: finetune.Settings, **changes) -> Path:
    """Fine-tune and return the run folder."""
    settings = dataclasses.replace(settings, **changes)
    finetune.main(settings)
    return Path(settings.output) / settings.experiment


def read_checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / 'last' / 'checkpoint.pt', weights_only=True)


def read_metrics(run_dir: Path) -> list[dict]:
    """Read metrics.csv without the speed, which no two runs share."""
    with (run_dir / 'metrics.csv').open() as file:
        return [{key: float(value) for key, value in row.items() if key != 'images_per_second'}
                for row in csv.DictReader(file)]


def assert_same_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and len(first) > 10
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def assert_same_run(first: Path, second: Path) -> None:
    assert_same_tensors(load_file(first / 'model.safetensors'), load_file(second / 'model.safetensors'))
    assert_same_tensors(read_checkpoint(first)['state_dict'], read_checkpoint(second)['state_dict'])
    assert read_metrics(first) == read_metrics(second) != []


def assert_everything_loads(run_dir: Path) -> int:
    """Open each file that has its final name, and return how many there are."""
    loaders = {
        '.json': lambda path: json.loads(path.read_text()), '.csv': lambda path: read_metrics(path.parent)[0],
        '.png': lambda path: Image.open(path).load(), '.safetensors': load_file,
        '.pt': lambda path: torch.load(path, weights_only=True)}
    files = [path for path in run_dir.rglob('*') if path.is_file() and not path.name.startswith('.')]
    for path in files:
        loaders[path.suffix](path)
    return len(files)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the script may catch it."""


# What a run leaves


def test_run_leaves_a_loadable_model_with_its_own_classes_and_data_settings(settings):
    base = timm.create_model('test_resnet').pretrained_cfg
    assert base['tag'] and base['crop_pct'] != 0.9  # or the checks below would pass with a leak
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
        assert torch.equal(logits, trained(images)) and logits.std() > 0
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['top1'] == 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    assert summary['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)


def test_run_folder_is_complete_and_readable(settings):
    run_dir = run(settings)
    assert {path.relative_to(run_dir).as_posix() for path in run_dir.rglob('*') if path.is_file()} == {
        'args.json', 'config.json', 'curves.png', 'last/checkpoint.pt', 'metrics.csv', 'model.safetensors',
        'summary.json'}
    assert assert_everything_loads(run_dir) == 7
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


def test_model_learns_the_colours(settings):
    run_dir = run(settings, epochs=12, color_jitter=0.0, scale=(0.6, 1.0), lr=3e-3)
    assert json.loads((run_dir / 'summary.json').read_text())['top1'] > 90


# The same again, and the rest after an interruption


@pytest.mark.parametrize('workers', [0, 1])
def test_same_seed_gives_same_weights_and_another_seed_does_not(settings, workers):
    first, second, other = (
        run(settings, experiment=name, seed=seed, workers=workers, drop=0.2, reprob=0.3, aa='rand-m5-inc1')
        for name, seed in (('first', 1), ('second', 1), ('other', 2)))
    assert_same_run(first, second)
    assert read_metrics(first) != read_metrics(other)


def test_run_killed_at_any_write_resumes_to_the_same_weights(settings, monkeypatch):
    options = dict(model_ema=True, drop=0.2, color_jitter=0.2)
    whole = run(settings, experiment='whole', **options)
    replace, resumed = os.replace, 0
    for kill_at in range(1, 100):
        calls = 0

        def kill(*args, kill_at=kill_at):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, 'replace', kill)
            try:
                run_dir = run(settings, experiment=f'killed{kill_at}', **options)
                break  # more writes allowed than there are
            except Killed:
                run_dir = Path(settings.output) / f'killed{kill_at}'
        assert_everything_loads(run_dir)
        resumed += (run_dir / 'last' / 'checkpoint.pt').exists()
        assert_same_run(run(settings, experiment=run_dir.name, resume='auto', **options), whole)
        assert_same_tensors(read_checkpoint(run_dir)['state_dict_ema'], read_checkpoint(whole)['state_dict_ema'])
    assert kill_at > 9 and resumed >= 4 and calls == kill_at - 1


def test_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / 'a.json', []
    path.write_text('old')
    for name in ('fsync', 'replace'):
        call = getattr(os, name)
        monkeypatch.setattr(run_folder.os, name, lambda *args, name=name, call=call: (order.append(name), call(*args)))

    def stop_half_way(temporary: Path) -> None:
        temporary.write_text('ne')
        raise Killed

    with pytest.raises(Killed):
        run_folder.write_file(path, stop_half_way)
    assert path.read_text() == 'old' and order == []
    run_folder.write_file(path, lambda temporary: temporary.write_text('new'))
    assert path.read_text() == 'new' and order == ['fsync', 'replace']


def test_finished_run_resumes_to_the_same_summary_from_its_path(settings, tmp_path):
    run_dir = run(settings)
    before = json.loads((run_dir / 'summary.json').read_text())
    after = finetune.main(dataclasses.replace(settings, output=str(tmp_path / 'elsewhere'), resume=str(run_dir)))
    assert after == before
    assert not (tmp_path / 'elsewhere').exists()


def test_changed_settings_are_refused_on_resume_with_both_values(settings):
    run_dir = run(settings)
    before = (run_dir / 'args.json').read_bytes()
    with pytest.raises(finetune.SettingsError) as error:
        run(settings, resume='auto', lr=0.5, epochs=7)
    for part in ('--resume', 'lr was 0.001, is 0.5', 'epochs was 2, is 7', 'another --experiment'):
        assert part in str(error.value)
    assert 'seed' not in str(error.value) and (run_dir / 'args.json').read_bytes() == before


def test_changed_data_are_refused_on_resume(settings, tmp_path):
    data = write_pictures(tmp_path / 'own', train=4, val=2)
    run(settings, data_dir=str(data))
    (data / 'train' / 'red' / '0.png').unlink()
    with pytest.raises(finetune.SettingsError, match='train_images was 12, is 11'):
        run(settings, data_dir=str(data), resume='auto')


def test_older_run_is_never_overwritten(settings):
    run_dir = run(settings)
    before = {path: path.read_bytes() for path in run_dir.rglob('*') if path.is_file()}
    with pytest.raises(finetune.SettingsError, match=r'already holds a run.*--resume auto.*--experiment'):
        run(settings)
    (run_dir / 'last' / 'checkpoint.pt').rename(run_dir.parent / 'taken_away.pt')
    with pytest.raises(finetune.SettingsError, match='already holds a run'):
        run(settings, resume='auto')
    del before[run_dir / 'last' / 'checkpoint.pt']
    assert {path: path.read_bytes() for path in before} == before and len(before) == 6


# Ways to train


def test_average_of_weights_is_released_and_not_stuck_at_the_start(settings):
    run_dir = run(settings, model_ema=True, model_ema_decay=0.9998, epochs=1, batch_size=3)
    state = read_checkpoint(run_dir)
    random_seed(settings.seed)
    start = timm.create_model('test_resnet', num_classes=3).state_dict()

    def distance(first: dict, second: dict) -> float:
        return sum((first[key].float() - second[key].float()).norm().item() for key in first if 'weight' in key)

    average, last = state['state_dict_ema'], state['state_dict']
    assert 0 < distance(average, last) < 0.5 * distance(average, start)
    assert_same_tensors(load_file(run_dir / 'model.safetensors'), average)


@pytest.mark.parametrize('amp_dtype', ['bfloat16', 'float16'])
def test_mixed_precision_trains_float32_weights(settings, amp_dtype):
    plain, mixed = run(settings, experiment='plain'), run(settings, amp=True, amp_dtype=amp_dtype)
    weights = load_file(mixed / 'model.safetensors')
    assert weights['fc.weight'].dtype == torch.float32
    mixed_losses, plain_losses = ([row['train_loss'] for row in read_metrics(path)] for path in (mixed, plain))
    assert mixed_losses != plain_losses and mixed_losses == pytest.approx(plain_losses, rel=0.05)


def test_layer_decay_and_another_optimizer_reach_timm(settings):
    state = read_checkpoint(run(settings, epochs=1, opt='sgd', momentum=0.8, layer_decay=0.5))
    groups = state['optimizer']['param_groups']
    assert len({group['lr_scale'] for group in groups}) > 2 and {group['momentum'] for group in groups} == {0.8}


def write_mnist(folder: Path) -> None:
    """Write MNIST's four files with random digits, in its own format."""
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (('train', 40), ('t10k', 20)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>iiii', 2051, count, 28, 28) + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>ii', 2049, count) + labels.tobytes())


@pytest.mark.parametrize('in_chans', [1, 3])
def test_torchvision_data_train_in_grey_and_in_colour(settings, tmp_path, in_chans):
    write_mnist(tmp_path)
    run_dir = run(settings, data_dir=str(tmp_path), dataset='torch/mnist', in_chans=in_chans, epochs=1)
    model = timm.create_model(f'local-dir:{run_dir}', pretrained=True)
    assert model.pretrained_cfg['label_names'][:2] == ['0 - zero', '1 - one'] and model.num_classes == 10
    assert model.conv1[0].in_channels == in_chans == model.pretrained_cfg['input_size'][0]
    facts = read_checkpoint(run_dir)['facts']
    assert (facts['train_images'], facts['val_images']) == (40, 20)


# What is refused, in one sentence, before the first step


@pytest.mark.parametrize(('changes', 'parts'), [
    ({'data_dir': 'no/such/folder'}, ['--data-dir', 'no/such/folder', 'not a folder', 'give']),
    ({'train_split': 'training_set'}, ['--data-dir', 'no folder training_set', '/CLASS/PICTURE']),
    ({'num_classes': 5}, ['--num-classes', '3', 'got 5', 'leave it out']),
    ({'model': 'test_resnett'}, ['--model', 'test_resnett', 'timm.list_models()', 'mean test_resnet']),
    ({'model': 'some/path'}, ['--model', 'some/path', 'local-dir:']),
    ({'model': 'test_vit', 'model_kwargs': ('patch_size=7',), 'img_size': -1}, ['--img-size', 'greater than 0', '-1']),
    ({'model': 'swin_tiny_patch4_window7_224', 'img_size': 2}, ['--model swin_tiny', '--img-size 2', 'cannot be']),
    ({'model_kwargs': ('width',)}, ['--model-kwargs', 'key=value', "'width'"]),
    ({'model_kwargs': ('widht=3',)}, ['--model test_resnet', 'widht']),
    ({'initial_checkpoint': 'no.safetensors'}, ['--initial-checkpoint', 'no.safetensors', 'not a file']),
    ({'opt': 'adamww'}, ['--opt', 'adamww', 'timm.optim.list_optimizers()', 'mean adamw']),
    ({'in_chans': 2}, ['--in-chans', '3', '1', 'got 2']),
    ({'epochs': 0}, ['--epochs', 'greater than 0', 'got 0']),
    ({'batch_size': -4}, ['--batch-size', 'greater than 0', 'got -4']),
    ({'lr': 0.0}, ['--lr', 'greater than 0', 'got 0.0']),
    ({'lr': float('nan')}, ['--lr', 'greater than 0', 'got nan']),
    ({'workers': -1}, ['--workers', 'at least 0', 'got -1']),
    ({'smoothing': 2.0}, ['--smoothing', 'from 0 to 0.999', 'got 2.0']),
    ({'warmup_epochs': 50.0}, ['--warmup-epochs', 'from 0 to', 'got 50.0']),
    ({'min_lr': 1.0}, ['--min-lr', 'from 0 to', 'got 1.0']),
    ({'seed': 2**40}, ['--seed', 'from 0 to']),
    ({'scale': (1.0, 0.08)}, ['--scale', 'rising', '(1.0, 0.08)']),
    ({'std': (0.0, 0.0, 0.0)}, ['--std', 'greater than 0', '(0.0, 0.0, 0.0)']),
    ({'model_kwargs': ('num_classes=5',)}, ['--model-kwargs num_classes=5', 'flag of its own']),
    ({'amp_dtype': 'int8'}, ['--amp-dtype', 'bfloat16 or float16', "'int8'"]),
    ({'mean': (0.5, 0.5)}, ['mean', '3', '2']),
    ({'aa': 'nonsense'}, ['--aa', 'nonsense']),
    ({'dataset': 'wds/things'}, ['--dataset', 'torch/', 'wds/things']),
    ({'dataset': 'torch/mnist'}, ['--dataset torch/mnist', 'cannot be read', '--dataset-download']),
    ({'dataset': 'torch/nothing'}, ['--dataset torch/nothing', 'nothing']),
    ({'device': 'gpu7'}, ['--device', 'gpu7', '--device auto']),
    ({'resume': 'no/run'}, ['--resume', 'no/run', 'last', 'auto']),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_bad_setting_is_refused_in_one_sentence_and_nothing_is_written(settings, changes, parts):
    with pytest.raises(finetune.SettingsError) as error:
        run(settings, **changes)
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert part in message, message
    assert not (Path(settings.output) / 'run').exists()


def test_unwritable_output_is_refused(settings, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(finetune.SettingsError, match=r'--output .*file.* cannot be written.*choose another'):
        run(settings, output=str(tmp_path / 'file'))


def test_folder_without_pictures_is_refused(settings, tmp_path):
    (tmp_path / 'empty' / 'train' / 'red').mkdir(parents=True)
    with pytest.raises(finetune.SettingsError, match=r'no pictures found in .*empty/train; expected .*/CLASS/'):
        run(settings, data_dir=str(tmp_path / 'empty'))


def test_single_class_is_refused(settings, tmp_path):
    data = write_pictures(tmp_path / 'single', classes=('blue',), train=2, val=2)
    with pytest.raises(finetune.SettingsError, match=r'--data-dir .*at least 2 classes.* found 1'):
        run(settings, data_dir=str(data))


def test_classes_of_one_split_only_are_named(settings, tmp_path):
    data = write_pictures(tmp_path / 'uneven', train=2, val=2)
    (data / 'val' / 'red').rename(data / 'val' / 'crimson')
    with pytest.raises(finetune.SettingsError, match='same classes, but crimson, red are in one only'):
        run(settings, data_dir=str(data))


def test_loss_that_is_not_finite_stops_with_the_step(settings):
    with pytest.raises(FloatingPointError, match=r'loss is (nan|inf) at step \d+ .*lower --lr; .* none, no epoch'):
        run(settings, lr=1e30, clip_grad=None, opt='sgd', warmup_epochs=0)
    assert not (Path(settings.output) / 'run' / 'last' / 'checkpoint.pt').exists()


def test_loss_that_turns_nan_later_names_the_last_good_checkpoint(settings, monkeypatch):
    forward, steps = finetune.ClassificationTask.forward, []

    def turn_nan(self, images, targets):
        result = forward(self, images, targets)
        steps.append(len(images))
        return {**result, 'loss': result['loss'] * (float('nan') if len(steps) == 7 else 1)}

    monkeypatch.setattr(finetune.ClassificationTask, 'forward', turn_nan)
    run_dir = Path(settings.output) / 'run'
    with pytest.raises(FloatingPointError, match=r'training loss is nan at step 7 \(epoch 2\)') as error:
        run(settings)
    assert str(run_dir / 'last' / 'checkpoint.pt') in str(error.value)
    state = read_checkpoint(run_dir)
    assert state['epoch'] == 1 and all(value.isfinite().all() for value in state['state_dict'].values())


# The command line


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '200', 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, ROOT / 'scripts' / 'finetune.py', *arguments], capture_output=True, text=True, env=environment)


def test_help_explains_each_setting():
    result = run_command('--help')
    assert result.returncode == 0
    for field in dataclasses.fields(finetune.Settings):
        assert f'--{field.name.replace("_", "-")} ' in result.stdout or f'--no-{field.name}'.replace('_', '-') in (
            result.stdout), field.name
    for text in ('Label smoothing.', 'Processes that read pictures', '(default: adamw)', '--amp, --no-amp'):
        assert text in result.stdout


def test_command_trains_and_a_bad_one_ends_with_code_2(settings):
    arguments = ['--data-dir', settings.data_dir, '--model', 'test_resnet', '--img-size', '32', '--epochs', '1',
                 '--batch-size', '8', '--workers', '0', '--no-channels-last', '--scale', '0.5', '1.0', '--model-kwargs',
                 'zero_init_last=False', '--output', settings.output]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    assert 'epoch   1/1' in result.stdout and 'img/s' in result.stderr
    assert assert_everything_loads(Path(settings.output) / 'test_resnet') == 7
    again = run_command(*arguments)
    assert again.returncode == 2 and again.stdout == ''
    assert again.stderr.startswith('finetune.py: --output') and again.stderr.count('\n') == 1
