"""Choice of the backend from the tensors of a call."""
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = [
    'BACKENDS', 'INTERPRETED', 'TRITON', 'autocast_off', 'cast_for_autocast', 'choose_backend', 'dtype_for_autocast',
    'validate_backend', 'validate_triton']

BACKENDS = ('naive', 'eager', 'triton')
TRITON = importlib.util.find_spec('triton') is not None  # looked up once, so that graphs take it as a constant
# Triton's interpreter runs the kernels on CPU tensors
INTERPRETED = TRITON and os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _autocasts(x: torch.Tensor) -> bool:
    return x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)


def dtype_for_autocast(x: torch.Tensor) -> torch.dtype:
    """dtype to which autocast casts a convolution's input x; that of x without autocast and for float64."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) and x.dtype != torch.float64 else x.dtype


def cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast x as autocast casts a convolution's input. The operators leave weights and logits in their own dtype."""
    return x.to(dtype_for_autocast(x)) if _autocasts(x) else x


def autocast_off(x: torch.Tensor) -> AbstractContextManager:
    """Context that disables autocast on the device of x: each backend chooses its own precision."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def validate_backend(backend: str | None, op: str) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'{op}: backend must be None or one of {", ".join(map(repr, BACKENDS))}, got {backend!r}.')


def validate_triton(x: torch.Tensor, op: str) -> None:
    """Raise RuntimeError if triton is not installed, ValueError if it cannot run on the device of x."""
    if not TRITON:
        raise RuntimeError(f"{op}: backend='triton' needs the triton package; install it or use backend='eager'.")
    if not x.is_cuda and not (x.device.type == 'cpu' and INTERPRETED):
        raise ValueError(
            f"{op}: backend='triton' needs CUDA tensors, got x on {x.device}; move them with .cuda(), use "
            f"backend='eager', or set TRITON_INTERPRET=1 before the first import to run the kernels in Python.")


def choose_backend(
        backend: str | None, x: torch.Tensor, operand: torch.Tensor, kernel_size: tuple[int, int], max_kernel_size: int,
        op: str,
) -> str:
    """Choose the backend: the requested one; if None, Triton where it can run, else eager.

    Args:
        backend: Requested backend or None.
        x: Input; its device and dtype decide.
        operand: Weight or logits; its dtype decides too.
        kernel_size: (Kh, Kw).
        max_kernel_size: Largest kernel side that the Triton kernels take.
        op: Operator name for error messages.

    Raises ValueError or RuntimeError if 'triton' is requested and cannot run; there is no fallback.
    """
    if backend in ('naive', 'eager'):
        return backend
    covered = x.dtype in KERNEL_DTYPES and operand.dtype in KERNEL_DTYPES and max(kernel_size) <= max_kernel_size
    if backend is None:
        # exported graphs must run without the custom operators, and on any device
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return 'triton' if x.is_cuda and covered and not exported and TRITON else 'eager'
    validate_triton(x, op)
    if not covered:
        raise ValueError(
            f"{op}: backend='triton' takes float16, bfloat16 or float32 and kernels up to {max_kernel_size} x "
            f"{max_kernel_size}, got {x.dtype} and {operand.dtype}, {kernel_size[0]} x {kernel_size[1]}; use "
            f"backend='eager'.")
    return 'triton'
