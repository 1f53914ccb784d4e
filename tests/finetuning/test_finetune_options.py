"""Training options of scripts/finetune.py: each reaches the object that it configures."""
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import random_seed

from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training import run as training_run
from support.finetune_runs import assert_same_tensors, read_checkpoint, read_metrics, run


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


def test_mixed_precision_trains_float32_weights(settings):
    plain, mixed = run(settings, experiment='plain'), run(settings, amp=True)
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
    signature = read_checkpoint(run_dir)['resume_signature']
    assert (signature['train_images'], signature['val_images']) == (40, 20)


def test_mixed_images_train_on_soft_targets_until_the_epoch_that_ends_it(settings, monkeypatch):
    seen, forward = [], training_run.build_task

    def watch(*arguments):
        task = forward(*arguments)
        task.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        return task

    monkeypatch.setattr(training_run, 'build_task', watch)
    run(settings, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5, mixup_off_epoch=1, smoothing=0.0)
    mixed = [bool(((targets > 0).sum(1) > 1).any()) for targets in seen]
    steps = len(seen) // 2
    assert all(targets.shape == (8, 3) for targets in seen) and any(mixed[:steps]) and not any(mixed[steps:])
    seen.clear()
    run(settings, experiment='never', mixup=0.8, mixup_prob=0.0, smoothing=0.0, epochs=1)
    assert all(targets.max(1).values.min() == 1 for targets in seen)


def test_a_group_of_batches_that_is_not_whole_is_left_out(settings):
    state = read_checkpoint(run(settings, grad_accum_steps=3, epochs=2))  # 36 images are 4 batches of 8, one group
    assert state['progress']['updates'] == 2 and state['progress']['history'][0]['train_loss'] > 0


def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    options = dict(model='test_vit', epochs=1, opt='sgd', clip_grad=None, drop=0.0)
    whole = read_checkpoint(run(settings, experiment='whole', batch_size=16, **options))
    parts = read_checkpoint(run(settings, experiment='parts', batch_size=8, grad_accum_steps=2, **options))
    assert whole['progress']['updates'] == parts['progress']['updates'] == 2
    for key, value in whole['state_dict'].items():
        torch.testing.assert_close(parts['state_dict'][key], value, atol=1e-6, rtol=1e-4)


def test_head_learns_at_its_own_rate(settings):
    groups = read_checkpoint(run(settings, epochs=1, head_lr_scale=10.0, opt='sgd'))['optimizer']['param_groups']
    scales = sorted(group.get('lr_scale', 1.0) for group in groups for _ in group['params'])
    assert scales[-2:] == [10.0, 10.0] and set(scales[:-2]) == {1.0}
    fast, = {group['lr'] for group in groups if group.get('lr_scale') == 10.0}
    slow, = {group['lr'] for group in groups if group.get('lr_scale', 1.0) == 1.0}
    assert fast == pytest.approx(10 * slow)


def test_frozen_trunk_keeps_weights_and_statistics(settings):
    random_seed(settings.seed)
    start = timm.create_model('test_resnet', num_classes=3).state_dict()
    state = read_checkpoint(run(settings, freeze_trunk=True))['state_dict']
    changed = {key for key in start if not torch.equal(start[key], state[key])}
    assert changed == {'fc.weight', 'fc.bias'}


def test_progressive_sizes_reach_the_model_in_turn(settings, monkeypatch):
    sizes, build = [], training_run.build_task

    def watch(*arguments):
        task = build(*arguments)
        task.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        return task

    monkeypatch.setattr(training_run, 'build_task', watch)
    run_dir = run(settings, train_img_sizes=(24, 40), epochs=4)
    half = len(sizes) // 2
    assert set(sizes[:half]) == {(24, 24)} and set(sizes[half:]) == {(40, 40)}
    assert json.loads((run_dir / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 32, 32]


def test_zoo_model_with_attention_takes_progressive_sizes_and_dropconnect(settings):
    kwargs = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)', 'conv_head_dim=16', 'kernel_size=(3,3,3,3)', 'layout=LDCT',
              'dynamic_img_size=True')
    run_dir = run(settings, model='coatnet_pico_64', model_kwargs=kwargs, dropconnect=0.2, train_img_sizes=(16, 32),
                  grad_checkpointing=True)
    assert json.loads((run_dir / 'config.json').read_text())['model_args']['dropconnect'] == 0.2


def test_grad_checkpointing_changes_no_result(settings):
    # a model without BatchNorm, whose statistics would see every image twice
    plain, saved = (run(settings, model='test_vit', experiment=str(on), grad_checkpointing=on, epochs=1)
                    for on in (False, True))
    assert_same_tensors(read_checkpoint(plain)['state_dict'], read_checkpoint(saved)['state_dict'])


def test_compiled_model_trains_alike_and_its_weights_load_without_it(settings, monkeypatch):
    create, backends = training_run.create_accelerator, []

    def without_inductor(*args, dynamo_backend, **options):  # the same graphs, without half a minute of C++
        backends.append(dynamo_backend)
        return create(*args, dynamo_backend=dynamo_backend and 'aot_eager', **options)

    monkeypatch.setattr(training_run, 'create_accelerator', without_inductor)
    options = dict(model='test_vit', model_kwargs=('depth=1',), epochs=1, clip_grad=None, opt='sgd')
    plain, compiled = (run(settings, experiment=str(on), torchcompile=on, **options) for on in (False, True))
    assert backends == [None, 'inductor']
    first, second = load_file(plain / 'model.safetensors'), load_file(compiled / 'model.safetensors')
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-3, rtol=1e-3)


def test_run_stops_after_epochs_without_a_better_one(settings):
    run_dir = run(settings, epochs=30, patience=2, lr=1e-9, warmup_lr=0.0, min_lr=0.0, opt='sgd', freeze_trunk=True)
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['epochs'] == summary['best_epoch'] + 2 < 30


def test_learning_rate_is_scaled_to_the_images_of_an_update(settings):
    lr = [read_metrics(run(settings, experiment=str(size), lr_base_size=size, warmup_epochs=0, min_lr=1e-3, epochs=1,
                           grad_accum_steps=2))[0]['lr'] for size in (16, 64)]
    assert lr == pytest.approx([1e-3, 0.25e-3], rel=1e-6)  # 8 images a step, 2 steps an update


def test_evaluation_may_be_rare_and_changes_no_weight(settings):
    often, rarely = (run(settings, epochs=5, experiment=str(n), val_interval=n) for n in (1, 3))
    assert [row['epoch'] for row in read_metrics(rarely)] == [3, 5]
    assert_same_tensors(read_checkpoint(often)['state_dict'], read_checkpoint(rarely)['state_dict'])
    assert read_metrics(often)[4] == read_metrics(rarely)[1]
    summary = json.loads((rarely / 'summary.json').read_text())
    assert summary['epochs'] == 5 and summary['best_epoch'] in (3, 5)


def test_teacher_must_take_every_size_of_the_images(settings):
    teacher = run(settings, model='test_vit', experiment='teacher', epochs=1)
    with pytest.raises(ConfigError, match=r'--teacher .* cannot look at images of \(3, 32, 32\) \(24, 32\)'):
        run(settings, teacher=f'local-dir:{teacher}', train_img_sizes=(24, 32))


def test_teacher_pulls_the_student_towards_its_logits(settings):
    teacher = run(settings, experiment='teacher', epochs=8, lr=3e-3, color_jitter=0.0, scale=(0.6, 1.0))
    name = f'local-dir:{teacher}'
    taught = run(settings, experiment='taught', teacher=name, kd_loss_weight=1.0, kd_temperature=2.0, epochs=1)
    plain = run(settings, experiment='alone', epochs=1)
    assert read_metrics(taught)[0]['train_loss'] != read_metrics(plain)[0]['train_loss']
    assert load_file(taught / 'model.safetensors').keys() == load_file(teacher / 'model.safetensors').keys()

    # If the whole loss comes from a teacher that equals the student, it is zero.
    same = run(settings, experiment='same', teacher=name, kd_loss_weight=1.0, epochs=1, model='test_resnet', drop=0.0,
               initial_checkpoint=str(teacher / 'model.safetensors'), freeze_trunk=True)
    assert read_metrics(same)[0]['train_loss'] < 1e-4


def test_tracker_gets_the_rows_of_the_table(settings):
    run_dir = run(settings, tracker='tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(run_dir.rglob('events.out.tfevents.*')).parent)).Reload()
    top1 = [event.value for event in events.Scalars('eval_top1')]
    assert top1 == pytest.approx([row['eval_top1'] for row in read_metrics(run_dir)])


@pytest.fixture(scope='module')
def plain_weights() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of runs without the option, by their settings, filled by the tests."""
    return {}


@pytest.mark.parametrize('change', [
    dict(drop=0.5), dict(drop_path=0.5), dict(reprob=1.0), dict(aa='rand-m9-n2'), dict(hflip=0.0), dict(smoothing=0.0),
    dict(color_jitter=0.0), dict(scale=(0.9, 1.0)), dict(interpolation='nearest'), dict(weight_decay=2.0, lr=0.1),
    dict(clip_grad=1e-3, opt='sgd', lr=0.1), dict(warmup_lr=1e-3),
], ids=str)
def test_option_changes_what_is_learned(settings, change, plain_weights):
    base = {name: value for name, value in change.items() if name in ('lr', 'opt')} | dict(epochs=1, model='test_vit')
    if str(base) not in plain_weights:
        plain_weights[str(base)] = read_checkpoint(run(settings, experiment='plain', **base))['state_dict']
    plain = plain_weights[str(base)]
    changed = read_checkpoint(run(settings, experiment='changed', **base | change))['state_dict']
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)


def test_memory_format_changes_no_result(settings):
    rows = [read_metrics(run(settings, experiment=str(on), channels_last=on))[0] for on in (False, True)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
