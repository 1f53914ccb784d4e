"""Exact folding of what is affine in evaluation into the convolution or linear layer before or after it."""
import torch
from timm.layers import LayerScale
from torch import nn

__all__ = ['fold_norm_into_next', 'fold_norm_into_previous', 'fold_scale_into_previous']


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm in evaluation as `scale * x + shift`, in float64: (C,), (C,)."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()


@torch.no_grad()
def _replace(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    memory_format = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else (
        torch.contiguous_format)
    weight = weight.to(conv.weight.dtype).contiguous(memory_format=memory_format)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


@torch.no_grad()
def fold_norm_into_previous(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Make `conv` compute norm(conv(x)); returns what takes the place of `norm` (itself if it is no BatchNorm)."""
    if not isinstance(norm, nn.BatchNorm2d):
        return norm
    scale, shift = _scale_shift(norm)
    bias = 0 if conv.bias is None else conv.bias.double()
    _replace(conv, conv.weight.double() * scale[:, None, None, None], scale * bias + shift)
    return nn.Identity()


@torch.no_grad()
def fold_norm_into_next(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Make the 1x1 `conv` compute conv(norm(x)); returns what takes the place of `norm`.

    Exact because a 1x1 convolution has no padding: a padded kernel would meet zeros that the norm never shifted.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return norm
    assert conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    scale, shift = _scale_shift(norm)
    weight = conv.weight.double()
    bias = weight.flatten(1) @ shift + (0 if conv.bias is None else conv.bias.double())
    _replace(conv, weight * scale[:, None, None], bias)
    return nn.Identity()


@torch.no_grad()
def fold_scale_into_previous(linear: nn.Linear, scale: nn.Module) -> nn.Module:
    """Make `linear` compute scale(linear(x)); returns what takes the place of `scale`."""
    if not isinstance(scale, LayerScale):
        return scale
    gamma = scale.gamma.double()
    linear.weight.copy_(linear.weight.double() * gamma[:, None])
    linear.bias.copy_(linear.bias.double() * gamma)
    return nn.Identity()
