"""scripts/extract_features.py: settings that it rejects before the first image, command line, several processes."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import extract_features
from coatnet_train.runtime.cli import ConfigError
from support.closeness import assert_same_up_to_rounding
from support.commands import run_main, run_processes
from support.feature_runs import read_index, read_rows, run, shards_of
from support.images import write_images


@pytest.mark.parametrize(('changes', 'parts'), [
    ({'features': 'tokens'}, ['--features', 'pooled or pyramid', "'tokens'"]),
    ({'format': 'npy'}, ['--format', 'safetensors or parquet', "'npy'"]),
    ({'dtype': 'bfloat16'}, ['--dtype', 'float32 or float16', "'bfloat16'"]),
    ({'shard_size': 0}, ['--shard-size', 'greater than 0', 'got 0']),
    ({'batch_size': -1}, ['--batch-size', 'greater than 0', 'got -1']),
    ({'workers': -1}, ['--workers', 'from 0 to 1024', 'got -1']),
    ({'max_bad_images': 1.5}, ['--max-bad-images', 'from 0 to 1', 'got 1.5']),
    ({'seed': -1}, ['--seed', 'from 0 to', 'got -1']),
    ({'device': 'gpu7'}, ['--device', 'gpu7']),
    ({'amp': True, 'amp_dtype': 'float16'}, ['--amp-dtype', 'float16', 'bfloat16']),
    ({'amp_dtype': 'int8'}, ['--amp-dtype', "'int8'"]),
    ({'out_indices': (1,)}, ['--out-indices (1,)', 'needs --features pyramid', 'got pooled']),
    ({'features': 'pyramid', 'out_indices': (9,)}, ['--features pyramid --out-indices 9', 'test_resnet', 'out of']),
    ({'model_kwargs': ('global_pool=',), 'num_classes': 0}, ['--features pooled', 'test_resnet', 'not 1 dimension;']),
    ({'model': 'test_resnett'}, ['--model', 'test_resnett', 'mean test_resnet']),
    ({'checkpoint': 'no.pt'}, ['--checkpoint', 'no.pt', 'not a file']),
    ({'split': 'nothing'}, ['--data-dir', 'no folder nothing']),
    ({'data_dir': 'no/such'}, ['--data-dir', 'no/such', 'not a folder']),
    ({'dataset': 'wds/things'}, ['--dataset wds/things', 'stream', 'hfds/']),
    ({'dataset': 'torch/cifar10'}, ['--dataset torch/cifar10', 'cannot be read', '--dataset-download']),
    ({'mean': (0.5, 0.5)}, ['mean', '3', '2']),
    ({'knn': True, 'features': 'pyramid'}, ['--knn', '--features pooled', 'got pyramid']),
    ({'linear_probe': True, 'features': 'pyramid'}, ['--linear-probe', '--features pooled']),
    ({'knn': True, 'val_split': 'train'}, ['--knn', '--val-split', "'train' for both"]),
    ({'knn': True, 'knn_k': 0}, ['--knn-k', 'greater than 0', 'got 0']),
    ({'knn': True, 'knn_temperature': 0.}, ['--knn-temperature', 'greater than 0', 'got 0']),
    ({'knn': True, 'knn_k': 37}, ['--knn-k', 'at most the 36 images', 'got 37']),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_bad_setting_is_refused_in_one_sentence_and_nothing_is_written(settings, changes, parts):
    with pytest.raises(ConfigError) as error:
        run(settings, **changes)
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert part in message, message
    assert not Path(settings.output).exists()


def test_images_beside_folders_of_classes_are_refused(settings, tmp_path):
    data = write_images(tmp_path / 'mixed', train=2, val=2)
    (data / 'train' / 'red' / '0.png').rename(data / 'train' / 'stray.png')
    with pytest.raises(ConfigError, match=r'--data-dir .*stray\.png lies beside folders of classes; move'):
        run(settings, data_dir=str(data))


def test_splits_of_different_classes_or_none_have_no_accuracy(settings, tmp_path):
    data = write_images(tmp_path / 'data', train=4, val=2)
    (data / 'val' / 'red').rename(data / 'val' / 'crimson')
    with pytest.raises(ConfigError, match='--knn needs the same classes in both splits, but crimson, red are'):
        run(settings, data_dir=str(data), knn=True, knn_k=2)
    flat = tmp_path / 'flat'
    (data / 'train' / 'red').rename(tmp_path / 'keep')
    for split in ('train', 'val'):
        (flat / split).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(flat / split / 'a.png')
    with pytest.raises(ConfigError, match=r"--linear-probe needs labels, and split 'train' has images without"):
        run(settings, data_dir=str(flat), linear_probe=True)


def test_too_few_images_for_a_probe(settings, tmp_path):
    pytest.importorskip('sklearn')
    data = write_images(tmp_path / 'data', train=1, val=1)
    with pytest.raises(ConfigError, match='--linear-probe needs more images or classes in --split'):
        run(settings, data_dir=str(data), linear_probe=True)


@pytest.mark.parametrize(('changes', 'package'), [({'format': 'parquet'}, 'pyarrow'),
                                                  ({'linear_probe': True}, 'scikit-learn')])
def test_missing_package_is_named(settings, monkeypatch, changes, package):
    monkeypatch.setitem(sys.modules, {'scikit-learn': 'sklearn'}.get(package, package), None)
    with pytest.raises(ConfigError, match=f'needs {package}, which is not installed'):
        run(settings, **changes)


def test_unwritable_output_is_refused(settings, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(ConfigError, match=r'--output .*file.* cannot be written.*choose another'):
        run(settings, output=str(tmp_path / 'file'))


# The command line, and several processes


def test_help_explains_each_setting(monkeypatch, capsys):
    assert run_main(monkeypatch, 'extract_features.py', '--help') == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(extract_features.ExtractionSettings):
        assert f'--{field.name.replace("_", "-")} ' in out or f'--no-{field.name}'.replace('_', '-') in out, field.name
    for text in ('Images in a shard;', 'Processes that read images', '(default: pooled)', '--knn, --no-knn'):
        assert text in out


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_write_the_files_of_one(settings, tmp_path):
    data = write_images(tmp_path / 'data')
    (data / 'train' / 'red' / '8.png').write_text('no image')  # in the second process's part
    arguments = ['--data-dir', str(data), '--model', 'test_resnet', '--img-size', '32', '--batch-size', '4',
                 '--shard-size', '10', '--workers', '0', '--device', 'cpu', '--knn', '--knn-k', '5',
                 '--max-bad-images', '0.1']
    two = run_processes('extract_features.py', *arguments, '--output', tmp_path / '2')
    assert two.returncode == 0, two.stderr
    run(settings, data_dir=str(data), knn=True, knn_k=5, max_bad_images=0.1, output=str(tmp_path / '1'))
    for split in ('train', 'validation'):
        (one, paths), (other, others) = (read_rows(tmp_path / name / split) for name in '12')
        assert paths == others and one['label'].equal(other['label'])
        assert_same_up_to_rounding(other['embedding'], one['embedding'])  # two processes choose their own kernels
        files = [[path.name for path in shards_of(tmp_path / name / split)] for name in '12']
        assert files[0] == files[1] != []
        first, second = (read_index(tmp_path / name / split) for name in '12')
        del first['provenance'], second['provenance']
        assert first == second and first['complete']
        assert first['unreadable'] == (['red/8.png'] if split == 'train' else [])
    scores = [json.loads((tmp_path / name / 'summary.json').read_text())['knn'] for name in '12']
    assert scores[0] == scores[1]
    assert two.stdout.count('5 nearest neighbours') == 1 and '2 x cpu' in two.stdout
    assert 'train: 36 rows' not in two.stdout and two.stdout.count('train: 35 rows, 1 unreadable, 4 x ') == 1
    assert 'img/s' not in two.stderr and '\r' not in two.stderr  # no bar in a log


def test_bad_command_ends_with_code_2(settings, monkeypatch, capsys):
    assert run_main(monkeypatch, 'extract_features.py', '--data-dir', settings.data_dir, '--model', 'test_resnet',
                    '--dtype', 'int8') == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('extract_features.py: --dtype') and err.count('\n') == 1
