"""DynamicConv in Triton as torch operators: registration, autograd and the choice between two sets of kernels.

`band.py` runs on tensor cores and takes the common cases; `direct.py` takes all others. Both save the same statistics.
"""
from types import ModuleType

import torch

from ..band_ops import band_obstacle, takes_band
from ..triton_ops import empty_channels_last, not_implemented, require_triton
from . import band, direct

__all__ = ['dynamicconv2d_triton']


def _implementation(x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], kernels: str) -> ModuleType:
    require_triton(x, 'dynamicconv2d')
    obstacle = band_obstacle(x, kernel, logits.shape[1] // (kernel[0] * kernel[1]), logits)
    return band if takes_band('dynamicconv2d', kernels, obstacle) else direct


@torch.library.custom_op('coatnet_zoo::dynamicconv2d', mutates_args=())
def _dynamicconv2d_op(
        x: torch.Tensor, logits: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None, seed: torch.Tensor | None,
        dropconnect: float, softmax: bool, kernels: str = 'auto') -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, C, H, W), channels_last, and the statistics of the softmaxes (B, H, W, G, 2), not differentiable."""
    return _implementation(x, logits, (Kh, Kw), kernels).launch_fwd(
        x, logits, (Kh, Kw), bias, seed, dropconnect, softmax)


@torch.library.custom_op('coatnet_zoo::dynamicconv2d_backward', mutates_args=())
def _dynamicconv2d_backward_op(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None,
        stats: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool],
        kernels: str = 'auto',
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, logits and bias, each in the dtype of its tensor; those not `needed` are empty."""
    grad_x, grad_logits, grad_bias = x.new_empty(0), logits.new_empty(0), x.new_empty(0)
    implementation = _implementation(x, logits, (Kh, Kw), kernels)
    if needed[0]:
        grad_x = implementation.launch_bwd_input(grad, logits, (Kh, Kw), stats, seed, dropconnect, softmax)
    if needed[1]:
        grad_logits = implementation.launch_bwd_logits(grad, x, logits, (Kh, Kw), stats, seed, dropconnect, softmax)
    if needed[2] and bias is not None:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(bias.dtype)
    return grad_x, grad_logits, grad_bias


@_dynamicconv2d_op.register_fake
def _(x, logits, Kh, Kw, bias, seed, dropconnect, softmax, kernels='auto'):
    return empty_channels_last(x), direct.empty_stats(x, logits.shape[1] // (Kh * Kw), softmax)


@_dynamicconv2d_backward_op.register_fake
def _(grad, x, logits, Kh, Kw, bias, stats, seed, dropconnect, softmax, needed, kernels='auto'):
    return (empty_channels_last(x) if needed[0] else x.new_empty(0),
            empty_channels_last(logits) if needed[1] else logits.new_empty(0),
            bias.new_empty(bias.shape) if needed[2] else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, logits, ctx.Kh, ctx.Kw, bias, seed, ctx.dropconnect, ctx.softmax, ctx.kernels = inputs
    ctx.save_for_backward(x, logits, bias, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zero gradient for the statistics


def _backward(ctx, grad: torch.Tensor | None, _):
    if grad is None:
        return (None,) * 9
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    x, logits, bias, stats, seed = ctx.saved_tensors
    grad_x, grad_logits, grad_bias = _dynamicconv2d_backward_op(
        grad, x, logits, ctx.Kh, ctx.Kw, bias, stats, seed, ctx.dropconnect, ctx.softmax, needed,
        ctx.kernels)
    return (grad_x if needed[0] else None, grad_logits if needed[1] else None, None, None,
            grad_bias if needed[2] else None, None, None, None, None)


_dynamicconv2d_op.register_autograd(_backward, setup_context=_save)
_dynamicconv2d_backward_op.register_autograd(not_implemented('double backward', 'dynamicconv2d'))
_dynamicconv2d_op.register_vmap(not_implemented('vmap', 'dynamicconv2d'))
_dynamicconv2d_backward_op.register_vmap(not_implemented('vmap', 'dynamicconv2d'))


def dynamicconv2d_triton(
        x: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
        kernels: str = 'auto',
) -> torch.Tensor:
    """(B, C, H, W), (B, G * Kh * Kw, H, W) -> (B, C, H, W), channels_last; a seed switches DropConnect on.

    kernels: 'auto'; 'band' or 'direct' forces the kernels of that file.
    """
    Kh, Kw = kernel_size
    bias = bias if bias is None else bias.contiguous()  # the kernels assume stride 1
    out, _ = _dynamicconv2d_op(x, logits, Kh, Kw, bias, seed, float(dropconnect), normalize == 'softmax', kernels)
    return out
