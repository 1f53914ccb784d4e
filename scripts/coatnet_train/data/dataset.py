"""Image datasets by timm's schemas: validated when opened, and read reproducibly.

The augmentation of an image depends on (seed, epoch, index) alone, not on the worker or process that reads it. Streams
(hfids/, wds/, tfds/) have no index: there it depends on (seed, epoch, process, worker, position).
"""
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Protocol

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from coatnet_train.data.config import DataSettings, is_stream
from coatnet_train.data.folder_dataset import open_folder
from coatnet_train.data.image_files import UNREADABLE, image_suffixes, to_mode
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.console import printable
from coatnet_train.runtime.packages import is_installed

__all__ = [
    'IndexedImageDataset',
    'StoredOutputs',
    'StreamingImageDataset',
    'check_labels',
    'create_dataset',
    'derive_seed',
    'image_name',
    'read_image',
    'read_targets',
    'seed_transforms',
    'unreadable_reason',
]

SCHEMAS = ('torch/', 'hfds/', 'hfids/', 'wds/', 'tfds/')
_logger = logging.getLogger(__name__)


def create_dataset(
        settings: DataSettings, split: str, *, batch_size: int = 1, is_training: bool = False, seed: int = 0,
        num_samples: int | None = None, num_classes: int | None = None,
) -> tuple[Dataset, list[str]]:
    """Open one split and return timm's dataset with its class names in label order.

    Args:
        settings: Where the images come from.
        split: Name of the split; in a folder, 'validation' also finds val/, valid/, eval/ and test/, and '' means the
            folder itself.
        batch_size: Batch size of the loader, by which streams split their images.
        is_training: Whether streams shuffle.
        seed: Seed of the order of a stream.
        num_samples: Number of images in a stream that does not record it.
        num_classes: Number of classes in a stream that does not name them.

    Raises ConfigError for a source that cannot be opened, or whose first image cannot be read.
    """
    if settings.dataset and not settings.dataset.startswith(SCHEMAS):
        raise ConfigError(
            f'--dataset must be empty (a folder) or start with {", ".join(SCHEMAS)}, got {settings.dataset!r}.')
    if not settings.dataset:
        return open_folder(settings, split)
    options = dict(input_key=settings.input_key or None, target_key=settings.target_key or None)
    if settings.dataset.startswith('wds/') and not settings.input_key:  # timm looks for .jpg, .png and .webp alone
        options['input_key'] = ';'.join(['jpg', *sorted(suffix.removeprefix('.') for suffix in image_suffixes())])
    if not settings.dataset.startswith('tfds/'):  # which TensorFlow decodes
        options |= dict(input_img_mode='')  # as it is in the file, for to_mode
    create = partial(
        _create_unconverted, settings.dataset, root=settings.data_dir or None, split=split,
        download=settings.dataset_download, class_map=settings.class_map or None, batch_size=batch_size,
        seed=seed, num_samples=num_samples,
        **({} if settings.dataset.startswith('torch/') else options))
    package = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset'}.get(settings.dataset.partition('/')[0])
    if package and not is_installed(package):
        raise ConfigError(f"--dataset {settings.dataset} needs the package {package}; in a checkout of coatnet_zoo: "
                          f"pip install '.[data]'.")
    try:
        dataset = create(is_training=is_training)
        if settings.dataset.startswith('torch/'):
            # torchvision's ImageNet has tuples of synonyms
            return dataset, [name if isinstance(name, str) else name[0] for name in dataset.classes]
    except (ImportError, RuntimeError, AssertionError, AttributeError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f'--dataset {settings.dataset} cannot be read from --data-dir {settings.data_dir}: {one_line(error)}; '
            f'--dataset-download fetches what torchvision offers.') from error
    _try_first(partial(create, is_training=False), settings, split, is_training, labelled=num_classes != 0)
    labels = dataset.reader.class_to_idx
    if not labels and num_classes is None:
        raise ConfigError(f'--num-classes is needed: --dataset {settings.dataset} has no names for its classes.')
    if is_stream(settings) and not len(dataset):
        raise ConfigError(f'--dataset {settings.dataset} does not say how many images {split} has; give the '
                          f'number after a |, as in train-{{0000..0099}}.tar|100000.')
    return dataset, sorted(labels, key=labels.get) or [str(label) for label in range(num_classes)]


def _try_first(create: Callable[[], Dataset], settings: DataSettings, split: str, is_training: bool,
               labelled: bool) -> None:
    """Read one image and count the shards in this process, because an error in a loader worker would be lost."""
    try:
        dataset = create()  # a separate dataset, because the first read fixes the setup of timm's streams
        image = next(iter(dataset))[0]
        if not isinstance(image, Image.Image | dict):
            raise TypeError(f'found {type(image).__name__}, which is no image')
    except (StopIteration, KeyError, ValueError, TypeError, RuntimeError, AssertionError, OSError) as error:
        if not labelled and not settings.target_key and error.args == ('label',):
            return  # the image was read, and no label is asked for
        raise ConfigError(
            f'--dataset {settings.dataset}: no image of {split} can be read with --input-key '
            f'{settings.input_key or "left out"} and --target-key {settings.target_key or "left out"}'
            f'{"" if isinstance(error, StopIteration) else f": {one_line(error)}"}; name the columns that hold the '
            f'images and their labels.') from error
    reader = dataset.reader
    if not is_stream(settings) or (not is_training and reader.dist_num_replicas == 1):
        return  # a reader without a shard is idle, no more
    if settings.dataset.startswith('wds/'):
        shards = len(reader.split_info.filenames) // reader.dist_num_replicas
    else:
        shards = getattr(getattr(reader, 'ds', None), 'num_shards', settings.workers)
    if max(settings.workers, 1) > shards:
        raise ConfigError(f'--workers must be at most the shards that {split} of --dataset {settings.dataset} has '
                          f'for each process, {shards}, got {settings.workers}: a reader without a shard would wait '
                          f'for ever; give fewer, or more shards.')


def _create_unconverted(name: str, **options: object) -> Dataset:
    """timm's create_dataset, changed so that images come as they are in their files."""
    dataset = timm.data.create_dataset(name, **options)
    if name.startswith('hfids/'):
        dataset.reader._lazy_init = partial(_open_encoded, dataset.reader)
    elif hasattr(dataset, 'loader'):  # torchvision's folders, which would convert to RGB themselves
        dataset.loader = _open_image
    return dataset


def _open_image(path: str) -> Image.Image:
    with open(path, 'rb') as file:
        image = Image.open(file)
        image.load()
        return image


def _open_encoded(reader: object) -> None:
    """Open the stream of a timm reader without decoding: `datasets` would apply the EXIF orientation."""
    type(reader)._lazy_init(reader)
    import datasets
    if isinstance((reader.ds.features or {}).get(reader.input_key), datasets.Image):
        reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))


def derive_seed(*numbers: int) -> int:
    """One seed out of several whole numbers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_transforms(seed: int) -> None:
    """Seed the generators that transforms draw from: those of Python, NumPy and torch on the CPU.

    The numbers are those after timm's `random_seed`. That one seeds every device too, which takes half a millisecond or
    more where CUDA is not initialised, as in the processes of a loader.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def check_labels(labels: torch.Tensor | Sequence, num_classes: int, min_label: int = -1) -> None:
    """Raise ConfigError unless labels are whole numbers from `min_label` (-1: unreadable) to num_classes - 1."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ConfigError(f'--target-key must name a column of whole numbers, got labels such as {labels[0]!r}; '
                          f'name the one with the labels.')
    if not min_label <= labels.min() <= labels.max() < num_classes:
        raise ConfigError(f'--num-classes: labels must be from 0 to {num_classes - 1}, found {int(labels.min())} to '
                          f'{int(labels.max())}; name the column of the labels by --target-key, or give their '
                          f'number.')


def read_image(dataset: Dataset, index: int, mode: str = 'RGB') -> tuple[Image.Image, int]:
    """Image and label, without a transform; raises one of UNREADABLE."""
    if not isinstance(dataset, ImageDataset):
        image, label = dataset[index]
        return to_mode(image, mode), label
    file, label, *_ = dataset.reader[index]  # dataset[index] would skip an unreadable image
    with file, Image.open(file) as image:
        return to_mode(image, mode), -1 if label is None else label


def image_name(dataset: Dataset, index: int) -> str:
    """Absolute path of an image in printable form, else 'image INDEX'."""
    name = dataset.filename(index, absolute=True) if isinstance(dataset, ImageDataset) else None
    return printable(str(name or f'image {index}'))


def unreadable_reason(dataset: Dataset, index: int) -> str:
    """Why an image cannot be read, by reading it once more."""
    try:
        read_image(dataset, index)
    except UnidentifiedImageError:
        return 'cannot identify the image format'  # its own message repeats the path
    except UNREADABLE as error:
        return one_line(error)
    return 'it could be read at a second attempt'


def read_targets(dataset: Dataset) -> list[int]:
    """The label of every image of a data set that is not streamed."""
    if isinstance(dataset, ImageDataset):
        samples = getattr(dataset.reader, 'samples', None)
        return [label for _, label in samples] if samples is not None else list(dataset.reader.iter_targets())
    targets = getattr(dataset, 'targets', None)
    return [int(label) for label in (targets if targets is not None else (label for _, label in dataset))]


class StoredOutputs(Protocol):
    """Stored outputs of a teacher for `views` augmented views of every image."""

    views: int

    def row(self, view: int, index: int) -> tuple[torch.Tensor, ...]:
        """Outputs for one view of one image."""

    def load(self, device: torch.device) -> None:
        """Copy all outputs to a device, for `rows`."""

    def rows(self, views: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs of a batch: views (B,) of images (B,)."""


class IndexedImageDataset(Dataset):
    """(epoch, index) -> (image, label, index of the requested image if it is unreadable, else -1, *outputs).

    With `substitute` (training) the next readable image takes the place of an unreadable one. Without it (evaluation)
    the image is blank and its label is -1, so that metrics leave it out.

    Args:
        dataset: What `create_dataset` returned.
        transform: PIL image to tensor.
        seed: Seed of the augmentation.
        mode: 'RGB' or 'L'.
        substitute: Whether another image takes the place of an unreadable one.
        outputs: Stored outputs of a teacher; keys are then (view, index), and the outputs of that view are appended.
    """

    def __init__(self, dataset: Dataset, transform: Callable, seed: int = 0, mode: str = 'RGB',
                 substitute: bool = False, outputs: StoredOutputs | None = None):
        self.dataset, self.transform, self.seed, self.mode, self.substitute = dataset, transform, seed, mode, substitute
        self.outputs = outputs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        for step in range(len(self) if self.substitute else 1):
            try:
                image, label = read_image(self.dataset, (index + step) % len(self), self.mode)
                bad = index if step else -1
                break
            except UNREADABLE:
                continue
        else:
            image, label, bad = Image.new(self.mode, (1, 1)), -1, index
        seed_transforms(derive_seed(self.seed, epoch, index))
        return self.transform(image), label, bad, *(self.outputs.row(epoch, index) if self.outputs else ())


class StreamingImageDataset(IterableDataset):
    """(image, label, -1) from a stream of timm; unreadable images are logged and skipped, as in timm.

    Args:
        dataset: What `create_dataset` returned.
        transform: PIL image to tensor.
        seed: Seed of the augmentation.
        rank: Rank of this process.
        mode: 'RGB' or 'L'.
    """

    def __init__(self, dataset: IterableImageDataset, transform: Callable, seed: int = 0, rank: int = 0,
                 mode: str = 'RGB'):
        self.dataset, self.transform, self.seed, self.rank, self.mode = dataset, transform, seed, rank, mode
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        worker = info.id if (info := get_worker_info()) else 0
        for position, (image, label) in enumerate(self.dataset):
            try:
                image = to_mode(decode(image), self.mode)
            except UNREADABLE as error:
                _logger.warning(f'unreadable, skipped: image {position} of this stream: {one_line(error)}')
                continue
            seed_transforms(derive_seed(self.seed, self.epoch, self.rank, worker, position))
            yield self.transform(image), label, -1


def decode(image: Image.Image | dict) -> Image.Image:
    """Open an image of a stream; hfids/ gives the bytes or the path of its file instead of an image."""
    if not isinstance(image, dict):
        return image
    if image['bytes'] is not None:
        return Image.open(BytesIO(image['bytes']))
    return _open_image(image['path'])
