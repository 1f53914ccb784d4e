"""Image folders, CLASS/IMAGE: one listing for training, evaluation, feature extraction and hold_out.py.

Tiny-ImageNet's own layout is read as well: SYNSET/images/IMAGE in train/, images/ and val_annotations.txt in val/.
Hidden files and folders are skipped. Links are followed, except those to a folder that contains them.
"""
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coatnet_train.data.image_files import is_image_name
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.console import note, printable

__all__ = ['ImageFolder', 'find_images', 'list_images', 'look_alikes', 'natural_key']

SYSTEM_FILES = ('thumbs.db', 'desktop.ini')
SYSTEM_FOLDERS = ('__MACOSX',)
ANNOTATIONS = 'val_annotations.txt'  # Tiny-ImageNet's: file, synset and a box in each line


def natural_key(name: str) -> list[str | int]:
    """Natural sort key, 9.jpg before 10.jpg: as timm's, which however fails for digits such as ²."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', name.lower())]


@dataclass
class ImageFolder:
    """Images of one split.

    root: Folder of the split.
    images: Images in natural order by class folder; the class '' stands for the split folder itself.
    left_out: Count and first path of the files that are not images, by suffix.
    empty: Class folders without images.
    loops: Links to a folder that contains them.
    """

    root: Path
    images: dict[str, list[Path]] = field(default_factory=dict)
    left_out: dict[str, tuple[int, Path]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    def leave_out(self, path: Path) -> None:
        suffix = path.suffix.lower() or 'without a suffix'
        count, first = self.left_out.get(suffix, (0, path))
        self.left_out[suffix] = count + 1, first

    def report(self) -> None:
        """Print once which files, folders and links were left out."""
        message = [f'{count} {printable(suffix)} (such as {shown(first, self.root)})'
                for suffix, (count, first) in sorted(self.left_out.items())]
        if self.empty:
            message.append(f'{len(self.empty)} class folder{"s" * (len(self.empty) > 1)} without images '
                        f'({", ".join(map(printable, self.empty[:5]))}{", ..." * (len(self.empty) > 5)})')
        if self.loops:
            message.append(f'links to a folder that holds them ({shown(self.loops[0], self.root)})')
        if message:
            note(f'left out of {printable(str(self.root))}: {", ".join(message)}')


def shown(path: Path, root: Path) -> str:
    return printable(str(path.relative_to(root)))


def place_of(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino


def is_hidden(entry: os.DirEntry) -> bool:
    return (entry.name.startswith('.') or entry.name.lower() in SYSTEM_FILES or
            (entry.name in SYSTEM_FOLDERS and is_folder(entry)))


def is_folder(entry: os.DirEntry) -> bool:
    """Whether this is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders in a folder that are not hidden, in the order of their names."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not is_hidden(entry)), key=lambda entry: entry.name)
        return ([folder / entry.name for entry in found if not is_folder(entry)],
                [folder / entry.name for entry in found if is_folder(entry)])


def walk(folder: Path, above: Iterable[tuple[int, int]] = ()) -> Iterator[Path]:
    """Files below a folder; links to one of its parent folders are not followed.

    Args:
        folder: Where to begin.
        above: (device, inode) of its parent folders.
    """
    place, above = place_of(folder), set(above)
    if place in above:
        return
    files, folders = scan(folder)
    yield from files
    for inner in folders:
        yield from walk(inner, above | {place})


def holders(folder: Path) -> set[tuple[int, int]]:
    """(device, inode) of a folder and of all its parents."""
    folder = folder.resolve()
    return {place_of(path) for path in (folder, *folder.parents)}


def list_images(root: Path, name: str = '--data-dir') -> ImageFolder:
    """List the images of a split and print what was left out.

    Args:
        root: Folder of the split.
        name: Flag or argument that an error message names.

    Raises ConfigError for an image that is not at CLASS/IMAGE, or classes whose names cannot be told apart.
    """
    found, above = ImageFolder(root), holders(root)
    files, folders = scan(root)
    if any(file.name == ANNOTATIONS for file in files) and [folder.name for folder in folders] == ['images']:
        found.images = read_annotations(root, name)
        return found
    stray = [file for file in files if is_image_name(file.name)]
    for file in files:
        if file not in stray:
            found.leave_out(file)
    for folder in folders:
        if place_of(folder) in above:
            found.loops.append(folder)
        elif images := list_class(found, folder, above, name):
            found.images[folder.name] = images
        else:
            found.empty.append(folder.name)
    if stray and found.images:
        raise ConfigError(f'{name} {printable(str(root))}: {printable(stray[0].name)} lies beside folders of '
                          f'classes; move it, every image must lie in the folder of its class.')
    if stray:
        found.images[''] = sorted(stray, key=order)
    for first, second in look_alikes(found.images):
        raise ConfigError(f'{name} {printable(str(root))}: the class folders {first!a} and {second!a} look '
                          f'alike, but are spelled differently in Unicode; move the images of both into one.')
    found.report()
    return found


def list_class(found: ImageFolder, folder: Path, above: set[tuple[int, int]], name: str) -> list[Path]:
    """Images directly in a class folder (Tiny-ImageNet: in its images/); raises ConfigError for images below that."""
    files, folders = scan(folder)
    images = [file for file in files if is_image_name(file.name)]
    if not images and [inner.name for inner in folders] == ['images']:
        files = [file for file in files if not file.name.endswith('_boxes.txt')]
        inner_files, folders = scan(folders[0])
        images = [file for file in inner_files if is_image_name(file.name)]
        files += inner_files
    for file in files:
        if not is_image_name(file.name):
            found.leave_out(file)
    for inner in folders:
        if place_of(inner) in above | {place_of(folder)}:
            found.loops.append(inner)
        for file in walk(inner, above | {place_of(folder)}):
            if is_image_name(file.name):
                raise ConfigError(f'{name} {printable(str(found.root))}: {shown(file, found.root)} lies deeper than '
                                  f'CLASS/IMAGE; move it into {printable(folder.name)}, or make its folder a class.')
            found.leave_out(file)
    return sorted(images, key=order)


def order(path: Path) -> tuple[list[str | int], str]:
    return natural_key(path.name), path.name


def read_annotations(root: Path, name: str) -> dict[str, list[Path]]:
    """Images of Tiny-ImageNet's val/ by class, from val_annotations.txt; raises ConfigError if that is invalid."""
    images = {}
    try:
        lines = (root / ANNOTATIONS).read_text(encoding='utf-8').splitlines()
        for file, synset, *_ in (line.split('\t') for line in lines if line.strip()):
            images.setdefault(synset, []).append(root / 'images' / file)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{name} {printable(str(root))}: {ANNOTATIONS} must have IMAGE, a tab and a class in each '
                          f'line: {one_line(error)}; repair it, or move the images to CLASS/IMAGE.') from error
    return {synset: sorted(files, key=order) for synset, files in images.items()}


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in their Unicode normalisation (NFC or NFD)."""
    seen, pairs = {}, []
    for name in names:
        other = seen.setdefault(unicodedata.normalize('NFC', name), name)
        if other != name:
            pairs.append((other, name))
    return pairs


def find_images(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Images at the given paths and below the given folders, each once, and an error message for each path without any.
    """
    found, errors = {}, []
    for path in paths:
        try:
            if not path.is_dir():
                found.setdefault(path.absolute(), path)
                continue
            files = list(walk(path, holders(path) - {place_of(path)}))
        except OSError as error:
            errors.append(f'{printable(str(path))}: {one_line(error)}')
            continue
        images = sorted(file for file in files if is_image_name(file.name))
        others = Counter(file.suffix.lower() or 'without a suffix' for file in files if not is_image_name(file.name))
        counted = ', '.join(f'{count} {printable(suffix)}' for suffix, count in sorted(others.items()))
        if not images:
            errors.append(f'{printable(str(path))}: no images in this folder, but {counted or "no files at all"}')
        elif others:
            note(f'left out of {printable(str(path))}: {counted}')
        for image in images:
            found.setdefault(image.absolute(), image)
    return list(found.values()), errors
