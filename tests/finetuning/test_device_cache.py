"""--cache-images: crop, colours and evaluation against torchvision and timm, and resuming."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

import eval_imagenet
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, create_dataset
from coatnet_train.data.device_cache import (
    Augmentation,
    DeviceImageCache,
    Normalize,
    adjust_colors,
    create_cached_loader,
    crop_and_flip,
    draw_crops,
)
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, Preempted
from coatnet_train.training.loaders import create_datasets, create_loaders, training_transform
from coatnet_train.training.trainer import Trainer
from support.finetune_runs import assert_same_run, read_metrics, run, write_shards
from support.images import write_images

MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)
AUGMENTED = dict(cache_images=True, mixup=0.2, cutmix=1.0, reprob=0.5, color_jitter=0.4, train_img_sizes=(16, 32))


def noise(count: int = 4, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), count=st.integers(1, 50))
def test_crops_lie_inside_and_are_as_large_and_as_wide_as_asked(low, high, count):
    low, high = sorted((low, high))
    left, top, width, height = draw_crops(torch.rand(count, 22), (low, high)).double().unbind(1)
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    whole = (width == 1) & (height == 1)
    assert ((width * height > low - 1e-5) & (width * height < high + 1e-5) | whole).all()
    assert ((width / height > 3 / 4 - 1e-5) & (width / height < 4 / 3 + 1e-5)).all()


@pytest.mark.parametrize('scale', [(0.08, 1.0), (0.35, 1.0), (0.9, 1.0)])
def test_crops_are_drawn_as_torchvision_draws_them(scale):
    torch.manual_seed(0)
    side = 10_000  # large, so that rounding to whole pixels does not matter
    theirs = np.array([RandomResizedCrop.get_params(torch.empty(1, side, side), scale, (3 / 4, 4 / 3))
                       for _ in range(4000)]) / side
    theirs = torch.from_numpy(theirs[:, [1, 0, 3, 2]])
    ours = draw_crops(torch.rand(40_000, 22), scale).double()
    for function in (lambda crops: crops, lambda crops: crops**2, lambda crops: crops[:, 2] * crops[:, 3],
                     lambda crops: crops[:, 0] * crops[:, 2]):
        torch.testing.assert_close(function(ours).mean(0), function(theirs).mean(0), atol=0.015, rtol=0)


WHOLE, HALF = [0, 0, 32, 32], [8, 4, 16, 8]


@pytest.mark.parametrize('flipped', [False, True])
def test_a_whole_image_stays_what_it_is_or_is_averaged(flipped):
    images = noise()
    expected = reference.hflip(images) if flipped else images
    flipped, crops = torch.full((4,), flipped), torch.tensor([WHOLE] * 4) / 32
    torch.testing.assert_close(crop_and_flip(images, crops, flipped, 32), expected, atol=1e-5, rtol=0)
    for size in (16, 8):
        small = F.avg_pool2d(expected, 32 // size)
        torch.testing.assert_close(crop_and_flip(images, crops, flipped, size), small, atol=1e-5, rtol=0)


@pytest.mark.parametrize('flipped', [False, True])
def test_enlarged_crops_are_bilinear(flipped):
    images = noise()
    found = crop_and_flip(images, torch.tensor([HALF, WHOLE, HALF, HALF]) / 32, torch.full((4,), flipped), 32)
    expected = F.interpolate(images[..., 4:12, 8:24], (32, 32), mode='bilinear')
    expected[1] = images[1]
    expected = reference.hflip(expected) if flipped else expected
    # at its border the crop interpolates with pixels outside of it, which interpolate() does not have
    torch.testing.assert_close(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


@pytest.mark.parametrize('channels', [1, 3])
def test_colours_change_as_in_torchvision(channels):
    images = noise(channels=channels)
    factors = torch.empty(3, 4).uniform_(0.3, 1.7, generator=torch.Generator().manual_seed(1))
    found = adjust_colors(images, *factors)
    for index, (brightness, contrast, saturation) in enumerate(factors.T.tolist()):
        expected = reference.adjust_brightness(images[index], brightness)
        expected = reference.adjust_contrast(expected, contrast)
        torch.testing.assert_close(found[index], reference.adjust_saturation(expected, saturation))


def test_augmentation_does_what_it_is_asked_to():
    images, draws = (noise(64) * 255).byte(), torch.rand(64, 28, generator=torch.Generator().manual_seed(0))
    plain = dict(size=32, mean=MEAN, std=STD, scale=(1, 1), hflip=0., color_jitter=0., reprob=0.)
    as_they_are = Normalize(MEAN, STD)(images)
    torch.testing.assert_close(Augmentation(**plain)(images, draws), as_they_are, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        Augmentation(**plain | dict(hflip=1.))(images, draws), as_they_are.flip(-1), atol=1e-4, rtol=0)
    changes = dict(scale=(0.3, 0.5), hflip=0.5, color_jitter=0.4, reprob=1.)
    for name, value in changes.items():
        changed = (Augmentation(**plain | {name: value})(images, draws) - as_they_are).abs().amax((1, 2, 3)) > 1e-3
        assert changed.float().mean() > 0.9 if name != 'hflip' else 0.25 < changed.float().mean() < 0.75, name
    assert Augmentation(**plain | dict(size=16))(images, draws).shape == (64, 3, 16, 16)


def test_evaluation_sees_the_very_images(image_folder):
    dataset, _ = create_dataset(DataSettings(data_dir=str(image_folder)), 'validation')
    options = dict(input_size=(3, 24, 24), crop_pct=0.9, interpolation='bicubic', mean=MEAN, std=STD)
    images = IndexedImageDataset(dataset, create_transform(**options))
    expected = create_loader(images, EpochSampler(len(dataset)), 4, 0)
    images = IndexedImageDataset(dataset, create_transform(**options, normalize=False))
    decoded = DeviceImageCache(images, Normalize(MEAN, STD), torch.device('cpu'), quiet=True)
    decoded.load()
    found = create_cached_loader(decoded, EpochSampler(len(dataset)), 4)
    assert decoded.images.dtype == torch.uint8 and len(found) == len(expected) == math.ceil(len(dataset) / 4)
    for batch, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, batch, other))


class Numbers(Dataset):
    """(epoch, index) -> (one pixel that encodes the index, label = index, bad = -index if odd, else 0)."""

    dataset, seed = None, 0

    def __len__(self) -> int:
        return 700

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        index = key[1]
        return torch.tensor([index % 256, index // 256], dtype=torch.uint8).view(2, 1, 1), index, index * -(index % 2)


class Unchanged:
    draws = 0

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize('quiet', [False, True])
def test_every_image_lies_at_its_place(quiet):
    decoded = DeviceImageCache(Numbers(), Unchanged(), torch.device('cpu'), quiet=quiet)
    decoded.load()
    places = [699, 0, 3, 256, 511, 512]
    images, labels, bad = decoded.__getitems__([(1, place) for place in places])
    assert (images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()).tolist() == labels.tolist() == places
    assert bad.tolist() == [-699, 0, -3, 0, -511, 0]


@pytest.mark.parametrize('reprob', [0., 0.5])
def test_what_is_drawn_for_an_image_depends_on_no_other(image_folder, reprob):
    dataset, _ = create_dataset(DataSettings(data_dir=str(image_folder)), 'train')
    images = IndexedImageDataset(dataset, create_transform((3, 32, 32), crop_mode='squash', normalize=False), seed=1)
    augmentation = Augmentation(24, MEAN, STD, (0.3, 1.0), 0.5, 0.4, reprob)
    decoded = DeviceImageCache(images, augmentation, torch.device('cpu'), quiet=True)
    decoded.load()
    keys = [(epoch, index) for index in (35, 0, 7) for epoch in (2, 0, 1)]
    together = decoded.__getitems__(keys)[0]
    for key, image in zip(keys, together, strict=True):
        torch.testing.assert_close(decoded.__getitems__([key])[0][0], image, atol=1e-5, rtol=0)
    assert all((together[0] - other).abs().max() > 0.1 for other in together[1:])


def test_a_killed_run_goes_on_to_the_same_weights(settings, monkeypatch):
    whole = run(settings, **AUGMENTED)
    assert len(read_metrics(whole)) == 2
    train_step = Trainer.train_step

    def stop_soon(trainer: Trainer, *batch: torch.Tensor) -> None:
        if (trainer.progress.epoch, trainer.progress.batch) == (2, 1):
            trainer.accelerator.set_trigger()
        train_step(trainer, *batch)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Trainer, 'train_step', stop_soon)
        run(settings, **AUGMENTED, experiment='killed')
    assert_same_run(whole, run(settings, **AUGMENTED, experiment='killed', resume='auto'))


def test_it_learns_and_its_scores_are_those_of_evaluation(settings, image_folder):
    run_dir = run(settings, cache_images=True, epochs=8, lr=5e-3, scale=(0.3, 1.), color_jitter=0.1, val_interval=8)
    row, = read_metrics(run_dir)
    report, = eval_imagenet.main(eval_imagenet.EvaluationSettings(
        data_dir=str(image_folder), model=(f'local-dir:{run_dir}',), workers=0, device='cpu'))
    assert row['eval_top1'] == report['top1'] > 80 and row['eval_loss'] == pytest.approx(report['loss'], abs=1e-4)


def test_unreadable_images_are_named(settings, tmp_path):
    data = write_images(tmp_path / 'own')
    bad = data / 'train' / 'red' / '3.png'
    bad.write_bytes(b'no image')
    run_dir = run(settings, data_dir=str(data), cache_images=True, max_bad_images=0.1)
    assert json.loads((run_dir / 'summary.json').read_text())['unreadable'] == [str(bad)]
    assert len(read_metrics(run_dir)) == 2


def test_settings_reach_the_images(settings, tmp_path):
    data = write_images(tmp_path / 'own')
    wide = Image.new('RGB', (96, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))
    wide.save(data / 'train' / 'blue' / '0.png')
    settings = dataclasses.replace(
        settings, data_dir=str(data), cache_images=True, scale=(0.2, 0.6), hflip=0.3, color_jitter=0.1, reprob=0.7)
    data_config = dict(
        input_size=(3, 32, 32), interpolation='bilinear', mean=MEAN, std=STD, crop_pct=0.9, crop_mode='center')
    augmentation = dict(mean=MEAN, std=STD, scale=(0.2, 0.6), hflip=0.3, color_jitter=0.1, reprob=0.7)
    assert vars(training_transform(settings, data_config, 16)) == dict(size=16, **augmentation)
    loader, _, _ = create_loaders(settings, *create_datasets(settings)[:2], data_config, create_accelerator('cpu'))
    loader.dataset.load()
    assert vars(loader.dataset.transform) == dict(size=32, **augmentation)
    place = next(i for i in range(36) if loader.dataset.dataset.filename(i) == 'blue/0.png')
    image = loader.dataset.images[place]  # the left third, squeezed, is there
    assert image.shape == (3, 32, 32) and image[:, :, :9].min() > 200 and image[:, :, 13:].max() < 50
    larger = dataclasses.replace(settings, train_img_sizes=(16, 48))
    loader, _, _ = create_loaders(larger, *create_datasets(larger)[:2], data_config, create_accelerator('cpu'))
    loader.dataset.load()
    assert loader.dataset.images.shape == (36, 3, 48, 48)


def test_what_it_cannot_do_is_refused(settings, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r'--aa .* got rand-m9; leave it out, or give --no-cache-images'):
        run(settings, cache_images=True, aa='rand-m9')
    with pytest.raises(ConfigError, match=r'--cache-images .* the stream --dataset wds/'):
        run(settings, cache_images=True, dataset='wds/', data_dir=str(write_shards(tmp_path / 'shards')))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError('none left')

    dataset, _ = create_dataset(DataSettings(data_dir=settings.data_dir), 'train')
    whole = create_transform((3, 32, 32), normalize=False)
    decoded = DeviceImageCache(IndexedImageDataset(dataset, whole), Normalize(MEAN, STD), torch.device('cpu'))
    monkeypatch.setattr(torch, 'empty', full)
    with pytest.raises(ConfigError, match=r'--cache-images: 36 images of \(3, 32, 32\) take .* GB, more than cpu'):
        decoded.load()
    monkeypatch.undo()
    dataset.reader.samples = [(file, 'text') for file, _ in dataset.reader.samples]
    with pytest.raises(ConfigError, match=r"--target-key must name a column of whole numbers, .* 'text'"):
        decoded.load()
    wide = dict(input_size=(3, 32, 48), interpolation='bilinear', mean=MEAN, std=STD, crop_pct=1., crop_mode='center')
    settings = dataclasses.replace(settings, cache_images=True)
    with pytest.raises(ConfigError, match=r'--cache-images keeps squares, and the model takes images of 32 x 48'):
        create_loaders(settings, *create_datasets(settings)[:2], wide, create_accelerator('cpu'))
