"""`dynamicconv2d_projected`, DynamicConv with logits from a linear layer of its input: checks and choice of backend.

    out = dynamicconv2d(x, logits, kernel_size, bias),    logits[b, :, h, w] = projection x[b, :, h, w]

It runs in two steps, or as one fused kernel that never stores the logits.
"""
import torch
import torch.nn.functional as F

from ..dispatch import (
    TRITON,
    autocast_off,
    cast_for_autocast,
    dtype_for_autocast,
    validate_backend,
    validate_triton,
)
from ..dropconnect import draw_seed
from ..validation import (
    validate_bias,
    validate_heads,
    validate_kernel_size,
    validate_operand,
    validate_options,
    validate_x,
)
from .api import dynamicconv2d

__all__ = ['dynamicconv2d_projected', 'fuses_projection']


def dynamicconv2d_projected(
        x: torch.Tensor,
        projection: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None = None,
        *,
        normalize: str = 'softmax',
        dropconnect: float = 0.0,
        training: bool = False,
        backend: str | None = None,
) -> torch.Tensor:
    """DynamicConv with the linear layer that predicts its kernels from x.

    logits[b, n, h, w] = sum_c projection[n, c] * x[b, c, h, w];    out = dynamicconv2d(x, logits, kernel_size, bias)

    Args:
        x: (B, C, H, W), floating point, any strides.
        projection: (G * Kh * Kw, C), the weight of the linear layer, in the dtype of `x` (under autocast any). Row
            (g * Kh + u) * Kw + v predicts tap (u, v) of head g; G divides C.
        kernel_size: (Kh, Kw), both odd.
        bias: (C,) or None.
        normalize, dropconnect, training: As in `dynamicconv2d`, with the same masks.
        backend: 'naive' computes the logits in float32 (float64 for float64) and does not round them. 'eager' rounds
            them to the dtype of `x`, as a torch layer does. 'triton' is one fused kernel, which neither rounds nor
            stores them and recomputes them in the backward. None is the fused kernel if `fuses_projection` returns
            True, else two steps with the default backend of `dynamicconv2d`.

    Returns (B, C, H, W) in the dtype of `x` (under autocast its dtype).

    Raises TypeError or ValueError for invalid arguments. If 'triton' is requested, raises ValueError if it cannot run,
    RuntimeError if it is not installed.
    """
    op = 'dynamicconv2d_projected'
    validate_x(x, op)
    validate_operand('projection', projection, x, op)
    Kh, Kw = kernel = validate_kernel_size(kernel_size, op)
    if projection.ndim != 2 or projection.shape[1] != x.shape[1] or projection.shape[0] % (Kh * Kw):
        raise ValueError(
            f'{op}: projection must be (G * Kh * Kw, C), a multiple of {Kh * Kw} by {x.shape[1]}, '
            f'got {tuple(projection.shape)}.')
    if dtype_for_autocast(projection) != dtype_for_autocast(x):
        raise TypeError(f'{op}: projection must have the dtype of x, got {projection.dtype} and {x.dtype}; convert one '
                        f'of them.')
    validate_heads(projection.shape[0] // (Kh * Kw), x.shape[1], op)
    validate_bias(bias, x, op)
    validate_options(normalize, dropconnect, training, op)
    validate_backend(backend, op)
    if backend == 'triton':
        validate_triton(x, op)
        if reason := _obstacle(x, projection, kernel):
            raise ValueError(f"{op}: the fused kernel cannot run: {reason}; use backend=None or 'eager'.")
    if backend == 'triton' or (backend is None and fuses_projection(x, projection, kernel)):
        from .projected_kernels import dynamicconv2d_projected_triton
        x, projection = cast_for_autocast(x), cast_for_autocast(projection)
        seed = draw_seed(x.device) if training and dropconnect > 0 else None
        with autocast_off(x):
            return dynamicconv2d_projected_triton(x, projection, kernel, bias, normalize, dropconnect, seed)
    if backend == 'naive':
        x = cast_for_autocast(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        with autocast_off(x):
            logits = F.linear(x.permute(0, 2, 3, 1).to(wide), projection.to(wide))
    else:
        logits = F.linear(x.permute(0, 2, 3, 1), projection)
    return dynamicconv2d(
        x, logits.permute(0, 3, 1, 2), kernel, bias, normalize=normalize, dropconnect=dropconnect, training=training,
        backend=backend)


def fuses_projection(x: torch.Tensor, projection: torch.Tensor, kernel_size: tuple[int, int]) -> bool:
    """Whether the fused kernel is the default for these tensors: on CUDA, if it can run and is expected to be faster.

    False in exported graphs, which must run without the custom operators and on any device.
    """
    if not (x.is_cuda and TRITON) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return not _obstacle(x, projection, kernel_size)


def _obstacle(x: torch.Tensor, projection: torch.Tensor, kernel_size: tuple[int, int]) -> str:
    from .projected_band import obstacle
    dtype = dtype_for_autocast(x)
    if dtype_for_autocast(projection) != dtype:
        return f'x and projection must have one dtype, got {x.dtype} and {projection.dtype}'
    return obstacle(x, projection, kernel_size, dtype)
