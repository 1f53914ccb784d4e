"""bfloat16 on a CPU that emulates it: recipes use float32, --amp is obeyed, and a resumed run keeps its precision."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import finetune
from coatnet_train.benchmarks.config import LoaderSettings
from coatnet_train.benchmarks.models import check_machine
from coatnet_train.runtime import accelerator as processes
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training.trainer import Trainer
from finetune import read_settings
from support.crashes import SimulatedCrash
from support.finetune_runs import read_checkpoint

EMULATED = 'this CPU has no bfloat16 instructions'


@pytest.fixture
def native(monkeypatch):
    """Set whether this CPU seems to have bfloat16 instructions."""
    return lambda answer: monkeypatch.setattr(processes, 'has_native_bfloat16', lambda: answer)


@pytest.fixture
def arguments(settings) -> list[str]:
    """A command of a quick run by a recipe with mixed precision."""
    return [
        '--recipe', 'imagenette_64', '--data-dir', settings.data_dir, '--model', 'test_resnet', '--img-size', '32',
        '--epochs', '2', '--batch-size', '12', '--workers', '0', '--device', 'cpu', '--output', settings.output,
        '--experiment', 'run']


def precision_of(run_dir: Path) -> set:
    """Set of the precisions (True for bfloat16) in args.json, resume signature and summary.json of a run."""
    args, summary = (json.loads((run_dir / f'{name}.json').read_text()) for name in ('args', 'summary'))
    signature = read_checkpoint(run_dir)['resume_signature']
    return {args['amp'], signature['amp'], summary['precision'] == 'bfloat16'}


@pytest.mark.parametrize('emulated, flags, expected, warnings', [
    (True, [], False, 1), (True, ['--amp'], True, 1), (True, ['--no-amp'], False, 0), (False, [], True, 0),
    (False, ['--amp'], True, 0)])
def test_recipe_leaves_emulated_bfloat16_out_and_amp_is_obeyed(
        settings, arguments, native, capsys, emulated, flags, expected, warnings):
    native(not emulated)
    finetune.main(dataclasses.replace(read_settings([*arguments, *flags]), epochs=1))
    assert precision_of(Path(settings.output) / 'run') == {expected}
    said = capsys.readouterr().err
    assert said.count(EMULATED) == said.count('warning: ') == warnings, said
    if warnings:  # the cost, and the flag for the alternative
        assert '10 times (AVX2)' in said and ('--no-amp' if flags else '--amp') in said


def stop_after_an_epoch(monkeypatch, settings: finetune.FinetuneSettings) -> None:
    def end_epoch(self: Trainer) -> None:
        whole(self)
        raise SimulatedCrash

    with monkeypatch.context() as patch:
        whole = Trainer.end_epoch
        patch.setattr(Trainer, 'end_epoch', end_epoch)
        with pytest.raises(SimulatedCrash):
            finetune.main(settings)


@pytest.mark.parametrize('began_native', [True, False])
def test_run_goes_on_in_its_precision_on_another_cpu_and_says_so(
        settings, arguments, native, monkeypatch, capsys, began_native):
    native(began_native)
    stop_after_an_epoch(monkeypatch, read_settings(arguments))
    native(not began_native)
    capsys.readouterr()
    finetune.main(read_settings([*arguments, '--resume', 'auto']))
    assert precision_of(Path(settings.output) / 'run') == {began_native}
    said = capsys.readouterr().err
    assert (f'--amp: {EMULATED}' if began_native else 'the run began in float32') in said
    assert said.count('warning: ') == 1
    with pytest.raises(ConfigError, match=r'amp was .*, is .*restore them, or start another --experiment'):
        finetune.main(read_settings([*arguments, '--resume', 'auto', '--no-amp' if began_native else '--amp']))


def test_query_tells_emulation_from_instructions(monkeypatch):
    def answers(onednn: bool, avx512_bf16: bool, amx: bool, machine: str = 'x86_64') -> bool:
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: onednn, raising=False)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
        monkeypatch.setattr(processes.platform, 'machine', lambda: machine)
        return processes.has_native_bfloat16()

    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: True)
    assert answers(True, True, False) and answers(True, False, True)
    assert not answers(True, False, False)  # AVX-512 alone
    assert not answers(False, True, True)  # hidden from oneDNN, as by ONEDNN_MAX_CPU_ISA
    assert answers(True, False, False, machine='aarch64') and not answers(False, False, False, machine='aarch64')
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not answers(True, True, True)


def test_float16_on_a_cpu_names_both_ways_out():
    with pytest.raises(ConfigError, match=r'float16 needs a GPU, .*bfloat16, or --no-amp'):
        processes.create_accelerator('cpu', amp=True, amp_dtype='float16')


def test_benchmarks_and_scripts_warn_of_emulation_and_compute_in_float32_by_themselves(native, capsys):
    native(False)
    assert not LoaderSettings(data_dir='images').amp
    check_machine('cpu', amp=True)
    processes.create_accelerator('cpu', amp=True)  # as eval_imagenet.py, extract_features.py and robustness.py do
    assert capsys.readouterr().err.count(f'--amp: {EMULATED}') == 2
    check_machine('cpu'), processes.create_accelerator('cpu')
    native(True)
    check_machine('cpu', amp=True), processes.create_accelerator('cpu', amp=True)
    assert capsys.readouterr().err == ''
