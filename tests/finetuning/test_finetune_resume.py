"""Reproducibility of a run, and resuming after an interruption."""
import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.task import ClassificationTask

import finetune
from coatnet_train.runtime import files
from coatnet_train.runtime.cli import ConfigError, Preempted
from coatnet_train.training.checkpoint import write_state
from support.commands import Processes
from support.crashes import SimulatedCrash, crash_at_write
from support.finetune_runs import (
    assert_everything_loads,
    assert_same_run,
    assert_same_tensors,
    read_checkpoint,
    read_metrics,
    run,
)
from support.images import write_images


@pytest.mark.parametrize('workers', [0, 1])
def test_same_seed_gives_same_weights_and_another_seed_does_not(settings, workers):
    first, second, other = (
        run(settings, experiment=name, seed=seed, workers=workers, drop=0.2, reprob=0.3, aa='rand-m5-inc1')
        for name, seed in (('first', 1), ('second', 1), ('other', 2)))
    assert_same_run(first, second)
    assert read_metrics(first) != read_metrics(other)


def test_run_that_ended_early_is_whole_and_may_go_on(settings):
    whole = run(settings, experiment='whole', epochs=3)
    run_dir = run(settings, experiment='early', epochs=3, last_epoch=2, val_interval=3)
    assert json.loads((run_dir / 'summary.json').read_text())['epochs'] == 2
    assert read_metrics(run_dir) == read_metrics(whole)[1:2]
    run(settings, experiment='early', epochs=3, val_interval=3, resume='auto')
    assert json.loads((run_dir / 'summary.json').read_text())['epochs'] == 3
    assert_same_tensors(read_checkpoint(run_dir)['state_dict'], read_checkpoint(whole)['state_dict'])


def test_run_killed_at_any_write_resumes_to_the_same_weights(settings, monkeypatch):
    options = dict(model_ema=True, drop=0.2, color_jitter=0.2, epochs=1)
    whole = run(settings, experiment='whole', **options)
    resumed = 0
    for kill_at in range(1, 100):
        with crash_at_write(monkeypatch, kill_at) as calls:
            try:
                run_dir = run(settings, experiment=f'killed{kill_at}', **options)
                break  # fewer writes than `kill_at`: the run finished
            except SimulatedCrash:
                run_dir = Path(settings.output) / f'killed{kill_at}'
        assert_everything_loads(run_dir)
        resumed += (run_dir / 'last' / 'checkpoint.pt').exists()
        assert_same_run(run(settings, experiment=run_dir.name, resume='auto', **options), whole)
        assert_same_tensors(read_checkpoint(run_dir)['state_dict_ema'], read_checkpoint(whole)['state_dict_ema'])
    assert kill_at > 9 and resumed >= 3 and len(calls) == kill_at - 1


def test_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / 'a.json', []
    path.write_text('old')
    for name in ('fsync', 'replace'):
        call = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, call=call: (order.append(name), call(*args)))

    def stop_half_way(temporary: Path) -> None:
        temporary.write_text('ne')
        raise SimulatedCrash

    with pytest.raises(SimulatedCrash):
        files.write_file(path, stop_half_way)
    assert path.read_text() == 'old' and order == []
    files.write_file(path, lambda temporary: temporary.write_text('new'))
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
    with pytest.raises(ConfigError) as error:
        run(settings, resume='auto', lr=0.5, epochs=7)
    for part in ('--resume', 'lr was 0.001, is 0.5', 'epochs was 2, is 7', 'another --experiment'):
        assert part in str(error.value)
    assert 'seed' not in str(error.value) and (run_dir / 'args.json').read_bytes() == before


def test_changed_data_are_refused_on_resume(settings, tmp_path):
    data = write_images(tmp_path / 'own', train=4, val=2)
    run(settings, data_dir=str(data))
    (data / 'train' / 'red' / '0.png').unlink()
    with pytest.raises(ConfigError, match='train_images was 12, is 11'):
        run(settings, data_dir=str(data), resume='auto')


def test_the_same_data_elsewhere_resume_and_renamed_or_replaced_images_do_not(settings, tmp_path):
    data = write_images(tmp_path / 'own', train=4, val=2)
    for path in list(data.rglob('*.png')):  # files of equal size
        Image.open(path).save(path.with_suffix('.bmp'))
        path.unlink()
    run_dir = run(settings, data_dir=str(data), last_epoch=1)
    local = shutil.copytree(data, tmp_path / 'local', copy_function=shutil.copyfile)  # with new modification times
    for path in local.rglob('*.bmp'):
        os.utime(path, (1, 1))
    run(settings, data_dir=str(local), resume='auto')
    assert json.loads((run_dir / 'summary.json').read_text())['epochs'] == 2

    first, second = local / 'train' / 'red' / '0.bmp', local / 'train' / 'blue' / '0.bmp'
    contents = first.read_bytes(), second.read_bytes()
    for path, content in zip((first, second), reversed(contents), strict=True):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match='needs the training images that the run began with'):
        run(settings, data_dir=str(local), resume='auto')
    for path, content in zip((first, second), contents, strict=True):
        path.write_bytes(content)
    run(settings, data_dir=str(local), resume='auto')
    (local / 'val' / 'red' / '0.bmp').rename(local / 'val' / 'red' / 'z.bmp')
    with pytest.raises(ConfigError, match='needs the held-out images that the run began with'):
        run(settings, data_dir=str(local), resume='auto')


def test_a_checkpoint_of_earlier_names_and_without_digests_goes_on_with_a_warning(settings, capsys):
    run_dir = run(settings, last_epoch=1)
    path = run_dir / 'last' / 'checkpoint.pt'
    state = read_checkpoint(run_dir)
    signature = state.pop('resume_signature')
    state['facts'] = {{'cache_images': 'decode_once'}.get(name, name): value for name, value in signature.items()
                      if not name.startswith('digest')}
    state['facts']['data_dir'] = 'elsewhere'  # a field that earlier versions compared
    torch.save(state, path)
    capsys.readouterr()
    run(settings, resume='auto')
    assert json.loads((run_dir / 'summary.json').read_text())['epochs'] == 2
    assert 'began before data were compared by their content' in capsys.readouterr().err
    state['facts']['decode_once'] = True
    torch.save(state, path)
    with pytest.raises(ConfigError, match='cache_images was True, is False'):
        run(settings, resume='auto')


def test_older_run_is_never_overwritten(settings):
    run_dir = run(settings)
    before = {path: path.read_bytes() for path in run_dir.rglob('*') if path.is_file()}
    with pytest.raises(ConfigError, match=r'already holds a run.*--resume auto.*--experiment'):
        run(settings)
    (run_dir / 'last' / 'checkpoint.pt').rename(run_dir.parent / 'taken_away.pt')
    with pytest.raises(ConfigError, match='already holds a run'):
        run(settings, resume='auto')
    del before[run_dir / 'last' / 'checkpoint.pt']
    assert {path: path.read_bytes() for path in before} == before and len(before) == 9


def test_loss_that_is_not_finite_stops_with_the_step(settings):
    with pytest.raises(FloatingPointError, match=r'loss is (nan|inf) at step \d+ .*lower --lr; .* none, no epoch'):
        run(settings, lr=1e30, clip_grad=None, opt='sgd', warmup_epochs=0)
    assert not (Path(settings.output) / 'run' / 'last' / 'checkpoint.pt').exists()


def test_loss_that_turns_nan_later_names_the_last_good_checkpoint(settings, monkeypatch):
    forward, steps = ClassificationTask.forward, []

    def turn_nan(self, images, targets):
        result = forward(self, images, targets)
        steps.append(len(images))
        return {**result, 'loss': result['loss'] * (float('nan') if len(steps) == 7 else 1)}

    monkeypatch.setattr(ClassificationTask, 'forward', turn_nan)
    run_dir = Path(settings.output) / 'run'
    with pytest.raises(FloatingPointError, match=r'training loss is nan at step 7 \(epoch 2\)') as error:
        run(settings)
    assert str(run_dir / 'last' / 'checkpoint.pt') in str(error.value)
    state = read_checkpoint(run_dir)
    assert state['progress']['epoch'] == 2 and all(value.isfinite().all() for value in state['state_dict'].values())


def kill_at_step(monkeypatch, step: int, kill) -> None:
    """Call `kill` in the middle of a training step."""
    forward, steps = ClassificationTask.forward, []

    def count(self, *arguments):
        steps.append(1)
        if len(steps) == step:
            kill()
        return forward(self, *arguments)

    monkeypatch.setattr(ClassificationTask, 'forward', count)


def stop() -> None:
    raise SimulatedCrash


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_to_the_same_weights(settings, monkeypatch):
    options = dict(drop=0.2, reprob=0.3, mixup=0.5, epochs=3, grad_accum_steps=2, model_ema=True, batch_size=4)
    whole = run(settings, experiment='whole', **options)
    moments = random.Random(0).sample(range(1, 25), 5)  # steps
    in_mid_epoch = 0
    for moment in moments:
        name = f'killed{moment}'
        with monkeypatch.context() as patch, pytest.raises(SimulatedCrash):
            kill_at_step(patch, moment, stop)
            run(settings, experiment=name, recovery_interval=1, **options)
        run_dir = Path(settings.output) / name
        assert_everything_loads(run_dir)
        if (run_dir / 'last' / 'checkpoint.pt').exists():
            in_mid_epoch += read_checkpoint(run_dir)['progress']['batch'] > 0
        assert_same_run(run(settings, experiment=name, resume='auto', **options), whole)
        assert_same_tensors(read_checkpoint(run_dir)['state_dict_ema'], read_checkpoint(whole)['state_dict_ema'])
    assert in_mid_epoch >= 2


@pytest.mark.parametrize('moment', [2, 4, 7, 8])  # in an epoch, and in its last step
def test_sigterm_saves_and_the_run_goes_on_from_there(settings, monkeypatch, moment):
    whole = run(settings, experiment='whole', drop=0.2)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r'SIGTERM.*(saved after)'):
        kill_at_step(patch, moment, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(settings, drop=0.2)
    progress = read_checkpoint(Path(settings.output) / 'run')['progress']
    steps = 36 // 8
    assert (progress['epoch'] - 1) * steps + progress['batch'] == moment
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_same_run(run(settings, drop=0.2, resume='auto'), whole)


def test_other_readers_may_go_on(settings):
    whole = run(settings, experiment='whole')
    run(settings, epochs=2, workers=1)
    summary = Path(settings.output) / 'run' / 'summary.json'
    summary.unlink()
    assert_same_run(run(settings, workers=0, resume='auto'), whole)


def start_process(settings: finetune.FinetuneSettings, **changes) -> Processes:
    values = {**dataclasses.asdict(settings), **changes}
    return Processes('scripts/finetune.py', *(f'--{name.replace("_", "-")}={values[name]}' for name in (
        'data_dir', 'model', 'img_size', 'epochs', 'batch_size', 'lr', 'warmup_epochs', 'workers', 'device', 'output',
        'experiment', 'resume', 'recovery_interval')), count=1)


@pytest.mark.parametrize(('number', 'code'), [
    pytest.param(signal.SIGKILL, -9, id='SIGKILL'), pytest.param(signal.SIGTERM, finetune.PREEMPTED, id='SIGTERM')])
@pytest.mark.slow
def test_killed_process_resumes_to_the_same_weights(settings, number, code):
    settings = dataclasses.replace(settings, epochs=5, workers=1)
    process = start_process(settings, recovery_interval=1)
    checkpoint = Path(settings.output) / 'run' / 'last' / 'checkpoint.pt'
    while process.running() and not checkpoint.exists():
        time.sleep(0.05)
    process.send(number)
    done = process.finish()
    assert done.returncode == code, done.stdout + done.stderr
    assert assert_everything_loads(checkpoint.parents[1]) >= 3
    done = read_checkpoint(checkpoint.parents[1])['progress']
    assert done['epoch'] < 5
    assert_same_run(run(settings, resume='auto'), run(settings, experiment='whole'))


def test_full_disk_loses_nothing_that_was_saved(settings, monkeypatch):
    save, calls = torch.save, []

    def fill_up(state, path):
        save(state, path)
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(torch, 'save', fill_up)
        run(settings)
    run_dir = Path(settings.output) / 'run'
    assert read_checkpoint(run_dir)['progress']['epoch'] == 2
    assert not list(run_dir.rglob('.*.tmp')) and assert_everything_loads(run_dir) == 5
    assert_same_run(run(settings, resume='auto'), run(settings, experiment='whole'))


def test_checkpoint_that_finds_no_room_is_an_os_error():
    with pytest.raises(OSError, match='No space left'):
        write_state({'weights': torch.zeros(10 ** 6)}, Path('/dev/full'))


def test_half_a_checkpoint_is_refused_by_name(settings):
    run_dir = run(settings, epochs=1)
    path = run_dir / 'last' / 'checkpoint.pt'
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r'last/checkpoint.pt cannot be read'):
        run(settings, epochs=1, resume='auto')


def test_unfinite_gradient_stops_before_it_reaches_the_weights(settings, monkeypatch):
    forward, steps = ClassificationTask.forward, []

    def spoil(self, images, targets):
        result = forward(self, images, targets)
        steps.append(1)
        if len(steps) == 3:
            result['loss'].register_hook(lambda gradient: gradient * float('nan'))
        return result

    monkeypatch.setattr(ClassificationTask, 'forward', spoil)
    with pytest.raises(FloatingPointError, match=r'gradient norm of the training loss is nan at step 3'):
        run(settings, recovery_interval=1)
    state = read_checkpoint(Path(settings.output) / 'run')
    assert state['progress']['batch'] == 2 and all(value.isfinite().all() for value in state['state_dict'].values())
