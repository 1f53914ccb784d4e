"""LightConv in Triton as torch operators: registration, autograd and the choice between three sets of kernels.

`band.py` (up to 7 x 7) and `toeplitz.py` (above) run on tensor cores and take the common cases; `direct.py` takes all
others.
"""
from types import ModuleType

import torch

from ..band_ops import MAX_KERNEL_SIZE, band_obstacle, takes_band
from ..triton_ops import empty_channels_last, not_implemented, require_triton
from . import band, direct, toeplitz

__all__ = ['lightconv2d_triton']


def _implementation(x: torch.Tensor, weight: torch.Tensor, kernels: str) -> ModuleType:
    require_triton(x, 'lightconv2d')
    G, Kh, Kw = weight.shape
    if not takes_band('lightconv2d', kernels, band_obstacle(x, (Kh, Kw), G)):
        return direct
    return band if max(Kh, Kw) <= MAX_KERNEL_SIZE else toeplitz


@torch.library.custom_op('coatnet_zoo::lightconv2d', mutates_args=())
def _lightconv2d_op(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None,
        dropconnect: float, softmax: bool, kernels: str = 'auto') -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W), channels_last."""
    return _implementation(x, weight, kernels).launch_fwd(x, weight, bias, seed, dropconnect, softmax, transposed=False)


@torch.library.custom_op('coatnet_zoo::lightconv2d_backward', mutates_args=())
def _lightconv2d_backward_op(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool], kernels: str = 'auto',
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, each in the dtype of its tensor; those not `needed` are empty."""
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    implementation = _implementation(x, weight, kernels)
    if needed[0]:
        grad_x = implementation.launch_fwd(grad, weight, None, seed, dropconnect, softmax, transposed=True)
    if needed[1]:
        grad_weight = implementation.launch_bwd_weight(grad, x, weight, seed, dropconnect, softmax)
    if needed[2] and bias is not None:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


@_lightconv2d_op.register_fake
def _(x, weight, bias, seed, dropconnect, softmax, kernels='auto'):
    return empty_channels_last(x)


@_lightconv2d_backward_op.register_fake
def _(grad, x, weight, bias, seed, dropconnect, softmax, needed, kernels='auto'):
    return (empty_channels_last(x) if needed[0] else x.new_empty(0),
            weight.new_empty(weight.shape) if needed[1] else weight.new_empty(0),
            bias.new_empty(bias.shape) if needed[2] else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, seed, ctx.dropconnect, ctx.softmax, ctx.kernels = inputs
    ctx.save_for_backward(x, weight, bias, seed)


def _backward(ctx, grad: torch.Tensor):
    needed = list(ctx.needs_input_grad[:3])
    grads = _lightconv2d_backward_op(grad, *ctx.saved_tensors, ctx.dropconnect, ctx.softmax, needed, ctx.kernels)
    return *(one if need else None for one, need in zip(grads, needed, strict=True)), None, None, None, None


_lightconv2d_op.register_autograd(_backward, setup_context=_save)
_lightconv2d_backward_op.register_autograd(not_implemented('double backward', 'lightconv2d'))
_lightconv2d_op.register_vmap(not_implemented('vmap', 'lightconv2d'))
_lightconv2d_backward_op.register_vmap(not_implemented('vmap', 'lightconv2d'))


def lightconv2d_triton(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
        kernels: str = 'auto',
) -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W), channels_last; a seed switches DropConnect on.

    kernels: 'auto'; 'band' forces the kernels with tensor cores, 'direct' those without.
    """
    weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()  # small, and read without strides
    return _lightconv2d_op(x, weight, bias, seed, float(dropconnect), normalize == 'softmax', kernels)
