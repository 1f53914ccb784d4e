"""Pictures by timm's schemas: opened with checks, read so that a run repeats, unreadable ones counted and named.

Whatever worker or process reads it, the augmentation of a picture follows from (seed, epoch, index) alone. Streams
(hfids/, wds/, tfds/) have no index: theirs follows from (seed, epoch, process, worker, position).
"""
import pickle
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data_settings import DataSettings, is_stream
from PIL import Image
from settings import SettingsError, one_line
from timm.data import ImageDataset, IterableImageDataset, add_img_extensions, create_dataset
from timm.utils import natural_key, random_seed
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

__all__ = [
    'BadPictures', 'EpochSampler', 'Pictures', 'StreamedPictures', 'batches', 'check_labels', 'open_pictures',
    'picture_name', 'read_picture', 'seed_of', 'targets_of', 'to_mode']

SCHEMAS = ('torch/', 'hfds/', 'hfids/', 'wds/', 'tfds/')
SPLIT_FOLDERS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'valid', 'eval', 'test')}
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff'))  # timm's folders list .jpg, .jpeg and .png alone
# What PIL raises for a file that is no picture, cut short, or garbled.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)


def open_pictures(
        settings: DataSettings, split: str, *, batch_size: int = 1, is_training: bool = False, seed: int = 0,
        num_samples: int | None = None, num_classes: int | None = None, in_chans: int = 3,
) -> tuple[Dataset, list[str]]:
    """Open one split and return timm's data set with its class names in label order.

    Args:
        settings: Where the pictures come from.
        split: Name of the split; of a folder, 'validation' is also val/, valid/, eval/ or test/; '' the folder itself.
        batch_size: Of the loader; streams split their pictures by it.
        is_training: Streams shuffle.
        seed: Of the order of a stream.
        num_samples: Pictures of a stream that does not say it.
        num_classes: Classes of a stream that has no names for them.
        in_chans: Streams convert to RGB (3) or grey (1).
    """
    if settings.dataset and not settings.dataset.startswith(SCHEMAS):
        raise SettingsError(
            f'--dataset must be empty (a folder) or start with {", ".join(SCHEMAS)}, got {settings.dataset!r}.')
    if not settings.dataset:
        return _open_folder(settings, split)
    options = dict(input_key=settings.input_key or None, target_key=settings.target_key or None)
    if is_stream(settings):
        options |= dict(input_img_mode='RGB' if in_chans == 3 else 'L')
    create = partial(
        create_dataset, settings.dataset, root=settings.data_dir or None, split=split,
        download=settings.dataset_download, class_map=settings.class_map or None, batch_size=batch_size,
        seed=seed, num_samples=num_samples,
        **({} if settings.dataset.startswith('torch/') else options))
    try:
        dataset = create(is_training=is_training)
        if settings.dataset.startswith('torch/'):
            # torchvision's ImageNet has tuples of synonyms
            return dataset, [name if isinstance(name, str) else name[0] for name in dataset.classes]
    except (ImportError, RuntimeError, AssertionError, AttributeError, OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f'--dataset {settings.dataset} cannot be read from --data-dir {settings.data_dir}: {one_line(error)}; '
            f'--dataset-download fetches what torchvision offers.') from error
    _try_first(partial(create, is_training=False), settings, split, is_training, labelled=num_classes != 0)
    labels = dataset.reader.class_to_idx
    if not labels and num_classes is None:
        raise SettingsError(f'--num-classes is needed: --dataset {settings.dataset} has no names for its classes.')
    if is_stream(settings) and not len(dataset):
        raise SettingsError(f'--dataset {settings.dataset} does not say how many pictures {split} has; give the '
                            f'number after a |, as in train-{{0000..0099}}.tar|100000.')
    return dataset, sorted(labels, key=labels.get) or [str(label) for label in range(num_classes)]


def _try_first(create: Callable[[], Dataset], settings: DataSettings, split: str, is_training: bool,
               labelled: bool) -> None:
    """Read one picture, and count the shards: what is wrong with either would show in a worker, or in none."""
    try:
        dataset = create()  # another one, because timm's streams are set up for good by the first read
        next(iter(dataset))
    except (StopIteration, KeyError, ValueError, TypeError, RuntimeError, AssertionError, OSError) as error:
        if not labelled and not settings.target_key and error.args == ('label',):
            return  # the picture was read, and no label is asked for
        raise SettingsError(
            f'--dataset {settings.dataset}: no picture of {split} can be read with --input-key '
            f'{settings.input_key or "left out"} and --target-key {settings.target_key or "left out"}'
            f'{"" if isinstance(error, StopIteration) else f": {one_line(error)}"}; name the columns that hold the '
            f'pictures and their labels.') from error
    reader = dataset.reader
    if not is_stream(settings) or (not is_training and reader.dist_num_replicas == 1):
        return  # a reader without a shard is idle, no more
    if settings.dataset.startswith('wds/'):
        shards = len(reader.split_info.filenames) // reader.dist_num_replicas
    else:
        shards = getattr(getattr(reader, 'ds', None), 'num_shards', settings.workers)
    if max(settings.workers, 1) > shards:
        raise SettingsError(f'--workers must be at most the shards that {split} of --dataset {settings.dataset} has '
                            f'for each process, {shards}, got {settings.workers}: a reader without a shard would wait '
                            f'for ever; give fewer, or more shards.')


def _open_folder(settings: DataSettings, split: str) -> tuple[Dataset, list[str]]:
    if not Path(settings.data_dir).is_dir() or not settings.data_dir:
        raise SettingsError(f'--data-dir {settings.data_dir} is not a folder; give the one that holds the pictures.')
    names = SPLIT_FOLDERS.get(split, (split,))
    folder = next((path for name in names if (path := Path(settings.data_dir) / name).is_dir()), None)
    layout = f'expected {Path(settings.data_dir) / names[0]}/CLASS/PICTURE.jpg (or .png)'
    if folder is None:
        raise SettingsError(f'--data-dir {settings.data_dir} has no folder {" or ".join(names)}; {layout}.')
    if settings.class_map and not Path(settings.class_map).is_file():
        raise SettingsError(f'--class-map {settings.class_map} is not a file; give one line for each class.')
    if settings.class_map.lower().endswith('.txt'):
        _check_names(settings.class_map)
    try:
        dataset = create_dataset('', root=str(folder), search_split=False, class_map=settings.class_map or None)
        names = sorted(dataset.reader.class_to_idx, key=lambda name: (natural_key(name), name))
        if not settings.class_map and len({name.lower() for name in names}) < len(names):
            # timm leaves the order of names that differ by case to the hash of strings, another one in each process
            class_map = {name: label for label, name in enumerate(names)}
            dataset = create_dataset('', root=str(folder), search_split=False, class_map=class_map)
    except (AssertionError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise SettingsError(f'--class-map {settings.class_map} must be a .txt file with a class a line.') from error
    except RuntimeError as error:
        if settings.class_map:
            raise SettingsError(f'--class-map {settings.class_map} names no folder of {folder} that holds pictures; '
                                f'give the names of its folders, one a line.') from error
        raise SettingsError(f'--data-dir {settings.data_dir}: no pictures found in {folder}; {layout}.') from error
    return dataset, sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)


def _check_names(class_map: str) -> None:
    """Refuse blank lines, which timm takes for classes, and names given twice, of which it keeps the last label."""
    places = {}
    try:
        with Path(class_map).open(encoding='utf-8') as file:
            names = [line.strip() for line in file]
    except ValueError as error:
        raise SettingsError(f'--class-map {class_map} must be text in UTF-8: {one_line(error)}; save it so.') from error
    for number, name in enumerate(names, 1):
        if not name:
            raise SettingsError(f'--class-map {class_map} must have a class on each line, line {number} is blank; '
                                f'remove it.')
        if places.setdefault(name, number) != number:
            raise SettingsError(f'--class-map {class_map} must name each class once, {name} stands on lines '
                                f'{places[name]} and {number}; remove one.')


def seed_of(*numbers: int) -> int:
    """One seed out of several whole numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_labels(labels: torch.Tensor | Sequence, num_classes: int, least: int = -1) -> None:
    """Refuse a batch of labels that are no whole numbers from `least` to the classes; -1 marks what cannot be read."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise SettingsError(f'--target-key must name a column of whole numbers, got labels such as {labels[0]!r}; '
                            f'name the one with the labels.')
    if not least <= labels.min() <= labels.max() < num_classes:
        raise SettingsError(f'--num-classes: labels must be from 0 to {num_classes - 1}, found {int(labels.min())} to '
                            f'{int(labels.max())}; name the column of the labels by --target-key, or give their '
                            f'number.')


def read_picture(dataset: Dataset, index: int, mode: str = 'RGB') -> tuple[Image.Image, int]:
    """Picture and label, without a transform; raises one of UNREADABLE."""
    if not isinstance(dataset, ImageDataset):
        image, label = dataset[index]
        return image.convert(mode), label
    file, label, *_ = dataset.reader[index]  # dataset[index] would pass over what it cannot read
    with Image.open(file) as image:
        return to_mode(image, mode), -1 if label is None else label


def to_mode(image: Image.Image, mode: str = 'RGB') -> Image.Image:
    """A picture in 'RGB' or 'L'; of 16-bit grey the upper byte."""
    if image.mode.startswith('I;16'):  # convert() would cut all above 255 off
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


def picture_name(dataset: Dataset, index: int) -> str:
    """The path of a picture if it has one, else its place."""
    name = dataset.filename(index, absolute=True) if isinstance(dataset, ImageDataset) else None
    return str(name or f'picture {index}')


def targets_of(dataset: Dataset) -> list[int]:
    """The label of every picture of a data set that is not streamed."""
    if isinstance(dataset, ImageDataset):
        samples = getattr(dataset.reader, 'samples', None)
        return [label for _, label in samples] if samples is not None else list(dataset.reader.iter_targets())
    targets = getattr(dataset, 'targets', None)
    return [int(label) for label in (targets if targets is not None else (label for _, label in dataset))]


class Pictures(Dataset):
    """(epoch, index) -> (image, label, index of the picture asked for if it is unreadable, else -1).

    In training the next readable picture takes the place of an unreadable one; in evaluation nothing does: the image
    is blank and the label -1, to be left out.

    Args:
        dataset: What `open_pictures` returned.
        transform: PIL image to tensor.
        seed: Of the augmentation.
        mode: 'RGB' or 'L'.
        substitute: Whether another picture takes the place of an unreadable one.
    """

    def __init__(self, dataset: Dataset, transform: Callable, seed: int = 0, mode: str = 'RGB',
                 substitute: bool = False):
        self.dataset, self.transform, self.seed, self.mode, self.substitute = dataset, transform, seed, mode, substitute

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = key
        for step in range(len(self) if self.substitute else 1):
            try:
                image, label = read_picture(self.dataset, (index + step) % len(self), self.mode)
                bad = index if step else -1
                break
            except UNREADABLE:
                continue
        else:
            image, label, bad = Image.new(self.mode, (1, 1)), -1, index
        random_seed(seed_of(self.seed, epoch, index))
        return self.transform(image), label, bad


class StreamedPictures(IterableDataset):
    """(image, label, -1) from a stream of timm, which reports and passes over what it cannot read itself."""

    def __init__(self, dataset: IterableImageDataset, transform: Callable, seed: int = 0, rank: int = 0):
        self.dataset, self.transform, self.seed, self.rank, self.epoch = dataset, transform, seed, rank, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        worker = info.id if (info := get_worker_info()) else 0
        for position, (image, label) in enumerate(self.dataset):
            random_seed(seed_of(self.seed, self.epoch, self.rank, worker, position))
            yield self.transform(image), label, -1


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
            self.report(f'unreadable, skipped: {picture_name(self.dataset, index)}')
            allowed = int(self.most * len(self.dataset))
            if len(self.found) > allowed:
                raise SettingsError(
                    f'--max-bad-images {self.most:g} allows {allowed} unreadable among {len(self.dataset)} pictures, '
                    f'and {picture_name(self.dataset, index)} is number {len(self.found)}; repair or remove those '
                    f'named above, or allow more.')
