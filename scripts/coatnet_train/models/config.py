"""Settings of a model that commands share, and their checks, without torch and timm."""
import math
from dataclasses import dataclass

from coatnet_train.runtime.cli import ConfigError, flag

__all__ = ['INTERPOLATIONS', 'ModelSettings', 'check_model_settings']

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model, and the preprocessing of its images."""

    model: str  # Any name of timm.list_models(), or hf-hub:OWNER/NAME, or local-dir:FOLDER.
    pretrained: bool = False  # Load the model's pretrained weights.
    num_classes: int | None = None  # Number of classes (the data's or the model's own if not given).
    img_size: int | None = None  # Height and width in pixels (the model's own if not given).
    in_chans: int | None = None  # Read images as RGB (3) or grey (1) (the model's own if not given).
    model_kwargs: tuple[str, ...] = ()  # More arguments of the model, as key=value.
    mean: tuple[float, ...] = ()  # Mean of each channel, in 0..1 (the model's own if not given).
    std: tuple[float, ...] = ()  # Standard deviation of each channel (the model's own if not given).
    interpolation: str = ''  # Resizing method, such as bicubic (the model's own if not given).
    crop_pct: float | None = None  # Fraction of the resized image kept in evaluation (the model's if not given).
    crop_mode: str = ''  # How evaluation crops: center, squash or border (the model's own if not given).


def check_model_settings(settings: ModelSettings) -> None:
    """Raise ConfigError for values that cannot work, without torch and timm; `open_model` checks the name."""
    if settings.img_size is not None and settings.img_size <= 0:
        raise ConfigError(f'--img-size must be greater than 0, got {settings.img_size}.')
    if settings.crop_pct is not None and not 0 < settings.crop_pct <= 1:
        raise ConfigError(f'--crop-pct must be above 0 and at most 1, got {settings.crop_pct}.')
    if settings.num_classes is not None and settings.num_classes < 0:
        raise ConfigError(f'--num-classes must be at least 0, got {settings.num_classes}.')
    if not all(map(math.isfinite, settings.mean)):
        raise ConfigError(f'--mean must be a finite number for each channel, got {settings.mean}.')
    if any(not 0 < value < math.inf for value in settings.std):
        raise ConfigError(f'--std must be finite and greater than 0 for each channel, got {settings.std}.')
    for name, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if getattr(settings, name) not in ('', *known):  # timm takes an unknown crop mode for center
            raise ConfigError(f'{flag(name)} must be {", ".join(known[:-1])} or {known[-1]}, got '
                              f'{getattr(settings, name)!r}.')
    if settings.in_chans not in (None, 1, 3):
        raise ConfigError(f'--in-chans must be 3 (images read as RGB) or 1 (as grey), got {settings.in_chans}.')
    if wrong := [item for item in settings.model_kwargs if '=' not in item]:
        raise ConfigError(f'--model-kwargs must be key=value, got {wrong[0]!r}.')
    flags = ('num_classes', 'in_chans', 'img_size', 'drop_rate', 'drop_path_rate', 'pretrained', 'checkpoint_path',
             'features_only')
    if wrong := [item for item in settings.model_kwargs if item.split('=')[0] in flags]:
        raise ConfigError(f'--model-kwargs {wrong[0]}: this one has a flag of its own, use that.')
