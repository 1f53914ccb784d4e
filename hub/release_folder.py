"""The model of a release folder, as export.py stores it and verify.py checks it."""
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import nn

import coatnet_zoo
from coatnet_train.runtime.cli import ConfigError, did_you_mean
from release_rules import check_tag

__all__ = ['bare_model', 'largest_gap', 'own_cfg', 'split_name', 'stored_dtypes']


def split_name(name: str, option: str = '--name') -> tuple[str, str]:
    """Split 'coatnet_pico_64.tin200' into architecture and tag; raises ConfigError if either cannot be registered."""
    architecture, _, tag = name.partition('.')
    mine = coatnet_zoo.list_models()
    if architecture not in mine:
        raise ConfigError(f'{option} must be a name of the zoo, a dot and a tag, such as coatnet_pico_64.tin200, got '
                          f'{name!r}{did_you_mean(architecture, mine) or "."}')
    check_tag(name, option)
    return architecture, tag


def bare_model(config: dict, device: str | None = None) -> nn.Module:
    """Create the registered architecture with the classes, channels and image size of a config.json, in eval mode.

    Args:
        config: Content of config.json.
        device: Device on which parameters are created.
    """
    channels, *size = config['pretrained_cfg']['input_size']
    return timm.create_model(
        config['architecture'], num_classes=config['num_classes'], in_chans=channels, img_size=tuple(size),
        device=device).eval()


def stored_dtypes(model: nn.Module, dtype: str) -> dict[str, torch.dtype]:
    """Stored dtype of each tensor: `dtype` for the weights of convolutions and linear layers, else that of the model.

    Norms with their statistics, biases, bias tables, layer scales and the kernels of LightConv are not rounded.
    """
    rounded = {f'{name}.weight' for name, module in model.named_modules()
               if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))}
    return {name: getattr(torch, dtype) if name in rounded else value.dtype
            for name, value in model.state_dict().items()}


def largest_gap(logits: torch.Tensor, golden: torch.Tensor) -> float:
    """Maximum absolute difference from the golden logits over their maximum absolute value; NaN counts as infinite."""
    gap = ((logits - golden).abs().max() / golden.abs().max()).item()
    return gap if gap == gap else float('inf')


def own_cfg(architecture: str) -> dict:
    """Default pretrained cfg that the zoo registers for an architecture, with its paper."""
    return next(iter(get_arch_pretrained_cfgs(architecture).values())).to_dict()
