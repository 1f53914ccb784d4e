"""Where images come from: settings that scripts share, and the checks that need neither torch nor timm."""
from dataclasses import dataclass

__all__ = ['DataSettings', 'is_stream']


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where pictures come from."""

    data_dir: str = ''  # Folder with a sub-folder a split and in it one a class, or where --dataset keeps its files.
    dataset: str = ''  # Empty for a folder; torch/cifar10, hfds/OWNER/NAME, hfids/OWNER/NAME (streamed), wds/ (shards).
    dataset_download: bool = False  # Let torchvision download the data set.
    class_map: str = ''  # File of class names in label order, for folders and streams.
    input_key: str = ''  # Column of the pictures in hfds/, hfids/ and wds/ (image if not given; in wds/ any image).
    target_key: str = ''  # Column of the labels there (label if not given).
    workers: int = 4  # Processes that read pictures; 0 reads in the main one.


def is_stream(settings: DataSettings) -> bool:
    """Whether pictures come in an order of their own, without an index."""
    return settings.dataset.startswith(('hfids/', 'wds/', 'tfds/'))
