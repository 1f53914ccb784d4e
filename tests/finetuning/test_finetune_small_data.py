"""Few images: the schedule derived from their number, and the advice about images that are left out."""
import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import finetune
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training import trainer
from coatnet_train.training.schedule import MIN_UPDATES, advice, with_schedule
from finetune import read_settings
from support.finetune_runs import run

SMALL = ['--recipe', 'small_data', '--data-dir', 'images', '--model', 'test_resnet']


@pytest.mark.parametrize('images, batch_size, epochs', [
    (50, 8, 50), (60, 8, 43), (100, 8, 25), (240, 16, 20), (300, 16, 17), (1000, 64, 20), (5000, 64, 10)])
def test_schedule_follows_from_the_number_of_images(images, batch_size, epochs):
    chosen = with_schedule(read_settings(SMALL), images)
    assert (chosen.batch_size, chosen.epochs, chosen.warmup_epochs) == (batch_size, epochs, epochs / 10)
    assert chosen.epochs * (images // chosen.batch_size) >= MIN_UPDATES


def test_flags_win_and_processes_share_the_batch():
    chosen = with_schedule(read_settings([*SMALL, '--batch-size', '32', '--warmup-epochs', '2']), 300)
    assert (chosen.batch_size, chosen.epochs, chosen.warmup_epochs) == (32, 34, 2)
    shared = with_schedule(read_settings(SMALL), 1000, processes=8)
    assert (shared.batch_size, shared.epochs) == (8, 20)
    accumulated = with_schedule(read_settings([*SMALL, '--grad-accum-steps', '2']), 1000)
    assert accumulated.epochs * (1000 // 64 // 2) >= MIN_UPDATES
    without = with_schedule(finetune.FinetuneSettings(model='test_resnet', epochs=20), 1000)
    assert (without.batch_size, without.epochs, without.warmup_epochs) == (64, 20, 2)


def test_a_stream_cannot_be_counted_first():
    with pytest.raises(ConfigError, match=r'--batch-size and --epochs of None follow from .*give both'):
        finetune.check_values(read_settings([*SMALL, '--dataset', 'wds/shards']))


def test_small_data_records_what_it_chose_and_the_images_decide_late_checks(settings):
    arguments = ['--recipe', 'small_data', '--data-dir', settings.data_dir, '--model', 'test_resnet', '--img-size',
                 '32', '--workers', '0', '--device', 'cpu', '--output', settings.output, '--experiment', 'run']
    finetune.main(read_settings([*arguments, '--epochs', '2']))
    args = json.loads((Path(settings.output) / 'run' / 'args.json').read_text())
    assert (args['batch_size'], args['epochs'], args['warmup_epochs'], args['bn_momentum']) == (8, 2, 0.2, 0.1)
    with pytest.raises(ConfigError, match=r'--last-epoch must be from 1 to 75, got 80'):  # 36 images
        finetune.main(read_settings([*arguments[:-1], 'other', '--last-epoch', '80']))


# What is said


def test_advice_counts_what_is_left_out_and_the_updates():
    assert list(advice(240, 192, 15, 64)) == [
        '48 of 240 training images are left out of each epoch, other ones each time; --batch-size 60 leaves out none.',
        'warning: the run makes 15 updates of the weights, where fine-tuning takes some 300; --recipe small_data '
        'chooses batch size and epochs by the number of images, or give a smaller --batch-size or more --epochs.']
    assert list(advice(240, 240, 300, 60)) == []
    assert list(advice(127, 126, 300, 63)) == [  # nothing near it is better
        '1 of 127 training images are left out of each epoch, other ones each time.']
    assert 'batch-size 5 leaves out none' in next(advice(40, 32, 300, 8, shared=4))
    assert '--batch-size 10 leaves out 4.' in next(advice(54, 48, 300, 16, step=2))  # 9 leaves out none
    left_out, short = advice(54, 48, 12, 8, scheduled=True)
    assert left_out.endswith('other ones each time.')
    assert short.endswith('leave --epochs and --batch-size to the recipe.')


@pytest.fixture
def bars(monkeypatch) -> list:
    """Record every progress bar of a trainer: its keywords, its count, and the lines written."""
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n, self.lines = options, options['initial'], []
            made.append(self)

        def update(self, count):
            self.n += count

        def write(self, line):
            self.lines.append(line)

        def __getattr__(self, name):
            return lambda *arguments, **options: None

    monkeypatch.setattr(trainer, 'progress_bar', Bar)
    return made


def test_run_counts_the_images_it_uses_and_names_the_others_once(settings, bars):
    run(settings, batch_size=20)  # of 36
    assert bars[0].options['total'] == bars[0].n == 40
    assert [line for line in bars[0].lines if 'left out' in line] == [
        '16 of 36 training images are left out of each epoch, other ones each time; --batch-size 18 leaves out none.']
    assert sum('2 updates of the weights' in line for line in bars[0].lines) == 1


def test_fewer_images_than_a_batch_are_counted_as_they_are(settings, bars, monkeypatch, tmp_path):
    run(settings, batch_size=64, epochs=2, last_epoch=1)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(trainer.time, 'perf_counter', lambda: float(next(clock)))  # an epoch takes ten seconds
    run_dir = run(settings, batch_size=64, epochs=2, resume='auto')
    assert bars[1].options['total'] == bars[1].n == 72 and bars[1].options['initial'] == 36
    assert not any('left out' in line for line in bars[1].lines)
    with (run_dir / 'metrics.csv').open() as file:
        assert [float(row['images_per_second']) for row in csv.DictReader(file)][-1] == 3.6


# BatchNorm


def test_bn_momentum_reaches_the_running_statistics_and_no_config(settings):
    def drift(run_dir: Path) -> float:
        state = load_file(run_dir / 'model.safetensors')
        return sum((state[key] - 1).abs().mean().item() for key in state if key.endswith('running_var'))

    still = run(settings, experiment='still', epochs=1, bn_momentum=0.0)
    assert drift(still) == 0
    own, slow = run(settings, experiment='own', epochs=1), run(settings, experiment='slow', epochs=1, bn_momentum=0.01)
    assert drift(own) > 3 * drift(slow) > 0
    config = json.loads((slow / 'config.json').read_text())
    assert 'momentum' not in json.dumps(config)
    reopened = timm.create_model(f'local-dir:{slow}', pretrained=True)
    assert {module.momentum for module in reopened.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.1}
