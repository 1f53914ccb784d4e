"""Any model of timm or the zoo, as every script opens it: it sees one picture before the real work begins."""
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from settings import SettingsError, did_you_mean, flag, one_line, parse_argument
from timm.data import resolve_input_data_config
from timm.models import (
    get_arch_pretrained_cfgs,
    is_model_pretrained,
    load_state_dict,
    parse_model_name,
    resolve_model_input_args,
)
from torch import nn

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm

__all__ = ['ModelSettings', 'check_checkpoint', 'check_model_settings', 'means_weights', 'open_model']

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What to open, and how pictures are made ready for it."""

    model: str  # Any name of timm.list_models(), or hf-hub:OWNER/NAME, or local-dir:FOLDER.
    pretrained: bool = False  # Load the model's pretrained weights.
    num_classes: int | None = None  # Number of classes (the data's or the model's own if not given).
    img_size: int | None = None  # Height and width in pixels (the model's own if not given).
    in_chans: int = 3  # Read pictures as RGB (3) or grey (1).
    model_kwargs: tuple[str, ...] = ()  # More arguments of the model, as key=value.
    mean: tuple[float, ...] = ()  # Mean of each channel, in 0..1 (the model's own if not given).
    std: tuple[float, ...] = ()  # Standard deviation of each channel (the model's own if not given).
    interpolation: str = ''  # Resizing method, such as bicubic (the model's own if not given).
    crop_pct: float | None = None  # Share of the resized picture kept in evaluation (the model's own if not given).
    crop_mode: str = ''  # How evaluation crops: center, squash or border (the model's own if not given).


def check_model_settings(settings: ModelSettings) -> None:
    """Refuse names and values that cannot work, before anything is read."""
    if settings.img_size is not None and settings.img_size <= 0:
        raise SettingsError(f'--img-size must be greater than 0, got {settings.img_size}.')
    if settings.crop_pct is not None and not 0 < settings.crop_pct <= 1:
        raise SettingsError(f'--crop-pct must be above 0 and at most 1, got {settings.crop_pct}.')
    if settings.num_classes is not None and settings.num_classes < 0:
        raise SettingsError(f'--num-classes must be at least 0, got {settings.num_classes}.')
    if not all(map(math.isfinite, settings.mean)):
        raise SettingsError(f'--mean must be a finite number for each channel, got {settings.mean}.')
    if any(not 0 < value < math.inf for value in settings.std):
        raise SettingsError(f'--std must be finite and greater than 0 for each channel, got {settings.std}.')
    for name, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if getattr(settings, name) not in ('', *known):  # timm takes an unknown crop mode for center
            raise SettingsError(f'{flag(name)} must be {", ".join(known[:-1])} or {known[-1]}, got '
                                f'{getattr(settings, name)!r}.')
    if settings.in_chans not in (1, 3):
        raise SettingsError(f'--in-chans must be 3 (pictures read as RGB) or 1 (as grey), got {settings.in_chans}.')
    if wrong := [item for item in settings.model_kwargs if '=' not in item]:
        raise SettingsError(f'--model-kwargs must be key=value, got {wrong[0]!r}.')
    flags = ('num_classes', 'in_chans', 'img_size', 'drop_rate', 'drop_path_rate', 'pretrained', 'checkpoint_path',
             'features_only')
    if wrong := [item for item in settings.model_kwargs if item.split('=')[0] in flags]:
        raise SettingsError(f'--model-kwargs {wrong[0]}: this one has a flag of its own, use that.')
    try:
        source, name = parse_model_name(settings.model)
    except ValueError as error:
        raise SettingsError(f'--model: {one_line(error)}') from error
    if source is None and not timm.is_model(name):
        raise SettingsError(f'--model {name} is not a name in timm.list_models()'
                            f'{did_you_mean(name, timm.list_models()) or "."}')
    architecture, _, tag = name.partition('.')
    if source is None and tag and name not in (tags := get_arch_pretrained_cfgs(architecture)):
        raise SettingsError(f'--model {name}: {architecture} has no tag {tag!r}; give one of {", ".join(tags)}.')


def means_weights(model: str) -> bool:
    """Whether who names this model means its weights: a folder, a repository, or a tag that has some."""
    return model.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or ('.' in model and is_model_pretrained(model))


def check_checkpoint(checkpoint: str, checkpoint_flag: str = '--checkpoint') -> None:
    """Refuse a file that holds no weights which timm can read."""
    try:
        load_state_dict(checkpoint)
    except Exception as error:  # torch.load raises whatever the bytes of another file make of it
        raise SettingsError(f'{checkpoint_flag} {checkpoint} holds no weights that torch or safetensors can read; give '
                            f'another file or leave it.') from error


def open_model(
        settings: ModelSettings, checkpoint: str = '', checkpoint_flag: str = '--checkpoint',
        use_train_size: bool = False, try_sizes: tuple[int, ...] = (), **arguments: object,
) -> tuple[nn.Module, dict]:
    """Create the model in eval mode, with its data settings as `timm.data.resolve_data_config` gives them.

    Args:
        settings: The model and what the user changes of its pictures.
        checkpoint: File of weights to load, strictly.
        checkpoint_flag: The option that named it, for messages.
        use_train_size: Take the size and crop of training, not those that the weights are tested at.
        try_sizes: Other sizes in pixels that pictures will have.
        arguments: Of `timm.create_model`; None leaves one out.

    Raises SettingsError for what timm cannot build or the model cannot take.
    """
    check_model_settings(settings)
    if checkpoint and not Path(checkpoint).is_file():
        raise SettingsError(f'{checkpoint_flag} {checkpoint} is not a file; give one or leave it.')
    changed = {
        'img_size': settings.img_size, 'interpolation': settings.interpolation, 'crop_pct': settings.crop_pct,
        'crop_mode': settings.crop_mode, 'mean': settings.mean or None, 'std': settings.std or None}
    changed = {name: value for name, value in changed.items() if value}
    try:
        # timm's rule: img_size goes to models built for one size, others just get pictures of that size
        img_size = resolve_model_input_args(settings.model, {'img_size': settings.img_size}).get('img_size')
        model = timm.create_model(
            settings.model, pretrained=settings.pretrained, checkpoint_path=checkpoint, in_chans=settings.in_chans,
            img_size=img_size, **arguments, **dict(map(parse_argument, settings.model_kwargs))).eval()
        data_config = resolve_input_data_config(model, changed, use_test_size=not use_train_size)
        with torch.no_grad():
            model(torch.zeros(1, *data_config['input_size']))
            for size in try_sizes:
                model(torch.zeros(1, settings.in_chans, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, AttributeError, ZeroDivisionError,
            EOFError, pickle.UnpicklingError, SafetensorError) as error:
        if checkpoint:
            check_checkpoint(checkpoint, checkpoint_flag)
        size = '' if settings.img_size is None else f' with --img-size {settings.img_size}'
        size += f' and pictures of {try_sizes} pixels' if try_sizes else ''
        size += f' and {checkpoint_flag} {checkpoint}' if checkpoint else ''
        raise SettingsError(f'--model {settings.model}{size} cannot be built: {one_line(error)[:400]}') from error
    return model, data_config
