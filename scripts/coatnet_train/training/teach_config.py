"""Settings of teach.py and their checks, without torch and timm."""
import sys
from dataclasses import dataclass, fields
from typing import Annotated

from coatnet_train.data.config import DataSettings, is_stream
from coatnet_train.models.config import INTERPOLATIONS
from coatnet_train.runtime.cli import ConfigError, check_range, flag, parse_flags, tyro
from coatnet_train.training.config import ImageAugmentationSettings, check_augmentation
from coatnet_train.training.recipes import recipe_defaults

__all__ = ['TeachSettings', 'check_values', 'read_settings']


@dataclass(frozen=True, kw_only=True)
class TaughtDataSettings(DataSettings):
    """Training images of the students."""

    train_split: str = 'train'  # Name of the training split.
    max_bad_images: float = 0.001  # Fraction of unreadable images to skip before the run ends.
    cache_images: bool = False  # Augment images that are cached on the device, as students with this option do.


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Teacher whose outputs are stored."""

    teacher: str  # Name as --model of finetune.py takes it: with weights, and with the data's classes.
    teacher_img_size: int | None = None  # Resize its images to this height and width (--img-size if not given).
    in_chans: int | None = None  # Read images as RGB (3) or grey (1) (the teacher's own if not given).


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings(ImageAugmentationSettings):
    """Augmentation, which must be that of the students."""

    img_size: int | None = None  # Height and width of a view in pixels (the teacher's own if not given).
    interpolation: str = 'bicubic'  # Resizing method; that of the students.
    mean: tuple[float, ...] = ()  # Mean of each channel in the students (the teacher's own if not given).
    std: tuple[float, ...] = ()  # Standard deviation there (the teacher's own if not given).
    seed: int = 42  # Of the views; the --seed of a student is its own.


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Stored outputs."""

    output: str = 'output/teacher_outputs'  # Folder for the shards and manifest.json.
    views: int = 4  # Augmented views of every image.
    top_k: int | None = None  # Keep the k largest logits, all other classes together as one (all if not given).
    temperatures: tuple[float, ...] = (1.0,)  # With --top-k: temperatures that students may have (--kd-temperature).
    shard_size: int = 4096  # Images in a shard.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Computation."""

    recipe: Annotated[str, tyro.conf.arg(
        help='Augmentation, --cache-images, sizes and normalisation of a recipe of finetune.py, over which other '
             'flags win.')] = ''
    batch_size: int = 64  # Images per step of each process.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    amp: bool = False  # Mixed precision.
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.


@dataclass(frozen=True, kw_only=True)
class TeachSettings(RunSettings, OutputSettings, AugmentationSettings, TeacherSettings, TaughtDataSettings):
    """All settings of teach.py."""


# Fields that a recipe may set here: those about the images, not those about training.
RECIPE_FIELDS = {field.name for field in fields(AugmentationSettings)} | {'cache_images', 'teacher_img_size'}


def check_values(settings: TeachSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    for name in ('views', 'top_k', 'shard_size', 'batch_size', 'img_size', 'teacher_img_size'):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f'{flag(name)} must be at least 1, got {value}.')
    check_range(settings, 'workers', 0, 2**10)
    check_range(settings, 'max_bad_images', 0, 1)
    check_range(settings, 'seed', 0, 2**32 - 1)
    check_augmentation(settings, settings.cache_images)
    if settings.interpolation not in INTERPOLATIONS:
        raise ConfigError(f'--interpolation must be one of {", ".join(INTERPOLATIONS)}, got '
                          f'{settings.interpolation!r}.')
    # in this range, logits / temperature fit into float16
    if not settings.temperatures or not all(0.05 <= value <= 100 for value in settings.temperatures):
        raise ConfigError(f'--temperatures must be one or more from 0.05 to 100, got {settings.temperatures}.')
    if is_stream(settings):
        raise ConfigError(f'--dataset {settings.dataset} is a stream, whose images have no index to know them by; use '
                          f'a folder, torch/ or hfds/.')


def read_settings(arguments: list[str] | None = None, description: str | None = None) -> TeachSettings:
    """Read the command line of teach.py; a --recipe sets the defaults of RECIPE_FIELDS.

    Args:
        arguments: Command line; sys.argv if not given.
        description: Text above the flags of --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults = {name: value for name, value in recipe_defaults(arguments).items() if name in RECIPE_FIELDS}
    return parse_flags(TeachSettings, description, arguments, defaults)
