"""Hold out some training images of each class, so that settings are not chosen on the validation split.

    python scripts/hold_out.py tiny-imagenet/train tin200 --per-class 10

fills tin200/train and tin200/validation with links to the images; the last images of each class in natural order go to
validation. The source folder is not changed. Only the files that finetune.py would read are linked. Train with
finetune.py --data-dir tin200, and evaluate on the real validation split once, at the end, with eval_imagenet.py.
"""
import os
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.data.image_folder import list_images
from coatnet_train.runtime.cli import ConfigError, one_line, parse_flags, run_cli, tyro


@dataclass(frozen=True)
class HoldOutSettings:
    train_dir: tyro.conf.Positional[Path]  # Folder with a sub-folder of images for each class.
    output: tyro.conf.Positional[Path]  # New folder to fill with train/ and validation/.
    per_class: int = 10  # Images of each class to hold out.


def main(settings: HoldOutSettings) -> dict[str, int]:
    """Fill the new folder, and return the number of images of each split; raises ConfigError if it cannot be filled."""
    if not settings.train_dir.is_dir():
        raise ConfigError(f'TRAIN_DIR {settings.train_dir} is not a folder; give one with a sub-folder for each '
                          f'class.')
    try:
        found = list_images(settings.train_dir, 'TRAIN_DIR')
    except OSError as error:
        raise ConfigError(f'TRAIN_DIR {settings.train_dir} cannot be read: {one_line(error)}.') from error
    classes = {**found.images, **{name: [] for name in found.empty}}
    if not classes or '' in classes:
        raise ConfigError(f'TRAIN_DIR {settings.train_dir} must hold a sub-folder for each class, but has none.')
    if settings.output.exists():
        raise ConfigError(f'OUTPUT {settings.output} exists, and is never written over; remove it or name another.')
    if settings.output.resolve().is_relative_to(settings.train_dir.resolve()):
        raise ConfigError(f'OUTPUT must lie outside TRAIN_DIR {settings.train_dir}, whose folders are classes, got '
                          f'{settings.output}; name another.')
    counts = {'train': 0, 'validation': 0}
    for name, images in sorted(classes.items()):
        folder = settings.train_dir / name
        if len(images) < 2:
            raise ConfigError(f'TRAIN_DIR {settings.train_dir} must have at least two images of a class, one to '
                              f'hold out, one to train on, but {folder} has {len(images)}; add some or remove it.')
        if not 0 < settings.per_class < len(images):
            raise ConfigError(f'--per-class must be from 1 to {len(images) - 1}, all but one of the images in '
                              f'{folder}, got {settings.per_class}.')
    for name, images in sorted(classes.items()):
        for place, image in enumerate(images):
            split = 'train' if place < len(images) - settings.per_class else 'validation'
            link = settings.output / split / name / image.name
            try:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(image, link.parent))  # relative, so that both folders may move together
            except OSError as error:
                raise ConfigError(f'OUTPUT {settings.output} cannot be written: {one_line(error)}.') from error
            counts[split] += 1
    print(f'{counts["train"]} images to train on and {counts["validation"]} held out, of {len(classes)} classes, '
          f'in {settings.output}')
    return counts


if __name__ == '__main__':
    run_cli('hold_out.py', lambda: main(parse_flags(HoldOutSettings, __doc__)))
