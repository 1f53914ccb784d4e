"""Shards of scripts/extract_features.py: contents, kinds of data, and resuming after an interruption."""
import dataclasses
import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet_train.data import digest as data_digest
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import create_dataset
from coatnet_train.evaluation import extraction
from coatnet_train.evaluation.feature_shards import read_column
from coatnet_train.evaluation.features import PooledFeatures
from coatnet_train.runtime.cli import ConfigError
from support.constants import CLASSES
from support.crashes import SimulatedCrash, crash_at_write
from support.feature_runs import expected_rows, read_bytes, read_index, read_rows, run, seeded_model, shards_of
from support.images import write_images


def test_safetensors_shards_hold_the_features_of_each_image(settings, image_folder):
    folder = run(settings)
    values, labels, paths = expected_rows(image_folder / 'train', seeded_model())
    columns, found_paths = read_rows(folder)
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)
    assert values.std(0).max() > 1e-3 and found_paths == paths
    assert columns['label'].tolist() == labels and columns['index'].tolist() == list(range(36))
    assert columns['embedding'].dtype == torch.float32 and columns['label'].dtype == torch.int64
    assert [path.name for path in shards_of(folder)] == [f'0000{n}-of-00004.safetensors' for n in range(4)]

    index = read_index(folder)
    assert index['complete'] and index['rows'] == index['images'] == 36 and index['unreadable'] == []
    assert list(index['shards'].values()) == [10, 10, 10, 6] and index['class_names'] == list(CLASSES)
    assert index['input_size'] == [3, 32, 32] and index['shapes'] == {'embedding': [values.shape[1]]}
    assert index['model'] == 'test_resnet' and len(index['mean']) == 3 and index['provenance']['torch']
    assert re.fullmatch('[0-9a-f]{64}', index['weights']) and re.fullmatch('[0-9a-f]{64}', index['data'])


def test_parquet_rows_are_those_of_safetensors(settings, tmp_path):
    datasets = pytest.importorskip('datasets')
    from pyarrow import parquet
    columns, paths = read_rows(run(settings))
    folder = run(settings, format='parquet', output=str(tmp_path / 'parquet'))
    tables = [parquet.read_table(path) for path in shards_of(folder)]
    assert [table.num_rows for table in tables] == [10, 10, 10, 6]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row['path'] for row in rows] == paths and [row['label'] for row in rows] == columns['label'].tolist()
    assert torch.equal(torch.tensor([row['embedding'] for row in rows]), columns['embedding'])
    kind = tables[0].schema.field('embedding').type
    assert kind.list_size == columns['embedding'].shape[1] and str(kind.value_type) == 'float'
    loaded = datasets.load_dataset('parquet', data_files=[str(path) for path in shards_of(folder)], split='train',
                                   cache_dir=str(tmp_path / 'cache'))
    assert list(loaded['path']) == paths


@pytest.mark.parametrize('kind', ['safetensors', 'parquet'])
def test_pyramid_in_float16(settings, kind, tmp_path):
    if kind == 'parquet':
        parquet = pytest.importorskip('pyarrow.parquet')
    changes = dict(features='pyramid', format=kind, out_indices=(1, -1))
    whole, half = (run(settings, dtype=dtype, output=str(tmp_path / dtype), **changes)
                   for dtype in ('float32', 'float16'))
    shapes = read_index(half)['shapes']
    assert list(shapes) == ['level_1', 'level_4'] and shapes['level_1'][1:] == [8, 8] and read_index(half)['rows'] == 36
    if kind == 'safetensors':
        single, double = (read_rows(folder)[0]['level_1'] for folder in (half, whole))
        assert single.dtype == torch.float16 and double.dtype == torch.float32
    else:
        tables = [parquet.read_table(shards_of(folder)[0]) for folder in (half, whole)]
        assert str(tables[0].schema.field('level_1').type).count('fixed_size_list') == 3
        single, double = (torch.tensor(table['level_1'].to_pylist()) for table in tables)
    assert list(single.shape[1:]) == shapes['level_1']
    torch.testing.assert_close(single.float(), double, rtol=1e-3, atol=1e-3)
    assert sum(map(len, read_bytes(half).values())) < 0.7 * sum(map(len, read_bytes(whole).values()))


def test_value_beyond_float16_is_refused_not_written(settings, monkeypatch):
    forward = PooledFeatures.forward
    monkeypatch.setattr(PooledFeatures, 'forward', lambda self, images: {
        name: values + 1e6 * (images.mean() > -9) for name, values in forward(self, images).items()})
    with pytest.raises(ConfigError, match=r'embedding of blue/0\.png is not finite in --dtype float16; take float32'):
        run(settings, dtype='float16')
    assert not shards_of(Path(settings.output) / 'train')
    run(settings, output=settings.output + '32')


# Other data


def test_flat_folder_has_no_labels(settings, image_folder):
    folder = run(settings, data_dir=str(image_folder / 'train' / 'red'), split='')
    columns, paths = read_rows(folder)
    assert columns['label'].tolist() == [-1] * 12 and paths == [f'{index}.png' for index in range(12)]
    assert read_index(folder)['class_names'] == []
    values = expected_rows(image_folder / 'train', seeded_model())[0][24:]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)


def write_hfds(folder: Path, key: str, label_key: str = '', names: bool = False) -> Path:
    import datasets
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(6):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(buffer, 'PNG')
        encoded.append({'bytes': buffer.getvalue(), 'path': None})
    label = datasets.ClassLabel(names=['a', 'b', 'c']) if names else datasets.Value('int64')
    columns, kinds = {key: encoded}, {key: datasets.Image()}
    if label_key:
        columns[label_key], kinds[label_key] = [0, 1, 2, 0, 1, 2], label
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    folder.mkdir()
    data.to_parquet(str(folder / 'train.parquet'))
    return folder


@pytest.mark.parametrize('names', [True, False], ids=['named', 'numbers'])
def test_hfds_set_with_its_own_columns(settings, tmp_path, names):
    pytest.importorskip('datasets')
    source = write_hfds(tmp_path / 'set', 'photo', 'kind', names)
    changes = dict(dataset=f'hfds/{source}', data_dir=str(tmp_path / 'cache'), input_key='photo', target_key='kind')
    folder = run(settings, **changes)
    columns, paths = read_rows(folder)
    assert columns['label'].tolist() == [0, 1, 2, 0, 1, 2] and paths[5] == 'image 5'
    assert read_index(folder)['class_names'] == (['a', 'b', 'c'] if names else [])
    assert columns['embedding'].std(0).max() > 1e-4
    with pytest.raises(ConfigError, match=r'--target-key nothing.*; name the'):
        run(settings, **changes | {'target_key': 'nothing', 'output': settings.output + '2'})


def test_hfds_set_without_labels(settings, tmp_path):
    pytest.importorskip('datasets')
    source = write_hfds(tmp_path / 'set', 'image')
    folder = run(settings, dataset=f'hfds/{source}', data_dir=str(tmp_path / 'cache'))
    assert read_rows(folder)[0]['label'].tolist() == [-1] * 6 and read_index(folder)['class_names'] == []


def test_torchvision_set(settings, image_folder):
    folder = run(settings, dataset='torch/image_folder', data_dir=str(image_folder))
    columns, paths = read_rows(folder)
    assert columns['label'].tolist() == [0] * 12 + [1] * 12 + [2] * 12 and paths[0] == 'image 0'
    assert read_index(folder)['class_names'] == list(CLASSES)


# The same again, and the rest after an interruption


def test_run_killed_at_any_write_goes_on_to_the_same_shards(settings, monkeypatch):
    whole = read_bytes(run(settings, output=settings.output + '-whole'))
    resumed = 0
    for kill_at in range(1, 20):
        output = f'{settings.output}-{kill_at}'
        with crash_at_write(monkeypatch, kill_at):
            try:
                run(settings, output=output)
                break
            except SimulatedCrash:
                folder = Path(output) / 'train'
        done = {path: path.stat().st_mtime_ns for path in shards_of(folder)}
        assert not (folder / 'index.json').exists() or not read_index(folder)['complete'] or kill_at > 6
        run(settings, output=output)
        assert read_bytes(folder) == whole and read_index(folder)['complete']
        assert {path: path.stat().st_mtime_ns for path in done} == done  # a finished shard is not written again
        resumed += 0 < len(done) < 4
    assert kill_at == 8 and resumed == 3


def test_finished_run_computes_nothing_again(settings, monkeypatch):
    folder = run(settings)
    index = (folder / 'index.json').read_bytes()
    monkeypatch.setattr(extraction, 'write_shards', None)
    assert run(settings, batch_size=7) == folder and (folder / 'index.json').read_bytes() == index


def test_other_settings_and_other_data_are_refused_with_both_values(settings, image_folder, tmp_path):
    data = write_images(tmp_path / 'data', train=4, val=1)
    settings = dataclasses.replace(settings, data_dir=str(data))
    folder = run(settings)
    before = read_bytes(folder), (folder / 'index.json').read_bytes()

    def refused(*parts: str, **changes) -> None:
        with pytest.raises(ConfigError) as error:
            run(settings, **changes)
        for part in ('was begun with other settings or data', 'choose another --output', *parts):
            assert part in str(error.value), error.value

    refused('shard_size was 10, is 5', shard_size=5)
    refused('weights was', seed=1)
    refused('dtype was float32, is float16', dtype='float16')
    refused('input_size was [3, 32, 32], is [3, 64, 64]', img_size=64)
    refused('crop_pct was 0.95, is 0.5', crop_pct=0.5)
    refused('crop_mode was center, is squash', crop_mode='squash')
    refused('interpolation was bilinear, is nearest', interpolation='nearest')
    refused('std was', 'is [0.1, 0.2, 0.3]', std=(0.1, 0.2, 0.3))
    refused('mean was', 'is [0.1, 0.2, 0.3]', mean=(0.1, 0.2, 0.3))
    refused('amp was , is bfloat16', amp=True)
    Image.new('RGB', (40, 40)).save(data / 'train' / 'red' / '9.png')
    refused('images was 12, is 13', 'data was')
    (data / 'train' / 'red' / '9.png').unlink()
    Image.new('RGB', (40, 40)).save(data / 'train' / 'red' / '0.png')  # the same name, another image
    refused('data was')
    assert before == (read_bytes(folder), (folder / 'index.json').read_bytes())


def test_swapped_images_of_one_size_are_refused_and_a_copy_elsewhere_is_not(settings, tmp_path):
    data = write_images(tmp_path / 'data', train=2, val=1)
    for path in list(data.rglob('*.png')):
        Image.open(path).save(path.with_suffix('.bmp'))
        path.unlink()
    folder = run(settings, data_dir=str(data))
    before = read_bytes(folder), (folder / 'index.json').read_bytes()
    local = shutil.copytree(data, tmp_path / 'local', copy_function=shutil.copyfile)
    for path in local.rglob('*.bmp'):
        os.utime(path, (1, 1))
    run(settings, data_dir=str(local))
    first, second = data / 'train' / 'red' / '0.bmp', data / 'train' / 'blue' / '0.bmp'
    assert first.stat().st_size == second.stat().st_size
    first.rename(data / 'kept')
    second.rename(first)
    (data / 'kept').rename(second)
    with pytest.raises(ConfigError, match='data was'):
        run(settings, data_dir=str(data))
    assert before == (read_bytes(folder), (folder / 'index.json').read_bytes())


def test_what_is_beyond_the_first_bytes_is_compared_by_size_and_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(data_digest, 'HASHED', 0)
    data = write_images(tmp_path / 'data', train=2, val=1)
    path = data / 'train' / 'red' / '1.png'
    path.write_bytes(bytes(10_000))
    found = []
    for content in (bytes(10_000), bytes(5000) + b'x' + bytes(4999), bytes(10_001)):
        path.write_bytes(content)
        dataset, names = create_dataset(DataSettings(data_dir=str(data)), 'train')
        found.append(data_digest.compute_digest(dataset, names))
    assert len(set(found)) == 3


@pytest.mark.parametrize('kind', ['torch/image_folder', 'hfds', 'wds/'])
def test_every_source_has_a_digest_of_its_content(kind, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    found = []
    for name, seed in (('one', 1), ('same', 1), ('other', 2)):
        folder = write_images(tmp_path / name, train=1, val=1)
        Image.new('RGB', (4, 4), (seed, 0, 0)).save(folder / 'train' / 'red' / '0.png')
        settings = DataSettings(data_dir=str(folder / 'train'), dataset=kind, workers=0)
        if kind == 'hfds':
            settings = DataSettings(data_dir=str(tmp_path / f'{name}-cache'), dataset=f'hfds/{folder}')
        if kind == 'wds/':
            with tarfile.open(folder / 'a.tar', 'w') as tar:
                for part, content in (('0.bmp', (folder / 'train' / 'red' / '0.png').read_bytes()), ('0.cls', b'0')):
                    info = tarfile.TarInfo(part)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            settings = DataSettings(data_dir=str(folder), dataset=kind, workers=0)
        split = 'a.tar|1' if kind == 'wds/' else 'train'
        dataset, names = create_dataset(settings, split, num_classes=3)
        found.append(data_digest.compute_digest(dataset, names))
    assert found[0] == found[1] != found[2]


def test_names_that_are_no_utf8_are_escaped_alike_in_both_formats(settings, tmp_path):
    data = write_images(tmp_path / 'data', train=2, val=1)
    (data / 'train' / 'red').rename(data / 'train' / os.fsdecode(b'r\xe9d'))
    (data / 'train' / 'blue' / '0.png').write_bytes(b'')
    (data / 'train' / 'blue' / '0.png').rename(data / 'train' / 'blue' / os.fsdecode(b'\xff.png'))
    changes = dict(data_dir=str(data), max_bad_images=1.0)
    folder = run(settings, **changes)
    index = read_index(folder)
    assert index['class_names'] == ['blue', 'green', r'r\xe9d'] and index['unreadable'] == [r'blue/\xff.png']
    _, paths = read_rows(folder)
    assert paths[-2:] == [r'r\xe9d/0.png', r'r\xe9d/1.png']
    parquet = pytest.importorskip('pyarrow.parquet')
    folder = run(settings, **changes, format='parquet', output=str(tmp_path / 'parquet'))
    assert parquet.read_table(shards_of(folder)[0])['path'].to_pylist() == paths


# Images that cannot be read


@pytest.mark.parametrize('kind', ['safetensors', 'parquet'])
def test_unreadable_images_have_no_row_and_are_listed(settings, tmp_path, kind, capsys):
    if kind == 'parquet':
        pytest.importorskip('pyarrow')
    data = write_images(tmp_path / 'data', train=4, val=1)
    whole = read_rows(run(settings, data_dir=str(data), output=settings.output + '-whole'))[0]['embedding']
    broken = data / 'train' / 'green' / '1.png'
    broken.write_bytes(broken.read_bytes()[:100])
    (data / 'train' / 'red' / '3.png').write_text('no image')
    changes = dict(data_dir=str(data), shard_size=5, batch_size=2, format=kind)

    with pytest.raises(ConfigError, match=r'--max-bad-images 0\.1 allows 1 .* 12 .*red/3\.png is number 2'):
        run(settings, max_bad_images=0.1, **changes)
    folder = Path(settings.output) / 'train'
    assert len(shards_of(folder)) == 2 and not read_index(folder)['complete']
    with pytest.raises(ConfigError, match=r'--max-bad-images 0\.1 allows'):  # those of finished shards count too
        run(settings, max_bad_images=0.1, **changes)
    capsys.readouterr()
    run(settings, max_bad_images=0.2, **changes)
    out = capsys.readouterr()
    assert len(re.findall(r'unreadable, skipped: .*green/1\.png', out.out + out.err)) == 1
    index = read_index(folder)
    assert index['unreadable'] == ['green/1.png', 'red/3.png'] and index['rows'] == 10
    assert list(index['shards'].values()) == [5, 4, 1]
    kept = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(ConfigError, match=r'--max-bad-images 0\.1 allows'):  # also if the set is finished
        run(settings, max_bad_images=0.1, **changes)
    numbers = torch.cat([read_column(path, 'index') for path in shards_of(folder)])
    values = torch.cat([read_column(path, 'embedding') for path in shards_of(folder)])
    assert numbers.tolist() == kept and values.isfinite().all()
    torch.testing.assert_close(values, whole[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['safetensors', 'parquet'])
def test_shard_without_a_readable_image(settings, tmp_path, kind):
    if kind == 'parquet':
        pytest.importorskip('pyarrow')
    data = write_images(tmp_path / 'data', train=2, val=1)
    for index in range(2):
        (data / 'train' / 'blue' / f'{index}.png').write_text('no image')
    folder = run(settings, data_dir=str(data), shard_size=2, max_bad_images=1.0, format=kind)
    assert list(read_index(folder)['shards'].values()) == [0, 2, 2]
    assert read_column(shards_of(folder)[0], 'embedding').shape[0] == 0
