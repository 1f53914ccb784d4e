"""Data loaders: order of an epoch, reproducible batches, and the limit on unreadable images."""
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from coatnet_train.data.dataset import (
    IndexedImageDataset,
    StreamingImageDataset,
    derive_seed,
    image_name,
    unreadable_reason,
)
from coatnet_train.runtime.cli import ConfigError

__all__ = ['EpochSampler', 'UnreadableImages', 'create_loader', 'ignore_sigterm']


class EpochSampler(Sampler):
    """(epoch, index) of every image, in an order that depends on (seed, epoch); `start` skips the first ones.

    Args:
        length: Number of images.
        seed: Seed of the order.
        shuffle: Whether the order is random.
        targets: Labels; if given, classes are drawn equally often, with replacement.
        views: Number of stored views. If above 0, keys are (view, index): every epoch takes the next view of an image,
            starting with one drawn from (seed, index).
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = False, targets: Sequence[int] | None = None,
                 views: int = 0):
        self.length, self.seed, self.shuffle, self.epoch, self.start = length, seed, shuffle, 0, 0
        self.views = views
        if views:
            generator = torch.Generator().manual_seed(derive_seed(seed))
            self.first_views = torch.randint(views, (length,), generator=generator).tolist()
        self.weights = None
        if targets is not None:
            labels = torch.as_tensor(targets)
            self.weights = 1 / labels.bincount().double()[labels]

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        if self.weights is not None:
            order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
        elif self.shuffle:
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = range(self.length)
        if self.views:
            return (((self.first_views[index] + self.epoch) % self.views, index) for index in order[self.start:])
        return ((self.epoch, index) for index in order[self.start:])


def create_loader(dataset: IndexedImageDataset | StreamingImageDataset, sampler: EpochSampler | None, batch_size: int,
                  workers: int, drop_last: bool = False, pin_memory: bool = False) -> DataLoader:
    """Loader of (images (B, C, H, W), labels (B,), bad (B,), *outputs); streams keep their order and use no sampler."""
    shared = dict(num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_sigterm)
    if isinstance(dataset, StreamingImageDataset):
        dataset.dataset.set_loader_cfg(num_workers=workers)
        return DataLoader(dataset, batch_size, drop_last=drop_last, **shared)
    return DataLoader(dataset, batch_sampler=BatchSampler(sampler, batch_size, drop_last), **shared)


def ignore_sigterm(_: int) -> None:
    """Ignore SIGTERM in a loader worker: the main process handles it, and saves before its workers end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class UnreadableImages:
    """Counts the unreadable images of a dataset; too many of them end the run.

    Args:
        dataset: What `create_dataset` returned.
        max_fraction: Maximum fraction of unreadable images.
        log: Called with a line for each new one.
        found: Indices found before the run was resumed.
    """

    def __init__(self, dataset: Dataset, max_fraction: float, log: Callable[[str], object] = print,
                 found: Iterable[int] = ()):
        self.dataset, self.max_fraction, self.log, self.found = dataset, max_fraction, log, set(found)

    def names(self) -> list[str]:
        return [image_name(self.dataset, index) for index in sorted(self.found)]

    def add(self, bad: torch.Tensor) -> None:
        """Record `bad` (B,), the third item of a batch; raises ConfigError above `max_fraction`."""
        for index in sorted({index for index in bad.tolist() if index >= 0} - self.found):
            self.found.add(index)
            name = image_name(self.dataset, index)
            self.log(f'unreadable, skipped: {name}: {unreadable_reason(self.dataset, index)}')
            allowed = int(self.max_fraction * len(self.dataset))
            if len(self.found) > allowed:
                raise ConfigError(
                    f'--max-bad-images {self.max_fraction:g} allows {allowed} unreadable among {len(self.dataset)} '
                    f'images, and {name} is number {len(self.found)}; repair or remove those '
                    f'named above, or allow more.')
