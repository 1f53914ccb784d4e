"""Metrics of scripts/eval_imagenet.py against timm's, on generated images and on one real image per class."""
import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet
from timm.models import save_for_hf

from coatnet_train.evaluation import imagenet as evaluate
from coatnet_train.evaluation import imagenet_labels
from coatnet_train.runtime.cli import ConfigError
from support.imagenet_runs import SYNSETS, assert_scores, random_model, run, timm_logits, write_images
from support.images import needs_images, unpack_images


def learn(model: torch.nn.Module, logits: torch.Tensor, labels: torch.Tensor, share: float = 0.5) -> None:
    """Raise the bias of the true classes of some images, so that some predictions, but not all, are correct."""
    bias = model.get_classifier().bias.data
    top = logits.max(1).values - logits.gather(1, labels[:, None])[:, 0]
    bias[labels[:max(1, int(share * len(labels)))]] += top.median()


@needs_images('imagenet-1k-samples-128')  # one of each class
@pytest.mark.slow
def test_agrees_with_timm_on_every_image_of_a_real_set(settings, tmp_path, randomize, classes_of):
    data = unpack_images('imagenet-1k-samples-128', tmp_path / 'in1k')
    model = random_model(randomize)
    arguments = {'img_size': 64}
    taken = []
    hook = model.get_classifier().register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    _, labels, _ = timm_logits(model, data, arguments)
    hook.remove()
    # a least-squares classifier of the same images, so that a good fraction of them is predicted correctly
    features = torch.cat(taken).double()
    centred = (features - features.mean(0)) / (features.std(0) + 1e-9)
    ridge = centred.T @ centred + 0.1 * len(centred) * torch.eye(centred.shape[1])
    fitted = torch.linalg.solve(ridge, centred.T @ torch.nn.functional.one_hot(labels, 1000).double())
    classifier = model.get_classifier()
    classifier.weight.data = (100 * fitted.T / (features.std(0) + 1e-9)).float()
    classifier.bias.data = -classifier.weight.data @ features.mean(0).float()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / 'fit.safetensors')

    logits, labels, _ = timm_logits(model, data, arguments, prefetch=True)  # as validate.py reads by default
    assert len(labels) == 1000 and 20 < (logits.argmax(1) == labels).sum() < 980
    row, classes = classes_of(
        settings, data_dir=str(data), checkpoint=(str(tmp_path / 'fit.safetensors'),), img_size=64, batch_size=50)
    assert row['images'] == 1000 and row['unreadable'] == 0
    assert round(row['top1'] * 10) == (logits.argmax(1) == labels).sum()
    assert_scores(row, logits, labels)
    for index, synset in enumerate(SYNSETS):  # each class is one image
        guess = SYNSETS[logits[index].argmax()]
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


def test_grey_images_and_arguments_of_the_model(settings, ten, tmp_path, randomize):
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


def test_the_inference_form_has_the_numbers_of_the_model(settings, tmp_path, randomize, monkeypatch):
    model = randomize(timm.create_model('coatnet_pico_64', num_classes=1000, img_size=32, depths=(1, 1, 1, 1)))
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    scored, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, 'predict', lambda model, *rest, **options: (
        scored.append(model) or predict(model, *rest, **options)))
    flags = dict(model=('coatnet_pico_64',), model_kwargs=('depths=(1,1,1,1)',), img_size=32, num_classes=1000,
                 checkpoint=(str(tmp_path / 'model.safetensors'),))
    plain, folded = run(settings, **flags), run(settings, reparam=True, **flags)
    norms = [sum(isinstance(module, torch.nn.BatchNorm2d) for module in form.modules()) for form in scored]
    assert norms[0] > 0 and norms[1] == 0
    assert folded['loss'] == pytest.approx(plain['loss'], rel=1e-4)
    for name in ('top1', 'top5', 'param_count'):
        assert folded[name] == plain[name]


def test_memory_format_is_the_one_asked_for(settings, monkeypatch):
    formats = []
    predict = evaluate.predict

    def look(model, *arguments, **options):
        formats.append(model.state_dict()['layer1.0.conv2.weight'].is_contiguous(memory_format=torch.channels_last))
        return predict(model, *arguments, **options)

    monkeypatch.setattr(evaluate, 'predict', look)
    run(settings)
    run(settings, channels_last=False)
    assert formats == [True, False]


def test_mixed_precision_is_close_but_not_the_same(settings):
    exact, mixed = run(settings), run(settings, amp=True)
    assert 0 < abs(mixed['loss'] / exact['loss'] - 1) < 0.05
    with pytest.raises(ConfigError, match='--amp-dtype'):
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


def test_zoo_models_are_evaluated_like_those_of_timm(settings, ten, tmp_path, randomize):
    small = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,32)')
    model = random_model(randomize, 'coatnet_pico_64', num_classes=1000, img_size=32, depths=(1, 1, 1, 1),
                         embed_dim=(16, 16, 32, 32))
    save_file(model.state_dict(), tmp_path / 'zoo.safetensors')
    row = run(settings, model=('coatnet_pico_64',), checkpoint=(str(tmp_path / 'zoo.safetensors'),),
              num_classes=1000, model_kwargs=small)
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    assert_scores(row, logits, torch.arange(5, 1000, 100)[labels])


def test_averaged_weights_are_taken_only_if_asked(settings, tmp_path, randomize):
    plain, averaged = (random_model(randomize, seed=seed).state_dict() for seed in (0, 1))
    torch.save({'state_dict': plain, 'state_dict_ema': averaged}, tmp_path / 'both.pth')
    torch.save(averaged, tmp_path / 'averaged.pth')
    both, alone = (str(tmp_path / f'{name}.pth') for name in ('both', 'averaged'))
    assert run(settings, checkpoint=(both,))['loss'] == run(settings)['loss']
    assert run(settings, checkpoint=(both,), use_ema=True)['loss'] == run(settings, checkpoint=(alone,))['loss']
    with pytest.raises(ConfigError, match='has no averaged weights'):
        run(settings, checkpoint=(alone,), use_ema=True)


# ReaL and C


def real_folder(folder: Path, count: int) -> Path:
    """Write ILSVRC2012_val_*.JPEG into class folders, whose order differs from that of the file names."""
    write_images(folder, ['x'], each=count)
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

    with pytest.raises(ConfigError, match=r'flat validation split.*--real-labels'):
        run(settings, data_dir=str(data))
    with pytest.raises(ConfigError, match='all images of ImageNet\'s validation split, but the data have 20'):
        run(settings, data_dir=str(data), real_labels='timm')


def test_real_labels_need_the_names_of_the_validation_split(settings, ten, tmp_path):
    (tmp_path / 'real.json').write_text(json.dumps([[1]] * 30))
    with pytest.raises(ConfigError, match=r'ILSVRC2012_val_00000001\.JPEG'):
        run(settings, real_labels=str(tmp_path / 'real.json'))
    with pytest.raises(ConfigError, match='cannot be read'):
        run(settings, real_labels=str(tmp_path / 'none.json'))


def test_corruptions_are_reported_each_and_as_means(settings, tmp_path, capsys):
    parts = [(corruption, severity) for corruption in ('fog', 'gaussian_noise') for severity in ('1', '5')]
    for seed, (corruption, severity) in enumerate(parts):
        write_images(tmp_path / 'c' / corruption / severity, SYNSETS[:4], each=3, seed=seed)
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
