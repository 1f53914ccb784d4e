"""FSDP with two processes on a CPU: losses of one process, full state dicts in every file, and resuming."""
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from accelerate.commands import launch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from timm.data import create_transform

import finetune
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, create_dataset
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.evaluation.evaluator import predict
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime import accelerator
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training.config import FinetuneSettings, read_settings
from coatnet_train.training.fsdp import check_fsdp, prepare_model
from support.commands import Processes, free_port
from support.constants import ROOT
from support.finetune_runs import assert_same_tensors, read_checkpoint, read_metrics
from support.images import write_images

LIGHT = (
    '--model', 'lightconvnet_pico_64', '--model-kwargs', 'depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)',
    'conv_head_dim=16', 'kernel_size=(3,3,3,3)', 'conv_norm=layer')  # BatchNorm would see one process's images
COAT = '--model', 'coatnet_pico_64', '--model-kwargs', 'depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images') / 'images', train=8, val=5)


def recipe_settings(data: Path, output: Path, experiment: str, *flags: object) -> tuple:
    return (
        '--data-dir', data, '--img-size', 32, '--device', 'cpu', '--workers', 0, '--output', output, '--experiment',
        experiment, *flags)


def start(*arguments: object, blocks: str = 'MBConv,TransformerBlock') -> Processes:
    """Run the documented `accelerate launch`, whose last step, torchrun, is replaced by two forked processes."""
    command = map(str, (
        '--config_file', ROOT / 'scripts' / 'launch' / 'fsdp.yaml', '--num_processes', 2, '--main_process_port',
        free_port(), '--fsdp_transformer_layer_cls_to_wrap', blocks, ROOT / 'tests' / 'support' / 'fake_multi_gpu.py',
        ROOT / 'scripts' / 'finetune.py', *arguments))
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, 'run', lambda args: started.append(
            Processes('tests/support/fake_multi_gpu.py', *args.training_script_args)))
        launch.launch_command(launch.launch_command_parser().parse_args([*command]))
    return started[0]


def run(*arguments: object, **options: str) -> None:
    done = start(*arguments, **options).finish()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_first_20_losses_equal_those_of_one_process(tmp_path, data):
    # two groups of two batches an epoch, so that sharded gradients are accumulated too
    flags = (*LIGHT, '--drop-path', 0, '--epochs', 10, '--warmup-epochs', 2, '--lr', '1e-3', '--grad-accum-steps', 2)
    finetune.main(read_settings(list(map(str, recipe_settings(data, tmp_path, 'one', '--batch-size', 6, *flags)))))
    run(*recipe_settings(data, tmp_path, 'two', '--batch-size', 3, *flags), blocks='LightConvBlock')
    one, two = read_metrics(tmp_path / 'one'), read_metrics(tmp_path / 'two')
    assert len(one) == 10 and one[0]['train_loss'] > one[-1]['train_loss'] + 0.05
    for first, second in zip(one, two, strict=True):
        assert second['train_loss'] == pytest.approx(first['train_loss'], abs=1e-5)
        assert second['eval_loss'] == pytest.approx(first['eval_loss'], abs=1e-5)
    # parameters are stored by names and not by numbers, so they were gathered from shards
    assert read_checkpoint(tmp_path / 'two')['resume_signature']['sharded']
    assert 'stem.conv1.weight' in read_checkpoint(tmp_path / 'two')['optimizer']['state']


@pytest.mark.slow
def test_stopped_run_goes_on_to_the_same_weights_which_score_what_was_reported(tmp_path, data):
    flags = (
        *COAT, '--batch-size', 3, '--epochs', 4, '--lr', '5e-3', '--amp', '--layer-decay', 0.9, '--head-lr-scale', 2)
    run(*recipe_settings(data, tmp_path, 'whole', *flags))
    stopped = tmp_path / 'stopped'
    arguments = recipe_settings(data, tmp_path, 'stopped', *flags, '--resume', 'auto', '--recovery-interval', 1)
    processes, deadline = start(*arguments), time.monotonic() + 200
    while processes.running() and not (stopped / 'metrics.csv').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes.send(signal.SIGTERM)
    assert processes.finish().returncode == finetune.PREEMPTED
    assert not (stopped / 'summary.json').exists()
    assert 0 < len(read_metrics(stopped)) < 4
    run(*arguments)

    assert read_metrics(stopped) == read_metrics(tmp_path / 'whole')
    whole = load_file(tmp_path / 'whole' / 'model.safetensors')
    assert_same_tensors(load_file(stopped / 'model.safetensors'), whole)
    first, second = (read_checkpoint(folder)['optimizer']['state'] for folder in (stopped, tmp_path / 'whole'))
    assert all(torch.equal(first[name]['exp_avg'], second[name]['exp_avg']) for name in second)

    best = max(read_metrics(stopped), key=lambda row: (row['eval_top1'], -row['eval_loss']))
    model, data_config = open_model(ModelSettings(model=f'local-dir:{stopped}', pretrained=True))
    dataset, _ = create_dataset(DataSettings(data_dir=str(data)), 'validation')
    processes = create_accelerator('cpu', amp=True)
    images = IndexedImageDataset(dataset, create_transform(**data_config))
    loader = create_loader(images, EpochSampler(len(dataset)), 6, 0)
    scores = predict(model, processes.prepare(loader), processes).scores
    assert scores['loss'] == pytest.approx(best['eval_loss'], abs=1e-3) and scores['top1'] == best['eval_top1']


def test_an_unknown_layer_class_is_a_sentence():
    def prepare(*arguments):
        raise ValueError('Could not find the transformer layer class NoSuchBlock in the model.')

    fake = SimpleNamespace(is_fsdp2=True, prepare=prepare, state=SimpleNamespace(fsdp_plugin=SimpleNamespace()))
    with pytest.raises(ConfigError, match=r'does not fit this model: .*NoSuchBlock .*See fsdp_transformer_layer_cls'):
        prepare_model(fake, torch.nn.Linear(2, 2), None)


def test_averaged_weights_and_other_scripts_are_refused(monkeypatch):
    fake = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, is_main_process=True)
    check_fsdp(FinetuneSettings(data_dir='d', model='m'), fake)
    with pytest.raises(ConfigError, match='--model-ema averages full weights after every step'):
        check_fsdp(FinetuneSettings(data_dir='d', model='m', model_ema=True), fake)
    monkeypatch.setattr(accelerator, 'Accelerator', lambda **options: fake)
    assert create_accelerator('cpu', may_shard=True) is fake
    with pytest.raises(ConfigError, match=r'FSDP is for finetune\.py'):
        create_accelerator('cpu')
