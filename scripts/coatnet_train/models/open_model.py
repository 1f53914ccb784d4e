"""Open any model of timm or the zoo, as every script does, and run it once on a blank image as a check."""
import pickle
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.models import (
    get_arch_pretrained_cfgs,
    is_model_pretrained,
    parse_model_name,
    resolve_model_input_args,
)
from torch import nn

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm
from coatnet_train.models.config import ModelSettings, check_model_settings
from coatnet_train.models.weights_file import load_weights, to_flags
from coatnet_train.runtime.cli import ConfigError, did_you_mean, one_line, parse_argument

__all__ = ['check_model_name', 'image_mode', 'means_weights', 'open_model']

MODES = {1: 'L', 3: 'RGB'}  # image mode by the model's input channels

# What timm, the zoo, torch and safetensors raise for a model that cannot be built or loaded.
ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, AttributeError, ZeroDivisionError,
          EOFError, pickle.UnpicklingError, SafetensorError)


def check_model_name(model: str) -> None:
    """Raise ConfigError for a name that timm does not know, or a tag that the architecture does not have."""
    try:
        source, name = parse_model_name(model)
    except ValueError as error:
        raise ConfigError(f'--model: {one_line(error)}') from error
    if source is None and not timm.is_model(name):
        raise ConfigError(f'--model {name} is not a name in timm.list_models()'
                          f'{did_you_mean(name, timm.list_models()) or "."}')
    if source == 'local-dir' and not Path(name, 'config.json').is_file():
        raise ConfigError(f'--model local-dir:{name} must be a folder with config.json and weights, but has no '
                          f'config.json; give a run of finetune.py, such as local-dir:output/NAME.')
    architecture, _, tag = name.partition('.')
    if source is None and tag and name not in (tags := get_arch_pretrained_cfgs(architecture)):
        raise ConfigError(f'--model {name}: {architecture} has no tag {tag!r}; give one of {", ".join(tags)}.')


def means_weights(model: str) -> bool:
    """Whether the name stands for weights and not only an architecture: hf-hub:, local-dir:, or a tag with weights."""
    return model.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or ('.' in model and is_model_pretrained(model))


def image_mode(data_config: dict) -> str:
    """Mode in which a model's images are read: 'RGB' or 'L'."""
    return MODES[data_config['input_size'][0]]


def cannot_be_built(settings: ModelSettings, sizes: str, error: Exception) -> ConfigError:
    size = '' if settings.img_size is None else f' with --img-size {settings.img_size}'
    return ConfigError(f'--model {settings.model}{size}{sizes} cannot be built: {to_flags(one_line(error))[:400]}')


def open_model(
        settings: ModelSettings, checkpoint: str = '', checkpoint_flag: str = '--checkpoint',
        use_train_size: bool = False, try_sizes: tuple[int, ...] = (), use_ema: bool = True, **arguments: object,
) -> tuple[nn.Module, dict]:
    """Create the model in eval mode, and resolve its data settings as `timm.data.resolve_data_config` does.

    Args:
        settings: Model, and overrides of its image preprocessing.
        checkpoint: File of weights to load, strictly.
        checkpoint_flag: The option that named it, for messages.
        use_train_size: Use the training size and crop instead of the test size and crop.
        try_sizes: Other image sizes in pixels to check.
        use_ema: Take averaged weights where the checkpoint has some.
        arguments: Keyword arguments of `timm.create_model`; None leaves one out.

    Raises ConfigError for a model that cannot be built, images that it does not accept, or weights that do not fit.
    """
    check_model_settings(settings)
    check_model_name(settings.model)
    if checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f'{checkpoint_flag} {checkpoint} is not a file; give one or leave it.')
    changed = {
        'img_size': settings.img_size, 'interpolation': settings.interpolation, 'crop_pct': settings.crop_pct,
        'crop_mode': settings.crop_mode, 'mean': settings.mean or None, 'std': settings.std or None}
    changed = {name: value for name, value in changed.items() if value}
    model_kwargs = dict(map(parse_argument, settings.model_kwargs))
    try:
        # timm's rule: img_size goes to models built for one size, others just get images of that size
        img_size = resolve_model_input_args(settings.model, {'img_size': settings.img_size}).get('img_size')
        model = timm.create_model(
            settings.model, pretrained=settings.pretrained, in_chans=settings.in_chans, img_size=img_size, **arguments,
            **model_kwargs).eval()
        data_config = resolve_input_data_config(model, changed, use_test_size=not use_train_size)
        channels = data_config['input_size'][0]
        with torch.no_grad():
            model(torch.zeros(1, *data_config['input_size']))
            for size in try_sizes:
                model(torch.zeros(1, channels, size, size))
    except ERRORS as error:
        sizes = f' and images of {try_sizes} pixels' if try_sizes else ''
        raise cannot_be_built(settings, sizes, error) from error
    if channels not in MODES:
        raise ConfigError(f'--model {settings.model} takes images of {channels} channels, and these scripts read RGB '
                          f'(3) or grey (1); give --in-chans.')
    if checkpoint:
        load_weights(model, settings.model, checkpoint, checkpoint_flag, use_ema, frozenset(model_kwargs))
    return model, data_config
