"""Image folders as timm datasets."""
import pickle
import shlex
from pathlib import Path

from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder

from coatnet_train.data.config import DataSettings
from coatnet_train.data.image_folder import list_images, natural_key
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.console import printable

__all__ = ['SPLIT_FOLDERS', 'FolderReader', 'open_folder']

SPLIT_FOLDERS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'valid', 'eval', 'test')}


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, over the images that `list_images` finds.

    Args:
        root: Folder of the split.
        class_map: File of class names, '' for all classes in natural order.
    """

    def __init__(self, root: Path, class_map: str = ''):
        self.root = str(root)
        images = {printable(name): paths for name, paths in list_images(root).images.items()}
        self.folders = list(images)
        names = sorted(images, key=lambda name: (natural_key(name), name))
        self.class_to_idx = (load_class_map(class_map, self.root) if class_map else
                             {name: label for label, name in enumerate(names)})
        samples = [(str(path), self.class_to_idx[name]) for name, paths in images.items() if name in self.class_to_idx
                   for path in paths]
        self.samples = sorted(samples, key=lambda sample: (natural_key(sample[0]), sample[0]))


def open_folder(settings: DataSettings, split: str) -> tuple[ImageDataset, list[str]]:
    """Open one split of a folder and return timm's dataset with its class names in label order.

    Raises ConfigError for a folder or class map that is missing, unreadable or without images.
    """
    root = Path(settings.data_dir)
    if not root.is_dir() or not settings.data_dir:
        raise ConfigError(f'--data-dir {settings.data_dir} is not a folder; give the one that holds the images.')
    names = SPLIT_FOLDERS.get(split, (split,))
    folder = next((path for name in names if (path := root / name).is_dir()), None)
    layout = f'expected {root / names[0]}/CLASS/IMAGE.jpg (or .png)'
    if folder is None:
        raise ConfigError(f'--data-dir {settings.data_dir} has no folder {" or ".join(names)}; {layout}'
                          f'{_hold_out(root, split)}.')
    if settings.class_map and not Path(settings.class_map).is_file():
        raise ConfigError(f'--class-map {settings.class_map} is not a file; give one line for each class.')
    if settings.class_map.lower().endswith('.txt'):
        _check_names(settings.class_map)
    try:
        dataset = ImageDataset(str(folder), FolderReader(folder, settings.class_map))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f'--data-dir {settings.data_dir} cannot be read: {one_line(error)}.') from error
    except (AssertionError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f'--class-map {settings.class_map} must be a .txt file with a class a line.') from error
    if not len(dataset):
        if settings.class_map:
            raise ConfigError(f'--class-map {settings.class_map} names no folder of {folder} that holds images; '
                              f'give the names of its folders, one a line.')
        raise ConfigError(f'--data-dir {settings.data_dir}: no images found in {folder}; {layout}.')
    return dataset, sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)


def _hold_out(root: Path, split: str) -> str:
    """Text for an error message: the hold_out.py command that makes the missing split; '' where it does not apply."""
    known = [root / name for names in SPLIT_FOLDERS.values() for name in names if (root / name).is_dir()]
    train = next((path for path in known if path.name in SPLIT_FOLDERS['train']), root)
    if split not in SPLIT_FOLDERS or (known and train == root) or not any(path.is_dir() for path in train.iterdir()):
        return ''
    return (f'; python scripts/hold_out.py {shlex.quote(str(train))} NEW_FOLDER --per-class 10 makes NEW_FOLDER with '
            f'train/ and validation/ of links to the images in {train}, for --data-dir')


def _check_names(class_map: str) -> None:
    """Raise ConfigError for blank lines, which timm takes for classes, and for names given twice."""
    places = {}
    try:
        with Path(class_map).open(encoding='utf-8') as file:
            names = [line.strip() for line in file]
    except ValueError as error:
        raise ConfigError(f'--class-map {class_map} must be text in UTF-8: {one_line(error)}; save it so.') from error
    for number, name in enumerate(names, 1):
        if not name:
            raise ConfigError(f'--class-map {class_map} must have a class on each line, line {number} is blank; '
                              f'remove it.')
        if places.setdefault(name, number) != number:
            raise ConfigError(f'--class-map {class_map} must name each class once, {name} stands on lines '
                              f'{places[name]} and {number}; remove one.')
