"""`lightconv2d`: public function, argument checks and choice of the backend."""
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
from .eager import lightconv2d_eager
from .naive import lightconv2d_naive

__all__ = ['lightconv2d']

MAX_KERNEL_SIZE = 31  # side of the largest kernel that the Triton kernels take


def lightconv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        normalize: str = 'softmax',
        dropconnect: float = 0.0,
        training: bool = False,
        backend: str | None = None,
) -> torch.Tensor:
    """LightConv: a depthwise convolution whose kernels are softmax-normalised and shared by the channels of a head.

    out[b, c, h, w] = bias[c] + sum_{u,v} softmax(weight[g])[u, v] * x[b, c, h + u - Kh // 2, w + v - Kw // 2]

    with g = c // (C // G) and x zero outside the image.
    Sums are in float32, or float64 for float64. Wu et al., section 3 (https://arxiv.org/abs/1901.10430), whose operator
    on sequences is H = 1 with a (1, K) kernel.

    Args:
        x: (B, C, H, W), floating point, any strides; the backends work in channels_last.
        weight: (G, Kh, Kw), raw logits of the kernels; G divides C, Kh and Kw are odd. Any floating dtype.
        bias: (C,) or None.
        normalize: 'softmax' over the taps, or 'none' to use `weight` as it is.
        dropconnect: Probability of dropping a normalised weight in training; those kept are divided by 1 - p. A call
            draws one mask (G, Kh, Kw). The seed comes from torch's generator of the device of `x`, and the mask is the
            same in every backend. (Under torch.compile the inductor draws the seed, unless
            torch._inductor.config.fallback_random is set.)
        training: Apply DropConnect.
        backend: 'naive', 'eager', 'triton', or None for Triton where it runs and eager elsewhere.

    Returns (B, C, H, W) in the dtype of `x` (under autocast its dtype), channels_last in memory.

    Raises TypeError or ValueError for invalid arguments, RuntimeError if 'triton' is requested but not installed. Under
    vmap and double backward 'triton', the default on CUDA, raises NotImplementedError; 'eager' supports both.
    """
    op = 'lightconv2d'
    validate_x(x, op)
    validate_operand('weight', weight, x, op)
    if weight.ndim != 3:
        raise ValueError(f'{op}: weight must be (G, Kh, Kw), got {weight.ndim} dimensions {tuple(weight.shape)}.')
    kernel = validate_kernel_size(weight.shape[1:], op)
    validate_heads(weight.shape[0], x.shape[1], op)
    validate_bias(bias, x, op)
    validate_options(normalize, dropconnect, training, op)
    validate_backend(backend, op)

    x = cast_for_autocast(x)
    seed = draw_seed(x.device) if training and dropconnect > 0 else None
    backend = choose_backend(backend, x, weight, kernel, MAX_KERNEL_SIZE, op)
    run: Callable[..., torch.Tensor]
    if backend == 'triton':
        from .kernels import lightconv2d_triton
        run = lightconv2d_triton
    else:
        # F.conv2d rejects empty channels and maps
        run = lightconv2d_naive if backend == 'naive' or 0 in x.shape[1:] else lightconv2d_eager
    with autocast_off(x):
        return run(x, weight, bias, normalize, dropconnect, seed)
