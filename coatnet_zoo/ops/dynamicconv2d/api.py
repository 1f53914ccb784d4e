"""`dynamicconv2d`: public function, argument checks and choice of the backend."""
from collections.abc import Callable

import torch

from ..dispatch import autocast_off, cast_for_autocast, choose_backend, validate_backend
from ..dropconnect import draw_seed
from ..validation import (
    validate_bias,
    validate_heads,
    validate_kernel_size,
    validate_operand,
    validate_options,
    validate_x,
)
from .eager import dynamicconv2d_eager
from .naive import dynamicconv2d_naive

__all__ = ['dynamicconv2d']

MAX_KERNEL_SIZE = 13  # side of the largest kernel that the Triton kernels take


def dynamicconv2d(
        x: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None = None,
        *,
        normalize: str = 'softmax',
        dropconnect: float = 0.0,
        training: bool = False,
        backend: str | None = None,
) -> torch.Tensor:
    """DynamicConv: convolution with a kernel for each position and head, predicted from the input.

    out[b, c, h, w] = bias[c] + sum_{u,v} k[u, v] * x[b, c, h + u - Kh // 2, w + v - Kw // 2]
    k = softmax_{u,v}(logits[b, g, :, :, h, w]),   g = c // (C // G)

    x is zero outside the image. Channel (g * Kh + u) * Kw + v of the logits is tap (u, v) of head g.
    Sums are in float32, or float64 for float64. Wu et al., section 4 (https://arxiv.org/abs/1901.10430), whose operator
    on sequences is H = 1 with a (1, K) kernel.

    Args:
        x: (B, C, H, W), floating point, any strides; the backends work in channels_last.
        logits: (B, G * Kh * Kw, H, W), predicted from the input; G divides C. Any floating dtype.
        kernel_size: (Kh, Kw), both odd.
        bias: (C,) or None.
        normalize: 'softmax' over the taps, or 'none' to use the logits as they are (training diverged in the paper).
        dropconnect: Probability of dropping a normalised weight in training; those kept are divided by 1 - p. Each
            logit has a draw of its own. The seed comes from torch's generator of the device of `x`, and the mask is the
            same in every backend. (Under torch.compile the inductor draws the seed, unless
            torch._inductor.config.fallback_random is set.)
        training: Apply DropConnect.
        backend: 'naive', 'eager', 'triton', or None for Triton where it runs and eager elsewhere.

    Returns (B, C, H, W) in the dtype of `x` (under autocast its dtype), channels_last in memory. On small maps, where
    `eager` multiplies by a band matrix, one value of x that is not finite makes its whole channel NaN.

    Raises TypeError or ValueError for invalid arguments, RuntimeError if 'triton' is requested but not installed. Under
    vmap and double backward 'triton', the default on CUDA, raises NotImplementedError; 'eager' supports both.
    """
    op = 'dynamicconv2d'
    validate_x(x, op)
    validate_operand('logits', logits, x, op)
    Kh, Kw = kernel = validate_kernel_size(kernel_size, op)
    B, C, H, W = x.shape
    if logits.ndim != 4 or logits.shape[0] != B or logits.shape[2:] != (H, W):
        raise ValueError(
            f'{op}: logits must be (B, G * Kh * Kw, H, W) with the B, H, W of x ({B}, {H}, {W}), '
            f'got {tuple(logits.shape)}.')
    if logits.shape[1] == 0 or logits.shape[1] % (Kh * Kw):
        raise ValueError(
            f'{op}: logits must have G * Kh * Kw channels, a multiple of {Kh} * {Kw} = {Kh * Kw}, '
            f'got {logits.shape[1]}.')
    validate_heads(logits.shape[1] // (Kh * Kw), C, op)
    validate_bias(bias, x, op)
    validate_options(normalize, dropconnect, training, op)
    validate_backend(backend, op)

    x = cast_for_autocast(x)
    seed = draw_seed(x.device) if training and dropconnect > 0 else None
    backend = choose_backend(backend, x, logits, kernel, MAX_KERNEL_SIZE, op)
    run: Callable[..., torch.Tensor]
    if backend == 'triton':
        from .kernels import dynamicconv2d_triton
        run = dynamicconv2d_triton
    else:
        run = dynamicconv2d_naive if backend == 'naive' else dynamicconv2d_eager
    with autocast_off(x):
        return run(x, logits, kernel, bias, normalize, dropconnect, seed)
