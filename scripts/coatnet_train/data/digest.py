"""Digest of a data set: it depends on the images, not on the folder or machine that holds them."""
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import Dataset

from coatnet_train.data.dataset import read_targets

__all__ = ['data_digest']

HASHED = 2 ** 31  # bytes of a data set that are hashed in full, in a few seconds
PART = 4096  # bytes of each further file that are hashed


def data_digest(dataset: Dataset, class_names: list[str], accelerator: Accelerator) -> str:
    """SHA-256 over class names, labels, file names and contents, computed by the main process and broadcast.

    File names are relative to the split and modification times are ignored, so a copy elsewhere (such as the local disk
    of a node) has the same digest. Contents are included because swapped files may have equal sizes, as all .bmp files
    of one height and width do. Files are hashed in full within the first 2 GiB of the data set; each later file adds
    its size and the 4 KiB in its middle. hfids/ and tfds/ add only class names and length.

    Args:
        dataset: What `create_dataset` returned.
        class_names: In label order.
        accelerator: Whose processes share the digest.
    """
    digests = [compute_digest(dataset, class_names) if accelerator.is_main_process else None]
    return broadcast_object_list(digests)[0]


def compute_digest(dataset: Dataset, class_names: list[str]) -> str:
    targets = read_targets(dataset) if isinstance(dataset, ImageDataset) else list(getattr(dataset, 'targets', ()))
    digest = hashlib.sha256(json.dumps([class_names, len(dataset), targets], default=str).encode())
    left = HASHED
    for name, open_file in files_of(dataset):
        digest.update(os.fsencode(f'\n{name}\n'))
        try:
            with open_file() as file:
                size = file.seek(0, os.SEEK_END)
                whole = size <= left
                file.seek(0 if whole else max(0, size // 2 - PART // 2))
                digest.update(f'{size}\n'.encode() + file.read(size if whole else PART))
                left -= size if whole else 0
        except OSError:
            digest.update(b'unreadable')  # such as a broken link, which counts as an unreadable image
    if (data := getattr(dataset, 'data', None)) is not None:  # torchvision's CIFAR and MNIST hold theirs in memory
        digest.update(np.ascontiguousarray(data).tobytes())
    return digest.hexdigest()


def files_of(dataset: Dataset) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Name of each image or shard relative to the split, and a function that opens it."""
    if isinstance(dataset, ImageDataset):  # a folder, or hfds/, whose names may be absolute
        for index in range(len(dataset)):
            name = dataset.filename(index) or str(index)
            yield (Path(name).name if os.path.isabs(name) else name), partial(open_image, dataset, index)
    elif isinstance(dataset, IterableImageDataset):
        shards = getattr(getattr(dataset.reader, 'split_info', None), 'filenames', ())  # of wds/
        for name in shards:
            yield name, partial(open, os.path.join(dataset.reader.root, name), 'rb')
    else:
        for path, _ in getattr(dataset, 'samples', ()):  # torchvision's folders
            yield os.path.relpath(path, dataset.root), partial(open, path, 'rb')


def open_image(dataset: ImageDataset, index: int) -> BinaryIO:
    return dataset.reader[index][0]
