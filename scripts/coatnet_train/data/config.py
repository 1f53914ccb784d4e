"""Settings of image sources that commands share, without torch and timm."""
import os
from dataclasses import dataclass, field

__all__ = ['DataSettings', 'default_workers', 'is_stream']


def default_workers(max_workers: int = 4) -> int:
    """Number of processes that read images: one for each core that this process may use, at most `max_workers`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(max_workers, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Image source."""

    data_dir: str = ''  # Folder of SPLIT/CLASS/IMAGE files, or the folder where --dataset keeps its files.
    dataset: str = ''  # Empty for a folder; torch/cifar10, hfds/OWNER/NAME, hfids/OWNER/NAME (streamed), wds/ (shards).
    dataset_download: bool = False  # Let torchvision download the data set.
    class_map: str = ''  # File of class names in label order, for folders and streams.
    input_key: str = ''  # Column of the images in hfds/, hfids/ and wds/ (image if not given; in wds/ any image).
    target_key: str = ''  # Column of the labels there (label if not given).
    workers: int = field(default_factory=default_workers)  # Processes that read images; 0 reads in the main one.


def is_stream(settings: DataSettings) -> bool:
    """Whether images are streamed in the source's order, without an index."""
    return settings.dataset.startswith(('hfids/', 'wds/', 'tfds/'))
