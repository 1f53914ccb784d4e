"""scripts/eval_imagenet.py: files, rejected settings, command line, and several processes."""
import csv
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import eval_imagenet
from coatnet_train.evaluation import imagenet as evaluate
from coatnet_train.evaluation import tables
from coatnet_train.evaluation.evaluator import predict
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError
from support.commands import run_main, run_processes
from support.imagenet_runs import SYNSETS, random_model, run, write_images

TIMM_COLUMNS = [
    'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']


def test_several_checkpoints_and_several_models_give_one_table(settings, tmp_path, randomize, weights, capsys):
    other = tmp_path / 'other.pth'
    torch.save({'model': random_model(randomize, seed=1).state_dict()}, other)
    path = tmp_path / 'deep' / 'results.json'
    rows = eval_imagenet.main(dataclasses.replace(
        settings, checkpoint=(weights, str(other)), results_file=str(path), output=str(tmp_path / 'files')))
    assert [row['checkpoint'] for row in rows] == [weights, str(other)] and rows[0]['loss'] != rows[1]['loss']
    assert rows[0]['loss'] == run(settings)['loss']
    assert [row['loss'] for row in json.loads(path.read_text())] == [row['loss'] for row in rows]
    assert len(list((tmp_path / 'files').iterdir())) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('test_resnet ')]
    assert f'{rows[1]["top1"]:.3f}' in lines[1].split()

    vit = tmp_path / 'vit.safetensors'
    save_file(random_model(randomize, 'test_vit', img_size=32).state_dict(), vit)
    rows = eval_imagenet.main(dataclasses.replace(
        settings, model=('test_resnet', 'test_vit'), checkpoint=(weights, str(vit))))
    assert [row['model'] for row in rows] == ['test_resnet', 'test_vit']
    assert rows[0]['param_count'] != rows[1]['param_count']


def test_results_have_the_shape_of_timm(settings, tmp_path, weights):
    row = run(settings, results_file=str(tmp_path / 'results.json'))
    written = json.loads((tmp_path / 'results.json').read_text())
    assert list(written)[:9] == TIMM_COLUMNS
    assert {name: value for name, value in written.items() if name != 'provenance'} == row
    assert written['provenance']['torch'] == torch.__version__ and 'command' in written['provenance']
    model = timm.create_model('test_resnet')
    assert row['param_count'] == round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)
    assert row['top1_err'] == pytest.approx(100 - row['top1'])
    rows = eval_imagenet.main(dataclasses.replace(
        settings, checkpoint=(weights, weights), results_file=str(tmp_path / 'results.csv')))
    with (tmp_path / 'results.csv').open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:9] == TIMM_COLUMNS and len(table) == 2 and float(table[1]['top5']) == rows[1]['top5']


def test_reliability_plot_is_drawn(settings, tmp_path):
    run(settings, output=str(tmp_path / 'files'))
    path, = (tmp_path / 'files').glob('*/reliability.png')
    pixels = np.asarray(Image.open(path).convert('RGB'))
    assert min(pixels.shape[:2]) > 500 and (pixels != 255).any()
    assert {item.name for item in path.parent.iterdir()} == {'classes.csv', 'reliability.png'}


# Refusals


def test_pretrained_weights_are_the_default_and_can_be_left_out(settings):
    with pytest.raises(ConfigError, match='coatnet_pico has no released weights'):
        run(settings, model=('coatnet_pico',), checkpoint=())
    assert run(settings, checkpoint=(), pretrained=False)['images'] == 30


def test_unreadable_images_end_the_run_or_are_left_out(settings, tmp_path, weights, capsys):
    data = write_images(tmp_path / 'data', SYNSETS[:5])
    whole = (data / SYNSETS[2] / '1.png').read_bytes()
    (data / SYNSETS[2] / '1.png').write_bytes(whole[:100])
    with pytest.raises(ConfigError, match='--max-bad-images 0 allows 0'):
        run(settings, data_dir=str(data))
    row = run(settings, data_dir=str(data), max_bad_images=0.1)
    assert (row['images'], row['unreadable']) == (9, 1)
    assert f'{SYNSETS[2]}/1.png' in capsys.readouterr().out
    (data / SYNSETS[2] / '1.png').unlink()
    assert run(settings, data_dir=str(data))['loss'] == pytest.approx(row['loss'], abs=2e-4)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'batch_size': 0}, '--batch-size must be from 1'),
    ({'workers': -1}, '--workers must be from 0'),
    ({'max_bad_images': 1.5}, '--max-bad-images must be from 0 to 1'),
    ({'model': ()}, '--model needs'),
    ({'model': ('resnet_test',)}, 'not a name in timm.list_models'),
    ({'model': ('test_resnet', 'test_vit', 'test_resnet')}, '--checkpoint must be as many files'),
    ({'checkpoint': ('nowhere.pth',)}, '--checkpoint nowhere.pth is not a file'),
    ({'checkpoint': (), 'use_ema': True}, '--use-ema is about a --checkpoint'),
    ({'results_file': 'table.xlsx'}, '--results-file must end in .json or .csv'),
    ({'real_labels': 'timm', 'valid_labels': 'folder'}, '--real-labels is scored over all logits'),
    ({'valid_labels': 'imagenet_z'}, '--valid-labels must be auto, all, folder'),
    ({'valid_labels': 'mini_imagenet'}, 'leaves out 9 classes of the data, such as logit 5'),
    ({'num_classes': 7}, r'--checkpoint .* does not fit --model test_resnet.*--num-classes'),
    ({'data_dir': 'nowhere'}, '--data-dir nowhere is not a folder'),
    ({'data_dir': ''}, '--data-dir'),
    ({'split': 'holdout'}, 'has no folder holdout'),
    ({'device': 'tpu'}, '--device must be'),
    ({'crop_mode': 'centre'}, "--crop-mode must be center, squash or border, got 'centre'"),
    ({'interpolation': 'cubic'}, "--interpolation must be nearest, bilinear, .* or lanczos, got 'cubic'"),
    ({'mean': (0.5, float('nan'), 0.5)}, '--mean must be a finite number'),
    ({'std': (0.5, float('inf'), 0.5)}, '--std must be finite and greater than 0'),
    ({'num_classes': -3}, '--num-classes must be at least 0, got -3'),
    ({'num_classes': 0, 'checkpoint': (), 'pretrained': False}, 'test_resnet has no classes to score'),
    ({'model': ('test_vit',), 'img_size': 37}, '--model test_vit with --img-size 37 cannot be built'),
], ids=str)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(settings, **changes)
    assert '\n' not in str(error.value)


def test_output_that_cannot_be_written_is_refused_before_the_first_image(settings, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setattr(evaluate, 'evaluate_model', None)
    for changes in ({'output': str(tmp_path / 'file' / 'deep')}, {'results_file': str(tmp_path / 'file' / 'a.json')}):
        with pytest.raises(ConfigError, match=r'--output or --results-file cannot be written: .*choose another'):
            run(settings, **changes)


def test_full_disk_takes_no_number_along(settings, tmp_path, monkeypatch, capsys):
    def fill(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tables, 'write_json', fill)
    with pytest.raises(ConfigError, match='No space left on device; choose another'):
        run(settings, results_file=str(tmp_path / 'results.json'))
    monkeypatch.undo()
    assert f'{run(settings)["loss"]:.4f}' in capsys.readouterr().out.split('test_resnet ')[-2]


def test_weights_that_cannot_be_read_or_give_no_numbers_are_refused(settings, tmp_path, randomize):
    (tmp_path / 'broken.safetensors').write_bytes(b'no weights at all')
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'empty.pth').touch()
    for name in ('broken.safetensors', 'text.pth', 'empty.pth'):
        with pytest.raises(ConfigError, match=rf'--checkpoint .*{name} holds no weights that torch or safetensors'):
            run(settings, checkpoint=(str(tmp_path / name),))
    model = random_model(randomize)
    model.get_classifier().bias.data[3] = float('nan')
    save_file(model.state_dict(), tmp_path / 'nan.safetensors')
    with pytest.raises(ConfigError, match='logits that are not finite'):
        run(settings, checkpoint=(str(tmp_path / 'nan.safetensors'),))


def test_images_none_of_which_can_be_read_have_no_score(settings, tmp_path):
    (tmp_path / 'data' / SYNSETS[0]).mkdir(parents=True)
    (tmp_path / 'data' / SYNSETS[0] / 'a.png').write_text('no image')
    with pytest.raises(ConfigError, match='has no image with a label that can be read'):
        run(settings, data_dir=str(tmp_path / 'data'), max_bad_images=1., output=str(tmp_path / 'out'))


@pytest.mark.parametrize(('labels', 'message'), [
    (['cat', 'dog'], "--target-key must name a column of whole numbers, got labels such as 'cat'"),
    ([0.5, 1.0], '--target-key must name a column of whole numbers'),
    ([0, 3], '--num-classes: labels must be from 0 to 2, found 0 to 3'),
], ids=str)
def test_labels_that_no_class_stands_for_are_refused(labels, message):
    samples = [(torch.zeros(3, 8, 8), label, -1) for label in labels]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    with pytest.raises(ConfigError, match=message):
        predict(model, DataLoader(samples, 2), create_accelerator('cpu'))


# The command line, and several processes


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(settings, tmp_path):
    data = write_images(tmp_path / 'data', SYNSETS[:7], each=3)  # 21 images: the last batch is padded
    (data / SYNSETS[6] / '2.png').write_bytes(b'')
    settings = dataclasses.replace(
        settings, data_dir=str(data), batch_size=2, max_bad_images=0.1)
    done = run_processes(
        'eval_imagenet.py', '--data-dir', data, '--model', *settings.model, '--checkpoint', *settings.checkpoint,
        '--img-size', 32, '--batch-size', 2, '--workers', 0, '--device', 'cpu', '--max-bad-images', 0.1,
        '--results-file', tmp_path / 'two.json')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('images/s') == 1  # one table, not one a process
    row, two = run(settings), json.loads((tmp_path / 'two.json').read_text())
    assert (row['images'], row['unreadable']) == (20, 1)
    for name in row.keys() - {'images_per_second', 'loss', 'ece'}:
        assert two[name] == row[name], name
    assert two['loss'] == pytest.approx(row['loss'], abs=2e-4) and two['ece'] == pytest.approx(row['ece'], abs=2e-4)


def test_command_line_ends_with_a_sentence(monkeypatch, capsys):
    assert run_main(monkeypatch, 'eval_imagenet.py', '--model', 'a', 'b', '--no-pretrained', '--amp',
                    '--results-file', 'table.txt') == 2
    assert capsys.readouterr() == ('', "eval_imagenet.py: --results-file must end in .json or .csv, got 'table.txt'.\n")
