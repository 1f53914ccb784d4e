"""DynamicConv fused with the projection of its logits, in Triton, as torch operators: registration and autograd.

Only the inputs are saved for the backward, no logits. It recomputes the logits by a matrix product, rounded to the
dtype of x as in the two-step form, and takes the softmax of the rounded logits, so that its kernels sum to 1.
"""
import torch

from ..dispatch import autocast_off
from ..triton_ops import empty_channels_last, not_implemented, require_triton
from . import band, projected_band

__all__ = ['dynamicconv2d_projected_triton']


@torch.library.custom_op('coatnet_zoo::dynamicconv2d_projected', mutates_args=())
def _projected_op(
        x: torch.Tensor, projection: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> torch.Tensor:
    """Output (B, C, H, W), channels_last."""
    require_triton(x, 'dynamicconv2d_projected')
    x = x.contiguous(memory_format=torch.channels_last)
    return projected_band.launch_fwd(x, projection.contiguous(), (Kh, Kw), bias, seed, dropconnect, softmax)


@torch.library.custom_op('coatnet_zoo::dynamicconv2d_projected_backward', mutates_args=())
def _projected_backward_op(
        grad: torch.Tensor, x: torch.Tensor, projection: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, projection and bias, each in the dtype of its tensor; those not `needed` are empty."""
    require_triton(x, 'dynamicconv2d_projected')
    B, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    grad_x, grad_projection, grad_bias = x.new_empty(0), projection.new_empty(0), x.new_empty(0)
    if needed[0] or needed[1]:
        with autocast_off(x):
            rows = x.permute(0, 2, 3, 1).reshape(-1, C)
            logits = (rows @ projection.T).view(B, H, W, projection.shape[0]).permute(0, 3, 1, 2)
            G = projection.shape[0] // (Kh * Kw)
            stats = x.new_empty((B, H, W, G, 2) if softmax else (0,), dtype=torch.float32)
            grad_logits = band.launch_bwd_logits(
                grad, x, logits, (Kh, Kw), stats, seed, dropconnect, softmax, stats_saved=False)
            grad_rows = grad_logits.permute(0, 2, 3, 1).reshape(-1, projection.shape[0])
            if needed[0]:
                grad_x = band.launch_bwd_input(grad, logits, (Kh, Kw), stats, seed, dropconnect, softmax)
                grad_x.permute(0, 2, 3, 1).view(-1, C).addmm_(grad_rows, projection)
            if needed[1]:
                grad_projection = grad_rows.T @ rows
    if needed[2] and bias is not None:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_projection, grad_bias


@_projected_op.register_fake
def _(x, projection, Kh, Kw, bias, seed, dropconnect, softmax):
    return empty_channels_last(x)


@_projected_backward_op.register_fake
def _(grad, x, projection, Kh, Kw, bias, seed, dropconnect, softmax, needed):
    return (empty_channels_last(x) if needed[0] else x.new_empty(0),
            projection.new_empty(projection.shape) if needed[1] else projection.new_empty(0),
            bias.new_empty(bias.shape) if needed[2] else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, projection, ctx.Kh, ctx.Kw, bias, seed, ctx.dropconnect, ctx.softmax = inputs
    ctx.save_for_backward(x, projection, bias, seed)


def _backward(ctx, grad: torch.Tensor):
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    x, projection, bias, seed = ctx.saved_tensors
    grad_x, grad_projection, grad_bias = _projected_backward_op(
        grad, x, projection, ctx.Kh, ctx.Kw, bias, seed, ctx.dropconnect, ctx.softmax, needed)
    return (grad_x if needed[0] else None, grad_projection if needed[1] else None, None, None,
            grad_bias if needed[2] else None, None, None, None)


_projected_op.register_autograd(_backward, setup_context=_save)
_projected_backward_op.register_autograd(not_implemented('double backward', 'dynamicconv2d_projected'))
_projected_op.register_vmap(not_implemented('vmap', 'dynamicconv2d_projected'))
_projected_backward_op.register_vmap(not_implemented('vmap', 'dynamicconv2d_projected'))


def dynamicconv2d_projected_triton(
        x: torch.Tensor,
        projection: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C, H, W), (G * Kh * Kw, C) -> (B, C, H, W), channels_last; a seed switches DropConnect on."""
    Kh, Kw = kernel_size
    bias = bias if bias is None else bias.contiguous()  # the kernel assumes stride 1
    return _projected_op(x, projection, Kh, Kw, bias, seed, float(dropconnect), normalize == 'softmax')
