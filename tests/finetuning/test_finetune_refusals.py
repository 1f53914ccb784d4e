"""Settings that scripts/finetune.py rejects with one error message before the first step."""
from pathlib import Path

import pytest

from coatnet_train.runtime.cli import ConfigError
from support.finetune_runs import run
from support.images import write_images


@pytest.mark.parametrize(('changes', 'parts'), [
    ({'data_dir': 'no/such/folder'}, ['--data-dir', 'no/such/folder', 'not a folder', 'give']),
    ({'train_split': 'training_set'}, ['--data-dir', 'no folder training_set', '/CLASS/IMAGE']),
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
    ({'experiment': '../../else'}, ['--experiment', 'inside --output', 'got ../../else']),
    ({'experiment': '/else'}, ['--experiment', 'inside --output', 'got /else']),
    ({'batch_size': -4}, ['--batch-size', 'greater than 0', 'got -4']),
    ({'lr': 0.0}, ['--lr', 'greater than 0', 'got 0.0']),
    ({'lr': float('nan')}, ['--lr', 'finite number', 'got nan']),
    ({'color_jitter': float('inf')}, ['--color-jitter', 'finite number', 'got inf']),
    ({'opt': 'adahessian'}, ['--opt adahessian', 'second derivatives', 'choose another']),
    ({'batch_size': 1}, ['--batch-size 1', '--model test_resnet', 'more than 1 value', 'at least 2']),
    ({'grad_accum_steps': 9}, ['--grad-accum-steps 9', 'at most the 4 batches']),
    ({'workers': -1}, ['--workers', 'at least 0', 'got -1']),
    ({'smoothing': 2.0}, ['--smoothing', 'from 0 to 0.999', 'got 2.0']),
    ({'warmup_epochs': 50.0}, ['--warmup-epochs', 'from 0 to', 'got 50.0']),
    ({'min_lr': 1.0}, ['--min-lr', 'from 0 to', 'got 1.0']),
    ({'seed': 2**40}, ['--seed', 'from 0 to']),
    ({'scale': (1.0, 0.08)}, ['--scale', 'rising', '(1.0, 0.08)']),
    ({'std': (0.0, 0.0, 0.0)}, ['--std', 'greater than 0', '(0.0, 0.0, 0.0)']),
    ({'model_kwargs': ('num_classes=5',)}, ['--model-kwargs num_classes=5', 'flag of its own']),
    ({'amp_dtype': 'int8'}, ['--amp-dtype', 'bfloat16 or float16', "'int8'"]),
    ({'amp': True, 'amp_dtype': 'float16'}, ['--amp-dtype float16', 'needs a GPU', 'use bfloat16']),
    ({'last_epoch': 3}, ['--last-epoch', 'from 1 to 2', 'got 3']),
    ({'patience': 0}, ['--patience', 'greater than 0', 'got 0']),
    ({'grad_accum_steps': 0}, ['--grad-accum-steps', 'greater than 0', 'got 0']),
    ({'max_bad_images': 1.5}, ['--max-bad-images', 'from 0 to 1', 'got 1.5']),
    ({'mixup': 0.2, 'batch_size': 7}, ['--batch-size', 'even', 'got 7']),
    ({'train_img_sizes': (16, 24, 32)}, ['--train-img-sizes', '2 epochs', '(16, 24, 32)']),
    ({'model': 'test_vit', 'train_img_sizes': (24, 32), 'img_size': 32}, ['--model test_vit', '(24, 32) pixels']),
    ({'freeze_trunk': True, 'layer_decay': 0.7}, ['--layer-decay', '--freeze-trunk']),
    ({'tracker': 'notebook'}, ['--tracker', 'installed', "'notebook'"]),
    ({'teacher': 'test_resnett'}, ['--teacher test_resnett', 'mean test_resnet']),
    ({'dropconnect': 0.1}, ['--model test_resnet', 'dropconnect']),
    ({'class_map': 'no.txt'}, ['--class-map no.txt', 'not a file']),
    ({'mean': (0.5, 0.5)}, ['mean', '3', '2']),
    ({'aa': 'nonsense'}, ['--aa', 'nonsense']),
    ({'dataset': 'zip/things'}, ['--dataset', 'torch/', 'wds/', 'zip/things']),
    ({'dataset': 'wds/'}, ['--dataset wds/', 'cannot be read']),
    ({'dataset': 'hfds/no/such'}, ['--dataset hfds/no/such', 'cannot be read']),
    ({'dataset': 'torch/mnist'}, ['--dataset torch/mnist', 'cannot be read', '--dataset-download']),
    ({'dataset': 'torch/nothing'}, ['--dataset torch/nothing', 'nothing']),
    ({'device': 'gpu7'}, ['--device', 'gpu7', 'auto, cpu or cuda', 'CUDA_VISIBLE_DEVICES']),
    ({'resume': 'no/run'}, ['--resume', 'no/run', 'last', 'auto']),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_bad_setting_is_refused_in_one_sentence_and_nothing_is_written(settings, changes, parts):
    with pytest.raises(ConfigError) as error:
        run(settings, **changes)
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert part in message, message
    assert not (Path(settings.output) / 'run').exists()


def test_unwritable_output_is_refused(settings, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(ConfigError, match=r'--output .*file.* cannot be written.*choose another'):
        run(settings, output=str(tmp_path / 'file'))
    for resume in ('', 'auto'):  # before there is a run to resume
        with pytest.raises(ConfigError, match=r'--output cannot be used: .*File name too long') as told:
            run(settings, output=str(tmp_path / ('x' * 300)), resume=resume)
        assert '--resume' not in str(told.value)


def test_folder_without_images_is_refused(settings, tmp_path):
    (tmp_path / 'empty' / 'train' / 'red').mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'no images found in .*empty/train; expected .*/CLASS/'):
        run(settings, data_dir=str(tmp_path / 'empty'))


def test_single_class_is_refused(settings, tmp_path):
    data = write_images(tmp_path / 'single', classes=('blue',), train=2, val=2)
    with pytest.raises(ConfigError, match=r'--data-dir .*at least 2 classes.* found 1'):
        run(settings, data_dir=str(data))


def test_classes_of_one_split_only_are_named(settings, tmp_path):
    data = write_images(tmp_path / 'uneven', train=2, val=2)
    (data / 'val' / 'red').rename(data / 'val' / 'crimson')
    with pytest.raises(ConfigError, match='same classes, but crimson, red are in one only'):
        run(settings, data_dir=str(data))
