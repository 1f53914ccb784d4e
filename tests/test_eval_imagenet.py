"""scripts/eval_imagenet.py against timm's own procedure, on generated pictures and on one real picture a class."""
import csv
import dataclasses
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import eval_imagenet
import imagenet_labels
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from settings import SettingsError
from timm.data import ImageNetInfo, RealLabelsImagenet, create_dataset, create_loader, resolve_input_data_config
from timm.models import save_for_hf
from timm.utils import AverageMeter, accuracy

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'
SYNSETS = ImageNetInfo('imagenet-1k').label_names()
TIMM_COLUMNS = [
    'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']


def write_pictures(folder: Path, classes, each: int = 2, seed: int = 0) -> Path:
    """Write noisy pictures of many colours and shapes, so that a random model says something else of each."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((rng.integers(40, 60), rng.integers(40, 60)), Image.BICUBIC)
            picture.save(folder / name / f'{index}.png')
    return folder


def random_model(randomize, name: str = 'test_resnet', seed: int = 0, **arguments) -> torch.nn.Module:
    model = randomize(timm.create_model(name, **arguments), seed).eval()
    model.get_classifier().weight.data *= 10  # sure of itself: scores differ from picture to picture
    return model


@pytest.fixture(scope='module')
def ten(tmp_path_factory) -> Path:
    """A validation folder with ten of ImageNet's synsets, not the first ones."""
    folder = tmp_path_factory.mktemp('ten')
    write_pictures(folder / 'val', SYNSETS[5:1000:100], each=3)
    return folder


@pytest.fixture
def weights(tmp_path, randomize) -> str:
    path = tmp_path / 'random.safetensors'
    save_file(random_model(randomize).state_dict(), path)
    return str(path)


@pytest.fixture
def settings(ten, weights) -> eval_imagenet.Settings:
    return eval_imagenet.Settings(
        data_dir=str(ten), model=('test_resnet',), checkpoint=(weights,), img_size=32, batch_size=8, workers=0,
        device='cpu')


def run(settings: eval_imagenet.Settings, **changes) -> dict:
    """Evaluate and return the only row."""
    row, = eval_imagenet.main(dataclasses.replace(settings, **changes))
    return row


def timm_logits(model: torch.nn.Module, folder: Path | str, arguments: dict, *, use_train_size: bool = False,
                prefetch: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits, labels and file names by the steps of timm's validate.py."""
    data_config = resolve_input_data_config(model, arguments, use_test_size=not use_train_size)
    dataset = create_dataset(
        '', root=str(folder), split='validation', input_img_mode='RGB' if data_config['input_size'][0] == 3 else 'L')
    loader = create_loader(
        dataset, input_size=data_config['input_size'], batch_size=8, use_prefetcher=prefetch, num_workers=0,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        crop_pct=data_config['crop_pct'], crop_mode=data_config['crop_mode'], device=torch.device('cpu'))
    with torch.inference_mode():
        pairs = [(model(images), labels) for images, labels in loader]
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    return logits, labels, dataset.filenames(basename=True)


def timm_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """validate.py's meters, batch by batch."""
    meters = {name: AverageMeter() for name in ('loss', 'top1', 'top5')}
    for output, target in zip(logits.split(8), labels.split(8), strict=True):
        top1, top5 = accuracy(output, target, topk=(1, 5))
        loss = torch.nn.functional.cross_entropy(output, target)
        for meter, value in zip(meters.values(), (loss, top1, top5), strict=True):
            meter.update(value.item(), len(output))
    return {name: meter.avg for name, meter in meters.items()}


def assert_scores(row: dict, logits: torch.Tensor, labels: torch.Tensor) -> None:
    for name, value in timm_scores(logits, labels).items():
        assert row[name] == pytest.approx(value, rel=2e-5, abs=1e-4), name


def learn(model: torch.nn.Module, logits: torch.Tensor, labels: torch.Tensor, share: float = 0.5) -> None:
    """Raise the bias of the true classes of some pictures, so that some, not all, are read right."""
    bias = model.get_classifier().bias.data
    top = logits.max(1).values - logits.gather(1, labels[:, None])[:, 0]
    bias[labels[:max(1, int(share * len(labels)))]] += top.median()


@pytest.fixture
def classes_of(tmp_path):
    """Evaluate with --output and return classes.csv by class."""

    def read(settings: eval_imagenet.Settings, **changes) -> tuple[dict, dict[str, dict]]:
        row = run(settings, output=str(tmp_path / 'files'), **changes)
        path, = (tmp_path / 'files').glob('*/classes.csv')
        with path.open(encoding='utf-8') as file:
            return row, {item['class']: item for item in csv.DictReader(file)}

    return read


# The numbers of timm


@pytest.mark.skipif(not (SHARED / 'data' / 'imagenet-1k-samples-128.zip').exists(),
                    reason='needs ../shared/data/imagenet-1k-samples-128.zip, one real picture of each ImageNet class')
def test_agrees_with_timm_on_every_picture_of_a_real_set(settings, tmp_path, randomize, classes_of):
    data = tmp_path / 'in1k'
    subprocess.run([sys.executable, SHARED / 'tools' / 'unpack_data.py', 'imagenet-1k-samples-128', data], check=True,
                   stdout=subprocess.DEVNULL)
    model = random_model(randomize)
    arguments = {'img_size': 64}
    taken = []
    hook = model.get_classifier().register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    _, labels, _ = timm_logits(model, data, arguments)
    hook.remove()
    # a least-squares classifier on some features of these very pictures, so that a good share of them is read right
    features, targets = torch.cat(taken)[:, :64], torch.nn.functional.one_hot(labels, 1000).float()
    model.get_classifier().weight.data.zero_()
    model.get_classifier().weight.data[:, :64] = 100 * torch.linalg.lstsq(features, targets).solution.T
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / 'fit.safetensors')

    logits, labels, _ = timm_logits(model, data, arguments, prefetch=True)  # as validate.py reads by default
    assert len(labels) == 1000 and 20 < (logits.argmax(1) == labels).sum() < 980
    row, classes = classes_of(
        settings, data_dir=str(data), checkpoint=(str(tmp_path / 'fit.safetensors'),), img_size=64, batch_size=50)
    assert row['images'] == 1000 and row['unreadable'] == 0
    assert round(row['top1'] * 10) == (logits.argmax(1) == labels).sum()
    assert_scores(row, logits, labels)
    for picture, synset in enumerate(SYNSETS):  # each class is one picture
        guess = SYNSETS[logits[picture].argmax()]
        assert classes[synset]['mistaken_for'] == ('' if guess == synset else guess)


@pytest.mark.parametrize('changes', [
    {}, {'img_size': 40}, {'img_size': None}, {'crop_pct': 0.6}, {'crop_mode': 'squash', 'crop_pct': 1.0},
    {'crop_mode': 'border'}, {'interpolation': 'nearest'}, {'mean': (0.1, 0.2, 0.3)}, {'std': (0.5, 0.6, 0.7)}],
    ids=str)
def test_preprocessing_is_that_of_timm_for_every_option(settings, ten, weights, changes):
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    row = run(settings, **changes)
    arguments = {'img_size': 32} | changes
    logits, labels, _ = timm_logits(model, ten, arguments)
    assert_scores(row, logits, torch.arange(5, 1000, 100)[labels])
    assert not changes or abs(row['loss'] - run(settings)['loss']) > 1e-3
    own = model.pretrained_cfg
    assert (row['img_size'], row['crop_pct'], row['interpolation']) == (
        arguments['img_size'] or own['input_size'][-1], changes.get('crop_pct', own['crop_pct']),
        changes.get('interpolation', own['interpolation']))


def test_size_is_that_of_testing_unless_that_of_training_is_asked_for(settings, ten, tmp_path, randomize):
    model = random_model(randomize)
    model.pretrained_cfg = model.pretrained_cfg | {
        'input_size': (3, 32, 32), 'test_input_size': (3, 48, 48), 'crop_pct': 0.9, 'test_crop_pct': 1.0}
    save_for_hf(model, str(tmp_path / 'run'), safe_serialization=True)
    for use_train_size, shown in ((False, (48, 1.0)), (True, (32, 0.9))):
        row = run(settings, model=(f'local-dir:{tmp_path / "run"}',), checkpoint=(), img_size=None,
                  use_train_size=use_train_size)
        logits, labels, _ = timm_logits(model, ten, {}, use_train_size=use_train_size)
        assert_scores(row, logits, torch.arange(5, 1000, 100)[labels])
        assert (row['img_size'], row['crop_pct']) == shown


def test_grey_pictures_and_arguments_of_the_model(settings, ten, tmp_path, randomize):
    model = random_model(randomize, in_chans=1, global_pool='max')
    save_file(model.state_dict(), tmp_path / 'grey.safetensors')
    grey = dict(in_chans=1, mean=(0.5,), std=(0.2,))
    row = run(settings, checkpoint=(str(tmp_path / 'grey.safetensors'),), model_kwargs=('global_pool=max',), **grey)
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32, **grey})
    assert_scores(row, logits, torch.arange(5, 1000, 100)[labels])


@pytest.mark.parametrize('changes', [
    {'batch_size': 1}, {'batch_size': 7}, {'batch_size': 100}, {'workers': 2}, {'channels_last': False},
    {'device': 'auto'}], ids=str)
def test_speed_options_leave_the_numbers(settings, changes):
    expected, row = run(settings), run(settings, **changes)
    for name in ('top1', 'top5', 'images'):
        assert row[name] == expected[name]
    assert row['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    assert row['ece'] == pytest.approx(expected['ece'], rel=1e-4) and row['images_per_second'] > 0


def test_memory_format_is_the_one_asked_for(settings, monkeypatch):
    formats = []
    predict = eval_imagenet.predict

    def look(model, *arguments, **options):
        formats.append(model.state_dict()['layer1.0.conv2.weight'].is_contiguous(memory_format=torch.channels_last))
        return predict(model, *arguments, **options)

    monkeypatch.setattr(eval_imagenet, 'predict', look)
    run(settings)
    run(settings, channels_last=False)
    assert formats == [True, False]


def test_mixed_precision_is_close_but_not_the_same(settings):
    exact, mixed = run(settings), run(settings, amp=True)
    assert 0 < abs(mixed['loss'] / exact['loss'] - 1) < 0.05
    with pytest.raises(SettingsError, match='--amp-dtype'):
        run(settings, amp=True, amp_dtype='float16')


def test_calibration_is_the_gap_between_confidence_and_accuracy(settings, ten, tmp_path, randomize):
    model = random_model(randomize)
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    labels = torch.arange(5, 1000, 100)[labels]
    learn(model, logits, labels)
    save_file(model.state_dict(), tmp_path / 'learnt.safetensors')
    row = run(settings, checkpoint=(str(tmp_path / 'learnt.safetensors'),))
    logits, _, _ = timm_logits(model, ten, {'img_size': 32})
    confidence, guess = (array.numpy() for array in logits.double().softmax(1).max(1))
    right = guess == labels.numpy()
    assert 0 < right.sum() < len(right)
    expected = 0.0
    edges = np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert row['ece'] == pytest.approx(100 * expected, rel=1e-4) and expected > 0


# Folders and classes


def test_some_synsets_are_mapped_to_the_1k_indices_and_said_so(settings, ten, weights, classes_of, capsys):
    row, classes = classes_of(settings)
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    indices = torch.arange(5, 1000, 100)
    assert_scores(row, logits, indices[labels])
    told = capsys.readouterr().out
    assert '10 of the model\'s 1000 classes' in told and 'ImageNet synset' in told and '1000 logits compete' in told
    assert [int(item['logit']) for item in classes.values()] == indices.tolist()
    assert classes[SYNSETS[5]]['description'].startswith('electric ray')
    for label, item in enumerate(classes.values()):
        top5 = logits[labels == label].topk(5).indices
        assert int(item['images']) == 3
        hits = top5 == indices[label]
        for name, right in (('top1', hits[:, 0]), ('top5', hits.any(1))):
            assert float(item[name]) == pytest.approx(100 * right.double().mean().item(), abs=1e-3)


def test_only_the_logits_of_the_folder_compete_if_asked(settings, ten, weights, tmp_path, capsys):
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    row = run(settings, valid_labels='folder')
    assert 'only 10 of 1000' in capsys.readouterr().out and row['valid_labels'] == 'folder'
    assert_scores(row, logits[:, 5:1000:100], labels)
    more = list(range(0, 1000, 5))  # a file of indices, in which the folder's have other places
    (tmp_path / 'indices.txt').write_text('\n'.join(map(str, more)))
    row = run(settings, valid_labels=str(tmp_path / 'indices.txt'))
    assert_scores(row, logits[:, more], labels * 20 + 1)


def test_numbered_folders_are_indices_and_not_strings(settings, tmp_path, weights, capsys):
    names = ['0', '2', '10', '11', '100', '999']
    assert sorted(names) != names  # or the bug would not show
    write_pictures(tmp_path / 'v2', names)
    row = run(settings, data_dir=str(tmp_path / 'v2'))
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, _, _ = timm_logits(model, tmp_path / 'v2', {'img_size': 32})
    assert_scores(row, logits, torch.tensor([int(name) for name in names]).repeat_interleave(2))
    assert 'named by numbers' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['imagenet_a', 'imagenet_r'])
def test_relatives_with_200_classes_are_scored_among_these_as_by_valid_labels(
        settings, tmp_path, weights, name, capsys):
    info = Path(timm.data.__file__).parent / '_info'
    synsets = (info / f'{name}_synsets.txt').read_text().split()
    indices = [int(line) for line in (info / f'{name}_indices.txt').read_text().split()]
    assert len(synsets) == 200
    write_pictures(tmp_path / name, synsets, each=1)
    row = run(settings, data_dir=str(tmp_path / name), batch_size=64)
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, tmp_path / name, {'img_size': 32})
    assert_scores(row, logits[:, indices], labels)
    assert row['valid_labels'] == name and name in capsys.readouterr().out
    whole = run(settings, data_dir=str(tmp_path / name), batch_size=64, valid_labels='all')
    assert_scores(whole, logits, torch.tensor(indices)[labels])
    assert whole['loss'] > row['loss']
    named = run(settings, data_dir=str(tmp_path / name), batch_size=64, valid_labels=f'{name}_indices.txt')
    assert named['loss'] == row['loss']


def write_fine_tune(folder: Path, randomize, labels: list[str]) -> tuple[str, torch.nn.Module]:
    model = random_model(randomize, num_classes=len(labels))
    model.pretrained_cfg = model.pretrained_cfg | {'input_size': (3, 32, 32), 'num_classes': len(labels)}
    save_for_hf(model, str(folder), {'label_names': labels}, safe_serialization=True)
    return f'local-dir:{folder}', model


@pytest.mark.parametrize('split', ['val', 'validation', 'test', 'holdout'])
def test_fine_tune_is_evaluated_by_its_own_label_names(settings, tmp_path, randomize, capsys, split):
    labels = ['red', '7', 'blue', '0', 'green']  # neither sorted nor indices
    name, model = write_fine_tune(tmp_path / 'run', randomize, labels)
    write_pictures(tmp_path / 'data' / split, ['0', '7', 'blue', 'red'])
    row = run(settings, model=(name,), checkpoint=(), img_size=None, data_dir=str(tmp_path / 'data'),
              split=split if split == 'holdout' else 'validation')
    logits, found, _ = timm_logits(model, tmp_path / 'data' / split, {})
    assert_scores(row, logits, torch.tensor([3, 1, 2, 0])[found])
    assert row['img_size'] == 32 and '4 of the model\'s 5 classes' in capsys.readouterr().out


def test_folder_of_classes_is_taken_itself_but_never_one_with_a_training_split(settings, ten, tmp_path):
    assert run(settings, data_dir=str(ten / 'val'))['loss'] == run(settings)['loss']
    write_pictures(tmp_path / 'data' / 'train', SYNSETS[:3])
    with pytest.raises(SettingsError, match='has no folder validation or val'):
        run(settings, data_dir=str(tmp_path / 'data'))


def test_classes_without_names_are_taken_in_order_and_said_so(settings, tmp_path, randomize, capsys):
    model = random_model(randomize, num_classes=3)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'three.pth')
    write_pictures(tmp_path / 'data' / 'val', ['a', 'b', 'c'])
    own = dict(data_dir=str(tmp_path / 'data'), checkpoint=(str(tmp_path / 'three.pth'),), num_classes=3)
    row = run(settings, **own)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {'img_size': 32})
    assert_scores(row, logits, labels)
    assert 'in the order of the data\'s classes, a, b, c' in capsys.readouterr().out
    (tmp_path / 'map.txt').write_text('c\na\nb\n')
    row = run(settings, class_map=str(tmp_path / 'map.txt'), **own)
    assert_scores(row, logits, torch.tensor([1, 2, 0])[labels])
    (tmp_path / 'data' / 'val' / 'a').rename(tmp_path / 'data' / 'val' / 'z')
    assert run(settings, class_map=str(tmp_path / 'map.txt'), **own)['images'] == 4
    assert 'leaves out 1 folders: z' in capsys.readouterr().out


def test_class_map_may_stand_in_for_the_names_of_a_model(settings, tmp_path, randomize):
    name, model = write_fine_tune(tmp_path / 'run', randomize, ['rouge', 'vert', 'bleu'])
    write_pictures(tmp_path / 'data' / 'val', ['blue', 'green', 'red'])
    own = dict(model=(name,), checkpoint=(), img_size=None, data_dir=str(tmp_path / 'data'))
    with pytest.raises(SettingsError, match='expected the model\'s 3 label names'):
        run(settings, **own)
    (tmp_path / 'map.txt').write_text('red\ngreen\nblue\n')
    row = run(settings, class_map=str(tmp_path / 'map.txt'), **own)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {})
    assert_scores(row, logits, torch.tensor([2, 1, 0])[labels])


@pytest.mark.parametrize('schema', ['hfds', 'hfids'])
def test_pictures_of_a_data_set_of_the_hub_are_read_with_its_columns(settings, tmp_path, randomize, schema):
    datasets = pytest.importorskip('datasets')
    name, model = write_fine_tune(tmp_path / 'run', randomize, ['a', 'b', 'c'])
    write_pictures(tmp_path / 'data' / 'val', ['a', 'b', 'c'])
    files = sorted((tmp_path / 'data' / 'val').glob('*/*.png'))
    features = datasets.Features({
        'photo': datasets.Image(), 'kind': datasets.ClassLabel(names=['a', 'b', 'c'])})
    table = datasets.Dataset.from_dict({
        'photo': [str(path) for path in files], 'kind': [path.parent.name for path in files]}, features=features)
    (tmp_path / 'hub').mkdir()
    table.to_parquet(tmp_path / 'hub' / 'validation-00000.parquet')
    row = run(settings, data_dir=str(tmp_path / 'cache'), dataset=f'{schema}/{tmp_path / "hub"}', input_key='photo',
              target_key='kind', num_samples=6, model=(name,), checkpoint=(), img_size=None, num_classes=3)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {})
    assert_scores(row, logits, labels)
    assert row['images'] == 6


def test_unreadable_pictures_end_the_run_or_are_left_out(settings, tmp_path, weights, capsys):
    data = write_pictures(tmp_path / 'data', SYNSETS[:5])
    whole = (data / SYNSETS[2] / '1.png').read_bytes()
    (data / SYNSETS[2] / '1.png').write_bytes(whole[:100])
    with pytest.raises(SettingsError, match='--max-bad-images 0 allows 0'):
        run(settings, data_dir=str(data))
    row = run(settings, data_dir=str(data), max_bad_images=0.1)
    assert (row['images'], row['unreadable']) == (9, 1)
    assert f'{SYNSETS[2]}/1.png' in capsys.readouterr().out
    (data / SYNSETS[2] / '1.png').unlink()
    assert run(settings, data_dir=str(data))['loss'] == pytest.approx(row['loss'], abs=2e-4)


# ReaL and C


def real_folder(folder: Path, count: int) -> Path:
    """ILSVRC2012_val_*.JPEG in class folders that do not sort like the files."""
    write_pictures(folder, ['x'], each=count)
    for number in range(count):
        target = folder / 'val' / SYNSETS[(number * 7) % 5]
        target.mkdir(parents=True, exist_ok=True)
        Image.open(folder / 'x' / f'{number}.png').save(target / f'ILSVRC2012_val_{number + 1:08d}.JPEG')
        (folder / 'x' / f'{number}.png').unlink()
    (folder / 'x').rmdir()
    return folder


def test_real_labels_are_scored_as_by_timm_in_folders_and_flat(settings, tmp_path, weights):
    data = real_folder(tmp_path / 'data', 20)
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, _, names = timm_logits(model, data, {'img_size': 32})
    assert names != sorted(names)
    ranked = logits.topk(8).indices.tolist()
    real = {name: [] if index % 5 == 0 else [999, *ranked[index][index % 8:index % 8 + 1]]
            for index, name in enumerate(names)}
    (tmp_path / 'real.json').write_text(json.dumps([real[name] for name in sorted(real)]))
    reference = RealLabelsImagenet(names, real_json=tmp_path / 'real.json')
    reference.add_result(logits)
    assert 0 < reference.get_accuracy(1) < reference.get_accuracy(5) < 100

    rows = [run(settings, data_dir=str(data), real_labels=str(tmp_path / 'real.json'))]
    for path in (data / 'val').glob('*/*.JPEG'):
        path.rename(data / 'val' / path.name)
    for path in (data / 'val').glob('n*'):
        path.rmdir()
    rows.append(run(settings, data_dir=str(data), real_labels=str(tmp_path / 'real.json')))
    for row in rows:
        assert row['top1'] == pytest.approx(reference.get_accuracy(1), abs=1e-4)
        assert row['top5'] == pytest.approx(reference.get_accuracy(5), abs=1e-4)
        assert row['images'] == 16 and row['loss'] is None and row['ece'] > 0

    with pytest.raises(SettingsError, match=r'flat validation split.*--real-labels'):
        run(settings, data_dir=str(data))
    with pytest.raises(SettingsError, match='all pictures of ImageNet\'s validation split, but the data have 20'):
        run(settings, data_dir=str(data), real_labels='timm')


def test_real_labels_need_the_names_of_the_validation_split(settings, ten, tmp_path):
    (tmp_path / 'real.json').write_text(json.dumps([[1]] * 30))
    with pytest.raises(SettingsError, match=r'ILSVRC2012_val_00000001\.JPEG'):
        run(settings, real_labels=str(tmp_path / 'real.json'))
    with pytest.raises(SettingsError, match='cannot be read'):
        run(settings, real_labels=str(tmp_path / 'none.json'))


def test_corruptions_are_reported_each_and_as_means(settings, tmp_path, capsys):
    parts = [(corruption, severity) for corruption in ('fog', 'gaussian_noise') for severity in ('1', '5')]
    for seed, (corruption, severity) in enumerate(parts):
        write_pictures(tmp_path / 'c' / corruption / severity, SYNSETS[:4], each=3, seed=seed)
    row = run(settings, data_dir=str(tmp_path / 'c'), output=str(tmp_path / 'files'))
    alone = [run(settings, data_dir=str(tmp_path / 'c' / corruption / severity)) for corruption, severity in parts]
    for (corruption, severity), one in zip(parts, alone, strict=True):
        assert row['corruptions'][corruption][severity] == one['top1_err']
    for name in ('top1', 'top5', 'loss'):
        assert row[name] == pytest.approx(sum(one[name] for one in alone) / 4, abs=2e-4)
    assert row['images'] == 48 and row['mce'] is None
    told = capsys.readouterr().out
    assert 'gaussian_noise' in told and 'mCE takes all 15' in told
    path, = (tmp_path / 'files').glob('*/corruptions.csv')
    with path.open() as file:
        assert [(item['corruption'], item['severity']) for item in csv.DictReader(file)] == parts


def test_mean_corruption_error_is_relative_to_alexnet():
    def errors(factor: float) -> dict:
        return {name: {severity: 100 * factor * error * (1 + (int(severity) - 3) / 10) for severity in '12345'}
                for name, error in imagenet_labels.ALEXNET_ERROR.items()}

    assert imagenet_labels.mean_corruption_error(errors(1)) == pytest.approx(100)
    assert imagenet_labels.mean_corruption_error(errors(0.5) | {'saturate': {'1': 90.0}}) == pytest.approx(50)
    some = errors(0.5)
    del some['fog']['3']
    assert imagenet_labels.mean_corruption_error(some) is None
    assert len(imagenet_labels.ALEXNET_ERROR) == 15


# Tables and files


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


def test_zoo_models_are_evaluated_like_those_of_timm(settings, ten, tmp_path, randomize):
    small = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)')
    model = random_model(randomize, 'coatnet_pico_64', num_classes=1000, img_size=32, depths=(1, 1, 1, 1),
                         embed_dim=(16, 16, 32, 32))
    save_file(model.state_dict(), tmp_path / 'zoo.safetensors')
    row = run(settings, model=('coatnet_pico_64',), checkpoint=(str(tmp_path / 'zoo.safetensors'),),
              num_classes=1000, model_kwargs=small)
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    assert_scores(row, logits, torch.arange(5, 1000, 100)[labels])


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


def test_averaged_weights_are_taken_only_if_asked(settings, tmp_path, randomize):
    plain, averaged = (random_model(randomize, seed=seed).state_dict() for seed in (0, 1))
    torch.save({'state_dict': plain, 'state_dict_ema': averaged}, tmp_path / 'both.pth')
    torch.save(averaged, tmp_path / 'averaged.pth')
    both, alone = (str(tmp_path / f'{name}.pth') for name in ('both', 'averaged'))
    assert run(settings, checkpoint=(both,))['loss'] == run(settings)['loss']
    assert run(settings, checkpoint=(both,), use_ema=True)['loss'] == run(settings, checkpoint=(alone,))['loss']
    with pytest.raises(SettingsError, match='has no averaged weights'):
        run(settings, checkpoint=(alone,), use_ema=True)


def test_pretrained_weights_are_the_default_and_can_be_left_out(settings):
    with pytest.raises(SettingsError, match='coatnet_pico_64 has no released weights'):
        run(settings, model=('coatnet_pico_64',), checkpoint=())
    assert run(settings, checkpoint=(), pretrained=False)['images'] == 30


# Refusals


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
    ({'model': ('test_vit',), 'img_size': 37}, '--model test_vit with --img-size 37 cannot be built'),
], ids=str)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings, changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        run(settings, **changes)
    assert '\n' not in str(error.value)


def test_classes_that_do_not_fit_stop_with_what_was_expected(settings, tmp_path, randomize):
    write_pictures(tmp_path / 'animals', ['cat', 'dog'])
    animals = str(tmp_path / 'animals')
    with pytest.raises(SettingsError, match=r'2 classes \(cat, dog\).*expected ImageNet synsets \(n01440764'):
        run(settings, data_dir=animals)
    name, _ = write_fine_tune(tmp_path / 'run', randomize, ['dog', 'fish', 'bird', 'ant', 'bee'])
    own = dict(model=(name,), checkpoint=(), img_size=None)
    with pytest.raises(SettingsError, match=r'the model\'s 5 label names \(dog, fish, bird, \.\.\.\), but cat'):
        run(settings, data_dir=animals, **own)
    with pytest.raises(SettingsError, match='new, random classifier'):
        run(settings, data_dir=animals, num_classes=2, **own)
    with pytest.raises(SettingsError, match='--real-labels are for the 1000 classes'):
        run(settings, data_dir=animals, real_labels='timm', **own)
    torch.save(random_model(randomize, num_classes=3).state_dict(), tmp_path / 'three.pth')
    with pytest.raises(SettingsError, match='expected 3 classes, for the model has 3 logits without names'):
        run(settings, data_dir=animals, checkpoint=(str(tmp_path / 'three.pth'),), num_classes=3)
    with (tmp_path / 'map.pkl').open('wb') as file:
        pickle.dump({'cat': 0, 'dog': 2}, file)
    with pytest.raises(SettingsError, match='without a gap'):
        run(settings, data_dir=animals, class_map=str(tmp_path / 'map.pkl'))


# The command line, and several processes


def test_two_processes_give_the_numbers_of_one(settings, tmp_path):
    data = write_pictures(tmp_path / 'data', SYNSETS[:7], each=3)  # 21 pictures: the last batch is padded
    (data / SYNSETS[6] / '2.png').write_bytes(b'')
    settings = dataclasses.replace(
        settings, data_dir=str(data), batch_size=2, max_bad_images=0.1)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master-addr', '127.0.0.1',
         '--master-port', str(port), str(ROOT / 'scripts' / 'eval_imagenet.py'), '--data-dir', str(data),
         '--model', *settings.model, '--checkpoint', *settings.checkpoint, '--img-size', '32', '--batch-size', '2',
         '--workers', '0', '--device', 'cpu', '--max-bad-images', '0.1', '--results-file', str(tmp_path / 'two.json')],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('images/s') == 1  # one table, not one a process
    row, two = run(settings), json.loads((tmp_path / 'two.json').read_text())
    assert (row['images'], row['unreadable']) == (20, 1)
    for name in row.keys() - {'images_per_second', 'loss', 'ece'}:
        assert two[name] == row[name], name
    assert two['loss'] == pytest.approx(row['loss'], abs=2e-4) and two['ece'] == pytest.approx(row['ece'], abs=2e-4)


def test_command_line_ends_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['eval_imagenet.py', '--model', 'a', 'b', '--no-pretrained', '--amp',
                                      '--results-file', 'table.txt'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'scripts' / 'eval_imagenet.py'), run_name='__main__')
    assert end.value.code == 2
    assert capsys.readouterr() == ('', "eval_imagenet.py: --results-file must end in .json or .csv, got 'table.txt'.\n")
