"""scripts/extract_features.py on tiny networks and generated pictures: what it takes, writes, resumes and refuses."""
import dataclasses
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import extract_features
import numpy as np
import pytest
import run_folder
import timm
import torch
import torch.nn.functional as F
from features import PROBE_STRENGTHS, PooledFeatures, PyramidFeatures, knn_top1, linear_probe
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from settings import SettingsError
from timm.data import create_transform, resolve_data_config
from timm.utils import random_seed

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm

ROOT = Path(__file__).parents[1]
CLASSES = ('blue', 'green', 'red')


def write_pictures(folder: Path, classes=CLASSES, train: int = 12, val: int = 5) -> Path:
    """Write noisy pictures whose colour tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 150, (36, 40, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture
def settings(pictures, tmp_path) -> extract_features.Settings:
    return extract_features.Settings(
        data_dir=str(pictures), model='test_resnet', img_size=32, batch_size=4, shard_size=10, workers=0, device='cpu',
        output=str(tmp_path / 'features'))


def run(settings: extract_features.Settings, **changes) -> Path:
    """Extract and return the folder of --split."""
    settings = dataclasses.replace(settings, **changes)
    extract_features.main(settings)
    return Path(settings.output) / (settings.split or 'pictures')


def read_index(folder: Path) -> dict:
    return json.loads((folder / 'index.json').read_text())


def shards_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in ('.safetensors', '.parquet'))


def read_rows(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Columns and paths of all safetensors shards."""
    columns, paths = [], []
    for path in shards_of(folder):
        with safe_open(path, 'pt') as shard:
            columns.append({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118  safe_open is no dict
            paths += json.loads(shard.metadata()['paths'])
    return {name: torch.cat([part[name] for part in columns]) for name in columns[0]}, paths


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards_of(folder)}


class Killed(BaseException):
    """Stands for the end of the process: nothing in the script may catch it."""


# What is taken


def norm_of(model: torch.nn.Module, values: torch.Tensor) -> torch.Tensor:
    norm = model.head.norm
    return F.layer_norm(values, (values.shape[-1],), norm.weight, norm.bias, norm.eps)


POOLED = {  # name: pooled features from forward_features, written out
    'test_resnet': lambda model, x: x.mean((2, 3)),
    'test_efficientnet': lambda model, x: x.mean((2, 3)),
    'test_convnext': lambda model, x: norm_of(model, x.mean((2, 3))),
    'test_mambaout': lambda model, x: norm_of(model, x.mean((1, 2))),
    'mambaout_femto': lambda model, x: norm_of(model, x.mean((1, 2))),
    'test_vit': lambda model, x: x[:, 0],
    'test_coatnet': lambda model, x: x.mean((2, 3)),
    'coatnet_0_224': lambda model, x: norm_of(model, x.mean((2, 3))),
    'swin_tiny_patch4_window7_224': lambda model, x: x.mean((1, 2)),
    'coatnet_pico_64': lambda model, x: norm_of(model, x.mean((2, 3))),
    'dynamicconvnet_pico_64': lambda model, x: norm_of(model, x.mean((2, 3))),
}


@pytest.mark.parametrize('name', POOLED)
def test_pooled_features_are_what_the_definition_gives(name, randomize):
    size = {} if name in ('test_vit', 'test_efficientnet', 'test_resnet', 'test_convnext', 'mambaout_femto',
                          'test_mambaout') else {'img_size': 64}
    model = randomize(timm.create_model(name, num_classes=5, **size)).eval()
    input_size = model.pretrained_cfg['input_size'] if name == 'test_vit' else (3, 64, 64)
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(1))
    hidden = getattr(getattr(model, 'head', None), 'pre_logits', None)
    with torch.no_grad():
        maps = model.forward_features(images)
        expected = POOLED[name](model, maps)
        logits = model(images)
        if isinstance(hidden, torch.nn.Sequential):  # the definition is right if the rest of the head gives the logits
            classified = model.head.fc(hidden(expected))
        else:
            classified = model.get_classifier()(expected)
        torch.testing.assert_close(classified, logits, rtol=1e-4, atol=1e-4)
        found = PooledFeatures(model).eval()(images)
    assert list(found) == ['embedding'] and found['embedding'].std() > 1e-3
    torch.testing.assert_close(found['embedding'], expected, rtol=1e-4, atol=1e-4)


def test_hidden_layer_of_the_zoo_would_change_the_features():
    """What the rule above guards against: timm's own ways keep the tanh layer, or drop the norm as well."""
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model('coatnet_pico_64').eval()
    with torch.no_grad():
        before = model.forward_head(model.forward_features(images), pre_logits=True)
        found = PooledFeatures(model)(images)['embedding']
    assert before.abs().max() <= 1 < found.abs().max() and not torch.allclose(before, found, atol=0.1)


@pytest.mark.parametrize(('name', 'out_indices', 'levels'), [
    ('coatnet_pico_64', (), [0, 1, 2, 3, 4]), ('coatnet_pico_64', (1, 3), [1, 3]), ('test_resnet', (-1, 2), [4, 2]),
    ('test_convnext', (), [0, 1, 2, 3]), ('test_vit', (1, 3), [1, 3]),
], ids=str)
def test_pyramid_is_that_of_features_only(name, out_indices, levels, randomize):
    model = randomize(timm.create_model(name)).eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    reference = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay={'state_dict': model.state_dict()},
        out_indices=sorted(levels)).eval()
    with torch.no_grad():
        expected = dict(zip((f'level_{level}' for level in sorted(levels)), reference(images), strict=True))
        found = PyramidFeatures(model, out_indices)(images)
    assert sorted(found) == sorted(expected)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4)


# What is written


def expected_rows(folder: Path, model: torch.nn.Module, mode: str = 'RGB') -> tuple[torch.Tensor, list, list]:
    """Embeddings of a model that ends in a mean over positions, labels and paths, read with PIL alone."""
    transform = create_transform(**resolve_data_config({'input_size': (len(mode), 32, 32)}, model=model))
    files = [(folder / name / f'{index}.png', label) for label, name in enumerate(CLASSES)
             for index in range(len(list((folder / name).iterdir())))]
    with torch.no_grad():
        values = torch.cat([model.forward_features(transform(Image.open(file).convert(mode))[None]).mean((2, 3))
                            for file, _ in files])
    return values, [label for _, label in files], [str(file.relative_to(folder)) for file, _ in files]


def seeded_model(seed: int = 42, **arguments: object) -> torch.nn.Module:
    random_seed(seed)
    return timm.create_model('test_resnet', **arguments).eval()


def test_safetensors_shards_hold_the_features_of_each_picture(settings, pictures):
    folder = run(settings)
    values, labels, paths = expected_rows(pictures / 'train', seeded_model())
    columns, found_paths = read_rows(folder)
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)
    assert values.std(0).max() > 1e-3 and found_paths == paths
    assert columns['label'].tolist() == labels and columns['index'].tolist() == list(range(36))
    assert columns['embedding'].dtype == torch.float32 and columns['label'].dtype == torch.int64
    assert [path.name for path in shards_of(folder)] == [f'0000{n}-of-00004.safetensors' for n in range(4)]

    index = read_index(folder)
    assert index['complete'] and index['rows'] == index['pictures'] == 36 and index['unreadable'] == []
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
    with pytest.raises(SettingsError, match=r'embedding of blue/0\.png is not finite in --dtype float16; take float32'):
        run(settings, dtype='float16')
    assert not shards_of(Path(settings.output) / 'train')
    run(settings, output=settings.output + '32')


# Other data


def test_flat_folder_has_no_labels(settings, pictures):
    folder = run(settings, data_dir=str(pictures / 'train' / 'red'), split='')
    columns, paths = read_rows(folder)
    assert columns['label'].tolist() == [-1] * 12 and paths == [f'{index}.png' for index in range(12)]
    assert read_index(folder)['class_names'] == []
    values = expected_rows(pictures / 'train', seeded_model())[0][24:]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)


def test_pictures_beside_folders_of_classes_are_refused(settings, tmp_path):
    data = write_pictures(tmp_path / 'mixed', train=2, val=2)
    (data / 'train' / 'red' / '0.png').rename(data / 'train' / 'stray.png')
    with pytest.raises(SettingsError, match=r'--data-dir .*stray\.png lies beside folders of classes; move'):
        run(settings, data_dir=str(data))


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
    assert columns['label'].tolist() == [0, 1, 2, 0, 1, 2] and paths[5] == 'picture 5'
    assert read_index(folder)['class_names'] == (['a', 'b', 'c'] if names else [])
    assert columns['embedding'].std(0).max() > 1e-4
    with pytest.raises(SettingsError, match=r'--target-key nothing of --dataset hfds/.* no column of whole .*name'):
        run(settings, **changes | {'target_key': 'nothing', 'output': settings.output + '2'})


def test_hfds_set_without_labels(settings, tmp_path):
    pytest.importorskip('datasets')
    source = write_hfds(tmp_path / 'set', 'image')
    folder = run(settings, dataset=f'hfds/{source}', data_dir=str(tmp_path / 'cache'))
    assert read_rows(folder)[0]['label'].tolist() == [-1] * 6 and read_index(folder)['class_names'] == []


def test_torchvision_set(settings, pictures):
    folder = run(settings, dataset='torch/image_folder', data_dir=str(pictures))
    columns, paths = read_rows(folder)
    assert columns['label'].tolist() == [0] * 12 + [1] * 12 + [2] * 12 and paths[0] == 'picture 0'
    assert read_index(folder)['class_names'] == list(CLASSES)


# The same again, and the rest after an interruption


def test_run_killed_at_any_write_goes_on_to_the_same_shards(settings, monkeypatch):
    whole = read_bytes(run(settings, output=settings.output + '-whole'))
    replace, resumed = os.replace, 0
    for kill_at in range(1, 20):
        output, calls = f'{settings.output}-{kill_at}', 0

        def kill(*args, kill_at=kill_at):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, 'replace', kill)
            try:
                run(settings, output=output)
                break
            except Killed:
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
    monkeypatch.setattr(extract_features, 'write_shards', None)
    assert run(settings, batch_size=7) == folder and (folder / 'index.json').read_bytes() == index


def test_other_settings_and_other_data_are_refused_with_both_values(settings, pictures, tmp_path):
    data = write_pictures(tmp_path / 'data', train=4, val=1)
    settings = dataclasses.replace(settings, data_dir=str(data))
    folder = run(settings)
    before = read_bytes(folder), (folder / 'index.json').read_bytes()

    def refused(*parts: str, **changes) -> None:
        with pytest.raises(SettingsError) as error:
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
    refused('pictures was 12, is 13', 'data was')
    (data / 'train' / 'red' / '9.png').unlink()
    Image.new('RGB', (40, 40)).save(data / 'train' / 'red' / '0.png')  # the same name, another picture
    refused('data was')
    assert before == (read_bytes(folder), (folder / 'index.json').read_bytes())


def test_batch_size_and_workers_leave_the_features(settings):
    first, second = (read_rows(run(settings, batch_size=size, workers=workers, output=f'{settings.output}{size}'))
                     for size, workers in ((4, 0), (7, 1)))
    assert first[1] == second[1]
    torch.testing.assert_close(first[0]['embedding'], second[0]['embedding'], rtol=1e-4, atol=1e-5)


# Pictures that cannot be read


@pytest.mark.parametrize('kind', ['safetensors', 'parquet'])
def test_unreadable_pictures_have_no_row_and_are_listed(settings, tmp_path, kind, capsys):
    if kind == 'parquet':
        pytest.importorskip('pyarrow')
    data = write_pictures(tmp_path / 'data', train=4, val=1)
    whole = read_rows(run(settings, data_dir=str(data), output=settings.output + '-whole'))[0]['embedding']
    broken = data / 'train' / 'green' / '1.png'
    broken.write_bytes(broken.read_bytes()[:100])
    (data / 'train' / 'red' / '3.png').write_text('no picture')
    changes = dict(data_dir=str(data), shard_size=5, batch_size=2, format=kind)

    with pytest.raises(SettingsError, match=r'--max-bad-images 0\.1 allows 1 .* 12 .*red/3\.png is number 2'):
        run(settings, max_bad_images=0.1, **changes)
    folder = Path(settings.output) / 'train'
    assert len(shards_of(folder)) == 2 and not read_index(folder)['complete']
    with pytest.raises(SettingsError, match=r'--max-bad-images 0\.1 allows'):  # a finished shard's count as well
        run(settings, max_bad_images=0.1, **changes)
    capsys.readouterr()
    run(settings, max_bad_images=0.2, **changes)
    out = capsys.readouterr()
    assert len(re.findall(r'unreadable, skipped: .*green/1\.png', out.out + out.err)) == 1
    index = read_index(folder)
    assert index['unreadable'] == ['green/1.png', 'red/3.png'] and index['rows'] == 10
    assert list(index['shards'].values()) == [5, 4, 1]
    kept = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(SettingsError, match=r'--max-bad-images 0\.1 allows'):  # nor does a finished set pass
        run(settings, max_bad_images=0.1, **changes)
    numbers = torch.cat([extract_features.read_column(path, 'index') for path in shards_of(folder)])
    values = torch.cat([extract_features.read_column(path, 'embedding') for path in shards_of(folder)])
    assert numbers.tolist() == kept and values.isfinite().all()
    torch.testing.assert_close(values, whole[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['safetensors', 'parquet'])
def test_shard_without_a_readable_picture(settings, tmp_path, kind):
    if kind == 'parquet':
        pytest.importorskip('pyarrow')
    data = write_pictures(tmp_path / 'data', train=2, val=1)
    for index in range(2):
        (data / 'train' / 'blue' / f'{index}.png').write_text('no picture')
    folder = run(settings, data_dir=str(data), shard_size=2, max_bad_images=1.0, format=kind)
    assert list(read_index(folder)['shards'].values()) == [0, 2, 2]
    assert extract_features.read_column(shards_of(folder)[0], 'embedding').shape[0] == 0


# Accuracy


def brute_force_knn(train, train_labels, val, val_labels, k, temperature) -> float:
    right = 0
    for x, label in zip(val.tolist(), val_labels.tolist(), strict=True):
        votes = {}
        found = []
        for y, other in zip(train.tolist(), train_labels.tolist(), strict=True):
            length = (sum(a * a for a in x) * sum(b * b for b in y)) ** .5
            found.append((sum(a * b for a, b in zip(x, y, strict=True)) / length, other))
        for similarity, other in sorted(found, reverse=True)[:k]:
            votes[other] = votes.get(other, 0) + np.exp(similarity / temperature)
        right += max(votes, key=votes.get) == label
    return 100 * right / len(val)


@pytest.mark.parametrize(('k', 'temperature'), [(1, 0.07), (20, 0.07), (20, 10.), (60, 0.07)])
def test_knn_equals_its_definition(k, temperature):
    torch.manual_seed(0)
    centres = torch.randn(4, 8)
    train_labels, val_labels = torch.arange(60) % 4, torch.arange(300) % 4
    train = centres[train_labels] + torch.randn(60, 8) * 1.5
    val = centres[val_labels] + torch.randn(300, 8) * 1.5
    found = knn_top1(train, train_labels, val, val_labels, k, temperature)
    assert found == pytest.approx(brute_force_knn(train, train_labels, val, val_labels, k, temperature))
    assert 30 < found < 95


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1., 0.], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    query, answer = torch.tensor([[1., 0.1]]), torch.tensor([0])
    assert knn_top1(train, labels, query, answer, k=3, temperature=0.07) == 100  # one near beats two far
    assert knn_top1(train, labels, query, answer, k=3, temperature=10.) == 0     # by number alone it does not


def test_linear_probe_is_a_logistic_regression_that_never_saw_val():
    pytest.importorskip('sklearn')
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(3, 20)), np.arange(240) % 3
    scale = 10. ** rng.integers(-3, 3, 20)  # standardising matters
    features = (centres[labels] * 0.6 + rng.normal(size=(240, 20))) * scale
    train, train_labels, val, val_labels = features[:150], labels[:150], features[150:], labels[150:]
    found = linear_probe(train, train_labels, val, val_labels)
    shuffled = linear_probe(train, train_labels, val[::-1] * 3, np.roll(val_labels, 1))
    assert found['converged'] and found['C'] in PROBE_STRENGTHS
    assert (found['C'], found['held_out_top1']) == (shuffled['C'], shuffled['held_out_top1'])
    assert shuffled['top1'] < found['top1']

    # the same minimum by torch: cross-entropy, plus half the squared weights / C
    x, v = (torch.tensor((part - train.mean(0)) / train.std(0)) for part in (train, val))
    weight, bias = torch.zeros(3, 20, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=500,
                                  line_search_fn='strong_wolfe', tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, torch.tensor(train_labels), reduction='sum')
        loss = loss + weight.square().sum() / 2 / found['C']
        loss.backward()
        return loss

    optimizer.step(closure)
    top1 = 100 * ((v @ weight.T + bias).argmax(1) == torch.tensor(val_labels)).double().mean().item()
    assert found['top1'] == pytest.approx(top1, abs=1.2) and 60 < top1 < 99


def test_knn_and_probe_of_the_shards_in_one_go(settings, pictures, capsys):
    pytest.importorskip('sklearn')
    run(settings, knn=True, knn_k=5, knn_temperature=0.1, linear_probe=True)
    out = capsys.readouterr().out
    summary = json.loads((Path(settings.output) / 'summary.json').read_text())
    model = seeded_model()
    (train, train_labels, _), (val, val_labels, _) = (expected_rows(pictures / s, model) for s in ('train', 'val'))
    expected = brute_force_knn(train, torch.tensor(train_labels), val, torch.tensor(val_labels), 5, 0.1)
    assert summary['knn'] == {'top1': pytest.approx(expected), 'k': 5, 'temperature': 0.1}
    assert summary['linear_probe']['top1'] > 90 and summary['rows'] == {'train': 36, 'validation': 15}
    assert f'5 nearest neighbours: top-1 {expected:.2f} %' in out
    assert f'linear probe: top-1 {summary["linear_probe"]["top1"]:.2f} %' in out
    assert read_index(Path(settings.output) / 'validation')['rows'] == 15


def test_val_split_is_left_alone_without_a_score(settings):
    run(settings, val_split='no such split')
    assert not (Path(settings.output) / 'validation').exists()


# The model's options


def test_checkpoint_is_loaded_strictly(settings, pictures, tmp_path):
    model = seeded_model(7, num_classes=3)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    changes = dict(checkpoint=str(tmp_path / 'weights.safetensors'), num_classes=3)
    columns, _ = read_rows(run(settings, **changes))
    values = expected_rows(pictures / 'train', model)[0]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)
    with pytest.raises(SettingsError, match=r'cannot be built'):
        run(settings, **changes | {'num_classes': 4, 'output': settings.output + '2'})
    pyramid = run(settings, features='pyramid', out_indices=(4,), output=settings.output + '3', **changes)
    maps = read_rows(pyramid)[0]['level_4']  # the same weights, whose maps have this mean
    torch.testing.assert_close(maps.mean((2, 3)), values, rtol=1e-4, atol=1e-5)
    assert read_index(pyramid)['weights'] == read_index(Path(settings.output) / 'train')['weights']


def test_local_dir_and_pretrained(settings, pictures, tmp_path):
    model = seeded_model(7, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'run', {'label_names': list(CLASSES)}, safe_serialization=True)
    columns, _ = read_rows(run(settings, model=f'local-dir:{tmp_path / "run"}', pretrained=True))
    values = expected_rows(pictures / 'train', model)[0]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)


def test_grey_pictures_model_kwargs_and_seed(settings, pictures):
    folder = run(settings, in_chans=1, model_kwargs=('act_layer=silu',), seed=3, mean=(0.5,), std=(0.5,))
    model = seeded_model(3, in_chans=1, act_layer='silu')
    model.pretrained_cfg |= {'mean': (0.5,), 'std': (0.5,)}
    values = expected_rows(pictures / 'train', model, 'L')[0]
    torch.testing.assert_close(read_rows(folder)[0]['embedding'], values, rtol=1e-4, atol=1e-5)
    assert read_index(folder)['model_kwargs'] == ['act_layer=silu'] and read_index(folder)['mean'] == [0.5]


def test_mixed_precision_changes_the_features_a_little(settings):
    exact, mixed = (read_rows(run(settings, amp=amp, output=f'{settings.output}{amp}'))[0]['embedding']
                    for amp in (False, True))
    assert mixed.dtype == torch.float32 and not torch.equal(exact, mixed)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.05)


def test_class_map_gives_the_labels(settings, tmp_path):
    (tmp_path / 'names.txt').write_text('red\nblack\nblue\ngreen\n')
    folder = run(settings, class_map=str(tmp_path / 'names.txt'))
    assert read_rows(folder)[0]['label'].tolist() == [2] * 12 + [3] * 12 + [0] * 12
    assert read_index(folder)['class_names'] == ['red', 'black', 'blue', 'green']


# What is refused, in one sentence, before the first picture


@pytest.mark.parametrize(('changes', 'parts'), [
    ({'features': 'tokens'}, ['--features', 'pooled or pyramid', "'tokens'"]),
    ({'format': 'npy'}, ['--format', 'safetensors or parquet', "'npy'"]),
    ({'dtype': 'bfloat16'}, ['--dtype', 'float32 or float16', "'bfloat16'"]),
    ({'shard_size': 0}, ['--shard-size', 'greater than 0', 'got 0']),
    ({'batch_size': -1}, ['--batch-size', 'greater than 0', 'got -1']),
    ({'workers': -1}, ['--workers', 'at least 0', 'got -1']),
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
    ({'knn': True, 'knn_k': 37}, ['--knn-k', 'at most the 36 pictures', 'got 37']),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_bad_setting_is_refused_in_one_sentence_and_nothing_is_written(settings, changes, parts):
    with pytest.raises(SettingsError) as error:
        run(settings, **changes)
    message = str(error.value)
    assert '\n' not in message
    for part in parts:
        assert part in message, message
    assert not Path(settings.output).exists()


def test_splits_of_different_classes_or_none_have_no_accuracy(settings, tmp_path):
    data = write_pictures(tmp_path / 'data', train=4, val=2)
    (data / 'val' / 'red').rename(data / 'val' / 'crimson')
    with pytest.raises(SettingsError, match='--knn needs the same classes in both splits, but crimson, red are'):
        run(settings, data_dir=str(data), knn=True, knn_k=2)
    flat = tmp_path / 'flat'
    (data / 'train' / 'red').rename(tmp_path / 'keep')
    for split in ('train', 'val'):
        (flat / split).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(flat / split / 'a.png')
    with pytest.raises(SettingsError, match=r"--linear-probe needs labels, and split 'train' has pictures without"):
        run(settings, data_dir=str(flat), linear_probe=True)


def test_too_few_pictures_for_a_probe(settings, tmp_path):
    pytest.importorskip('sklearn')
    data = write_pictures(tmp_path / 'data', train=1, val=1)
    with pytest.raises(SettingsError, match='--linear-probe needs more pictures or classes in --split'):
        run(settings, data_dir=str(data), linear_probe=True)


@pytest.mark.parametrize(('changes', 'package'), [({'format': 'parquet'}, 'pyarrow'),
                                                  ({'linear_probe': True}, 'scikit-learn')])
def test_missing_package_is_named(settings, monkeypatch, changes, package):
    monkeypatch.setitem(sys.modules, {'scikit-learn': 'sklearn'}.get(package, package), None)
    with pytest.raises(SettingsError, match=f'needs {package}, which is not installed'):
        run(settings, **changes)


def test_unwritable_output_is_refused(settings, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(SettingsError, match=r'--output .*file.* cannot be written.*choose another'):
        run(settings, output=str(tmp_path / 'file'))


# The command line


def run_command(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '200', 'OMP_NUM_THREADS': '1'}
    launcher = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        launcher = ['-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master-addr', '127.0.0.1',
                    '--master-port', str(port)]
    return subprocess.run([sys.executable, *launcher, str(ROOT / 'scripts' / 'extract_features.py'), *arguments],
                          capture_output=True, text=True, env=environment, timeout=300)


def test_help_explains_each_setting():
    result = run_command('--help')
    assert result.returncode == 0
    for field in dataclasses.fields(extract_features.Settings):
        assert f'--{field.name.replace("_", "-")} ' in result.stdout or f'--no-{field.name}'.replace('_', '-') in (
            result.stdout), field.name
    for text in ('Pictures in a shard;', 'Processes that read pictures', '(default: pooled)', '--knn, --no-knn'):
        assert text in result.stdout


def test_two_processes_write_the_files_of_one(settings, tmp_path):
    data = write_pictures(tmp_path / 'data')
    (data / 'train' / 'red' / '8.png').write_text('no picture')  # in the second process's part
    arguments = ['--data-dir', str(data), '--model', 'test_resnet', '--img-size', '32', '--batch-size', '4',
                 '--shard-size', '10', '--workers', '0', '--device', 'cpu', '--knn', '--knn-k', '5',
                 '--max-bad-images', '0.1']
    two = run_command(*arguments, '--output', str(tmp_path / '2'), processes=2)
    assert two.returncode == 0, two.stderr
    run(settings, data_dir=str(data), knn=True, knn_k=5, max_bad_images=0.1, output=str(tmp_path / '1'))
    for split in ('train', 'validation'):
        assert read_bytes(tmp_path / '1' / split) == read_bytes(tmp_path / '2' / split) != {}
        first, second = (read_index(tmp_path / name / split) for name in '12')
        del first['provenance'], second['provenance']
        assert first == second and first['complete']
        assert first['unreadable'] == (['red/8.png'] if split == 'train' else [])
    scores = [json.loads((tmp_path / name / 'summary.json').read_text())['knn'] for name in '12']
    assert scores[0] == scores[1]
    assert two.stdout.count('5 nearest neighbours') == 1 and '2 x cpu' in two.stdout
    assert 'train: 36 rows' not in two.stdout and two.stdout.count('train: 35 rows, 1 unreadable, 4 x ') == 1
    assert 'img/s' in two.stderr


def test_bad_command_ends_with_code_2(settings):
    result = run_command('--data-dir', settings.data_dir, '--model', 'test_resnet', '--dtype', 'int8')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith('extract_features.py: --dtype') and result.stderr.count('\n') == 1
