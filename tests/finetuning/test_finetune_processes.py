"""Two processes on a CPU have the losses and scores of one process with the same global batch."""
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import create_transform

import finetune
import teach
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, create_dataset
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.evaluation.evaluator import predict
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.training import config
from coatnet_train.training.teach_config import read_settings
from support.commands import run_processes
from support.finetune_runs import write_shards
from support.images import write_images

MODEL = (
    '--model', 'lightconvnet_pico_64', '--model-kwargs', 'depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)',
    'conv_head_dim=16', 'kernel_size=(3,3,3,3)', 'conv_norm=layer')  # BatchNorm would see one process's images


def train(data: Path, output: Path, processes: int, batch_size: int, *flags: object, model=MODEL) -> list[dict]:
    """Train here, or in two processes; returns the rows of metrics.csv."""
    arguments = list(map(str, (
        '--data-dir', data, *model, '--img-size', 32, '--batch-size', batch_size, '--device', 'cpu', '--workers', 0,
        '--output', output, '--experiment', processes, '--drop-path', 0, *flags)))
    if processes == 1:
        finetune.main(config.read_settings(arguments))
    else:
        result = run_processes('finetune.py', *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count('best epoch') == 1  # only the main process prints
    with (output / f'{processes}' / 'metrics.csv').open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_first_20_losses_equal_those_of_one_process(tmp_path):
    # a batch is the whole set, so that an epoch is one step and its loss that of the step
    data = write_images(tmp_path / 'images', train=8, val=5)
    flags = '--epochs', '20', '--warmup-epochs', '2', '--lr', '1e-3'
    one = train(data, tmp_path, 1, 24, *flags)
    two = train(data, tmp_path, 2, 12, *flags)
    assert len(one) == 20 and one[0]['train_loss'] > one[-1]['train_loss'] + 0.05
    for first, second in zip(one, two, strict=True):
        assert second['train_loss'] == pytest.approx(first['train_loss'], abs=1e-5)
        assert second['eval_loss'] == pytest.approx(first['eval_loss'], abs=1e-5)
        # 15 held-out images: their padding to 24 is removed
        assert (second['eval_top1'], second['lr']) == (first['eval_top1'], first['lr'])
    tables = []
    for processes in '12':
        with (tmp_path / processes / 'predictions.csv').open(newline='', encoding='utf-8') as file:
            tables.append(list(csv.DictReader(file)))
    confidences = [[float(row.pop('confidence')) for row in table] for table in tables]
    assert tables[0] == tables[1] and len({row['file'] for row in tables[0]}) == 15
    assert confidences[0] == pytest.approx(confidences[1], abs=1e-3)


@pytest.mark.slow
def test_stored_outputs_and_decoded_images_are_shared_out(tmp_path):
    data, output = write_images(tmp_path / 'images', train=8, val=5), tmp_path / 'both'
    finetune.main(finetune.FinetuneSettings(
        data_dir=str(data), model='test_resnet', img_size=32, epochs=1, batch_size=8, workers=0, device='cpu',
        output=str(tmp_path), experiment='teacher'))
    arguments = [str(argument) for argument in (
        '--teacher', f'local-dir:{tmp_path / "teacher"}', '--img-size', 32, '--data-dir', data, '--device', 'cpu',
        '--shard-size', 5, '--views', 2, '--workers', 0, '--output', output, '--cache-images')]
    done = run_processes('teach.py', *arguments)
    assert done.returncode == 0 and done.stdout.count('5 of 5 shards') == 1, done.stderr[-3000:]
    teach.main(dataclasses.replace(read_settings(arguments), output=str(tmp_path / 'alone')))
    shards = sorted(path.name for path in output.glob('*.safetensors'))
    assert len(shards) == 5 and json.loads((output / 'manifest.json').read_text())['complete']
    for name in shards:
        first, second = (load_file(folder / name)['logits'].float() for folder in (output, tmp_path / 'alone'))
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)

    flags = ('--teacher-outputs', output, '--kd-loss-weight', '0.9', '--epochs', '3', '--warmup-epochs', '1', '--lr',
             '1e-3', '--cache-images')
    one, two = train(data, tmp_path, 1, 8, *flags), train(data, tmp_path, 2, 4, *flags)
    assert one[0]['train_loss'] != one[1]['train_loss']
    for first, second in zip(one, two, strict=True):
        assert second['train_loss'] == pytest.approx(first['train_loss'], abs=1e-5)
        assert second['eval_loss'] == pytest.approx(first['eval_loss'], abs=1e-5)


@pytest.mark.slow
def test_shards_are_shared_out(tmp_path):
    folder = write_shards(tmp_path / 'shards', held_out=2)
    rows = train(folder, tmp_path, 2, 8, '--dataset', 'wds/', '--num-classes', '3', '--epochs', '3', '--lr', '5e-3',
                 '--workers', '1')
    assert len(rows) == 3 and rows[-1]['train_loss'] < rows[0]['train_loss']


@pytest.mark.slow
def test_released_weights_are_those_that_were_evaluated(tmp_path):
    # BatchNorm's statistics and their average differ between processes; those written are those evaluated
    data = write_images(tmp_path / 'images', train=16, val=5)
    rows = train(data, tmp_path, 2, 8, '--epochs', '3', '--lr', '1e-2', '--model-ema', '--model-ema-decay', '0.5',
                 model=('--model', 'test_resnet'))
    best = max(rows, key=lambda row: (row['eval_top1'], -row['eval_loss']))
    model, data_config = open_model(ModelSettings(model=f'local-dir:{tmp_path / "2"}', pretrained=True))
    dataset, _ = create_dataset(DataSettings(data_dir=str(data)), 'validation')
    accelerator = create_accelerator('cpu')
    images = IndexedImageDataset(dataset, create_transform(**data_config))
    loader = create_loader(images, EpochSampler(len(dataset)), 5, 0)
    scores = predict(model, accelerator.prepare(loader), accelerator).scores
    assert scores['loss'] == pytest.approx(best['eval_loss'], abs=1e-5) and scores['top1'] == best['eval_top1']
