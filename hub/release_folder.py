"""The model of a released folder: what export.py stores and verify.py holds it to."""
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import nn

import coatnet_zoo
from coatnet_train.runtime.cli import ConfigError, did_you_mean
from release_rules import check_tag

__all__ = ['bare_model', 'largest_gap', 'own_cfg', 'split_name', 'stored_dtypes']


def split_name(name: str, option: str = '--name') -> tuple[str, str]:
    """('coatnet_pico_64', 'tin200') of 'coatnet_pico_64.tin200'; refuses what timm or this zoo could not register."""
    architecture, _, tag = name.partition('.')
    mine = coatnet_zoo.list_models()
    if architecture not in mine:
        raise ConfigError(f'{option} must be a name of the zoo, a dot and a tag, such as coatnet_pico_64.tin200, got '
                          f'{name!r}{did_you_mean(architecture, mine) or "."}')
    check_tag(name, option)
    return architecture, tag


def bare_model(config: dict, device: str | None = None) -> nn.Module:
    """The registered name of a config.json with its classes, channels and image size, and nothing else changed.

    Args:
        config: As in config.json.
        device: Where parameters are created.
    """
    channels, *size = config['pretrained_cfg']['input_size']
    return timm.create_model(
        config['architecture'], num_classes=config['num_classes'], in_chans=channels, img_size=tuple(size),
        device=device).eval()


def stored_dtypes(model: nn.Module, dtype: str) -> dict[str, torch.dtype]:
    """How each tensor of a state dict is stored: 16 bits are for the weights of convolutions and linear layers alone.

    Norms with their statistics, biases, bias tables, layer scales and the kernels of LightConv keep what the model has.
    """
    rounded = {f'{name}.weight' for name, module in model.named_modules()
               if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))}
    return {name: getattr(torch, dtype) if name in rounded else value.dtype
            for name, value in model.state_dict().items()}


def largest_gap(logits: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest difference from the golden logits, as a fraction of the largest of these; NaN counts as infinite."""
    gap = ((logits - golden).abs().max() / golden.abs().max()).item()
    return gap if gap == gap else float('inf')


def own_cfg(architecture: str) -> dict:
    """What the zoo registers for an architecture itself, such as its paper."""
    return next(iter(get_arch_pretrained_cfgs(architecture).values())).to_dict()
