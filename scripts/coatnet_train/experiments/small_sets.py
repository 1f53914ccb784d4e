"""Small image sets drawn by a seed: some images of each class to train on, and others held out."""
import os
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from coatnet_train.experiments.compare_recipes_config import CompareRecipesSettings
from coatnet_train.runtime.cli import ConfigError

__all__ = ['MAKERS', 'images_in']

# Inclusive ranges of ImageNet-1k labels.
GROUPS = {
    'birds': ((7, 24), (80, 100), (127, 146)), 'dogs': ((151, 268),), 'other mammals': ((269, 299), (330, 388)),
    'reptiles and amphibians': ((25, 68),), 'insects and spiders': ((70, 79), (300, 326)), 'food': ((923, 965),)}
IMAGES = ('.jpg', '.jpeg', '.png', '.webp')


def write_digits(folder: Path, seed: int, size: int = 32) -> None:
    """Write 10 digits of each class to train on and 50 held out, as PNGs of `size` pixels."""
    from sklearn.datasets import load_digits  # from the extra [demo]

    digits = load_digits()
    random = np.random.default_rng(seed)
    for label in range(10):
        places = random.permutation(np.flatnonzero(digits.target == label))
        for split, chosen in (('train', places[:10]), ('validation', places[10:60])):
            (folder / split / str(label)).mkdir(parents=True)
            for place in chosen:
                grey = np.rint(digits.images[place] * 255 / 16).astype(np.uint8)  # 17 levels of ink, 0 to 16
                image = Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC).convert('RGB')
                image.save(folder / split / str(label) / f'{place:04d}.png')


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob('*') if path.suffix.lower() in IMAGES)


def link_images(folder: Path, seed: int, classes: dict[str, list[Path]], train: float, held_out: int | None) -> None:
    """Draw images of each class and link them.

    Args:
        folder: Folder to fill with train/ and validation/.
        seed: Seed of the draw.
        classes: Image files of each class.
        train: Number of training images of each class; below 1 a fraction.
        held_out: Number of held-out images of each class; None takes all others.
    """
    random = np.random.default_rng(seed)
    for name, files in classes.items():
        drawn = [files[place] for place in random.permutation(len(files))]
        count = round(train * len(drawn)) if train < 1 else int(train)
        last = len(drawn) if held_out is None else count + held_out
        for split, chosen in (('train', drawn[:count]), ('validation', drawn[count:last])):
            (folder / split / name).mkdir(parents=True)
            for file in chosen:
                link = folder / split / name / file.name
                link.symlink_to(os.path.relpath(file, link.parent))


def link_imagenette(
        settings: CompareRecipesSettings, folder: Path, seed: int, classes: int, train: int, held_out: int) -> None:
    folders = sorted(path for path in Path(settings.imagenette).glob('*') if path.is_dir())[:classes]
    found = {path.name: images_in(path) for path in folders}
    if len(found) < classes or min(map(len, found.values())) < train + held_out:
        raise ConfigError(f'--imagenette {settings.imagenette} must hold {classes} classes of at least '
                          f'{train + held_out} images; give the training split of Imagenette.')
    link_images(folder, seed, found, train, held_out)


def link_groups(settings: CompareRecipesSettings, folder: Path, seed: int) -> None:
    synsets = ImageNetInfo('imagenet-1k').label_names()
    found = {name: [file for first, last in ranges for label in range(first, last + 1)
                    for file in images_in(Path(settings.samples) / synsets[label])[:1]]
             for name, ranges in GROUPS.items()}
    if min(map(len, found.values())) < 8:
        raise ConfigError(f'--samples {settings.samples} must hold an image of most classes of ImageNet, in a folder '
                          f'named by its synset each.')
    link_images(folder, seed, found, 0.5, None)


# Function that makes each set, and the image size to train at (the model's own if None).
MAKERS = {
    'digits': (lambda settings, folder, seed: write_digits(folder, seed), 32),
    'imagenette_60': (lambda *where: link_imagenette(*where, classes=5, train=12, held_out=40), None),
    'imagenet_groups': (link_groups, None),
    'imagenette_2000': (lambda *where: link_imagenette(*where, classes=10, train=200, held_out=50), None)}
