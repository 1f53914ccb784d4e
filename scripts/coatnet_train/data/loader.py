"""Loaders: the order of an epoch, batches that a run can repeat, and the images in them that cannot be read."""
import signal
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from coatnet_train.data.dataset import Pictures, StreamedPictures, picture_name, seed_of, unreadable_reason
from coatnet_train.runtime.cli import SettingsError

__all__ = ['BadPictures', 'EpochSampler', 'batches']


class EpochSampler(Sampler):
    """(epoch, index) of every picture, in an order that follows from (seed, epoch); `start` passes over the first ones.

    Args:
        length: Pictures.
        seed: Of the order.
        shuffle: Whether it is random.
        targets: Labels; given, classes are drawn equally often, with replacement.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = False, targets: Sequence[int] | None = None):
        self.length, self.seed, self.shuffle, self.epoch, self.start = length, seed, shuffle, 0, 0
        self.weights = None
        if targets is not None:
            labels = torch.as_tensor(targets)
            self.weights = 1 / labels.bincount().double()[labels]

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        if self.weights is not None:
            order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
        elif self.shuffle:
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = range(self.length)
        return ((self.epoch, index) for index in order[self.start:])


def batches(pictures: Pictures | StreamedPictures, sampler: EpochSampler | None, batch_size: int, workers: int,
            drop_last: bool = False, pin_memory: bool = False) -> DataLoader:
    """A loader of (images (B, C, H, W), labels (B,), bad (B,)); streams come in the order they have."""
    shared = dict(num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_sigterm)
    if isinstance(pictures, StreamedPictures):
        pictures.dataset.set_loader_cfg(num_workers=workers)
        return DataLoader(pictures, batch_size, drop_last=drop_last, **shared)
    return DataLoader(pictures, batch_sampler=BatchSampler(sampler, batch_size, drop_last), **shared)


def ignore_sigterm(_: int) -> None:
    """A signal to the whole group must leave the readers to the main process, which saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class BadPictures:
    """The unreadable pictures met so far; too many of them end the run.

    Args:
        dataset: What `open_pictures` returned.
        most: Largest share of unreadable pictures.
        report: Called with a line for each new one.
    """

    def __init__(self, dataset: Dataset, most: float, report: Callable[[str], object] = print):
        self.dataset, self.most, self.report, self.found = dataset, most, report, set()

    def names(self) -> list[str]:
        return [picture_name(self.dataset, index) for index in sorted(self.found)]

    def add(self, bad: torch.Tensor) -> None:
        """Take note of the third item of a batch; raises SettingsError once they are too many."""
        for index in sorted({index for index in bad.tolist() if index >= 0} - self.found):
            self.found.add(index)
            name = picture_name(self.dataset, index)
            self.report(f'unreadable, skipped: {name}: {unreadable_reason(self.dataset, index)}')
            allowed = int(self.most * len(self.dataset))
            if len(self.found) > allowed:
                raise SettingsError(
                    f'--max-bad-images {self.most:g} allows {allowed} unreadable among {len(self.dataset)} pictures, '
                    f'and {name} is number {len(self.found)}; repair or remove those named above, or allow more.')
