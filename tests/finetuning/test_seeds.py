"""All randomness of a run depends on each of seed, epoch and index, and on nothing else."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.utils import random_seed

from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, StreamingImageDataset, create_dataset, seed_transforms
from coatnet_train.data.loader import EpochSampler
from coatnet_train.training import trainer
from support.finetune_runs import run


def draw(image: Image.Image) -> torch.Tensor:
    """A transform whose result is random."""
    return torch.rand(2)


def test_transforms_draw_what_timms_seed_gives():
    drawn = []
    for seed in (random_seed, seed_transforms):
        seed(7)
        drawn.append((random.random(), np.random.rand(), *torch.rand(2).tolist()))
    assert drawn[0] == drawn[1]


def test_augmentation_of_an_image(image_folder):
    images, _ = create_dataset(DataSettings(data_dir=str(image_folder)), 'train')
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (1, 2) for index in (0, 1)]

    def drawn(seed: int, epoch: int, index: int) -> tuple:
        return tuple(IndexedImageDataset(images, draw, seed)[epoch, index][0].tolist())

    first = {key: drawn(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert {key: drawn(*key) for key in reversed(keys)} == first


def test_augmentation_of_a_stream():
    def drawn(seed: int, epoch: int, rank: int) -> list[tuple]:
        stream = StreamingImageDataset([(Image.new('RGB', (4, 4)), 0)] * 3, draw, seed, rank)
        stream.epoch = epoch
        return [tuple(item[0].tolist()) for item in stream]

    keys = [(seed, epoch, rank) for seed in (0, 1) for epoch in (1, 2) for rank in (0, 1)]
    first = {key: drawn(*key) for key in keys}
    assert len({value for values in first.values() for value in values}) == 3 * len(keys)
    assert {key: drawn(*key) for key in reversed(keys)} == first


@pytest.mark.parametrize('targets', [None, [0, 1] * 20], ids=['shuffled', 'balanced'])
def test_order_of_the_images(targets):
    def order(seed: int, epoch: int) -> tuple:
        sampler = EpochSampler(40, seed, shuffle=True, targets=targets)
        sampler.epoch = epoch
        return tuple(index for _, index in sampler)

    keys = [(seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    first = {key: order(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert {key: order(*key) for key in reversed(keys)} == first


def test_every_step_of_a_run(settings, monkeypatch):
    seeds = []

    def record(seed: int, rank: int) -> None:
        seeds.append(seed)
        random_seed(seed, rank)

    monkeypatch.setattr(trainer, 'random_seed', record)
    for seed in (1, 2):
        run(settings, experiment=str(seed), seed=seed, epochs=2)
    assert len(seeds) == len(set(seeds)) == 2 * 2 * (36 // 8)
