"""What both operators accept, said in one place: every refusal names the argument, the rule and the value found."""
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from operator import index

import torch

__all__ = ['BACKENDS', 'INTERPRETED', 'TRITON', 'autocast_off', 'cast_for_autocast', 'check_backend', 'check_bias',
           'check_choices', 'check_heads', 'check_kernel', 'check_operand', 'check_x', 'choose_backend']

BACKENDS = ('naive', 'eager', 'triton')
NORMALIZE = ('softmax', 'none')
TRITON = importlib.util.find_spec('triton') is not None  # installed; looked up once, so that graphs take it as constant
INTERPRETED = TRITON and os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')  # on CPUs
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_x(x: torch.Tensor, op: str) -> None:
    """x: (B, C, H, W), floating point."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'{op}: x must be a tensor, got {type(x).__name__}.')
    if x.ndim != 4:
        raise ValueError(
            f'{op}: x must be (B, C, H, W), got {x.ndim} dimensions {tuple(x.shape)}; a sequence is H = 1.')
    _check_values('x', x, op)


def _check_values(name: str, tensor: torch.Tensor, op: str) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f'{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; use .float().')
    if tensor.layout != torch.strided:
        raise TypeError(f'{op}: {name} must be a dense tensor, got layout {tensor.layout}; use .to_dense().')


def check_operand(name: str, tensor: torch.Tensor, x: torch.Tensor, op: str) -> None:
    """A floating-point tensor on the device of x."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f'{op}: {name} must be a tensor, got {type(tensor).__name__}.')
    _check_values(name, tensor, op)
    if tensor.device != x.device:
        raise ValueError(f'{op}: {name} is on {tensor.device} but x is on {x.device}; move one of them.')


def check_bias(bias: torch.Tensor | None, x: torch.Tensor, op: str) -> None:
    """bias: (C,) or None."""
    if bias is None:
        return
    check_operand('bias', bias, x, op)
    if bias.shape != (x.shape[1],):
        raise ValueError(f'{op}: bias must be ({x.shape[1]},), one value a channel of x, got {tuple(bias.shape)}.')


def check_kernel(kernel_size: Sequence[int], op: str) -> tuple[int, int]:
    """(Kh, Kw), both odd: an even kernel has no middle, and its output would be shifted by half a pixel."""
    try:
        Kh, Kw = map(index, kernel_size)
    except (TypeError, ValueError):
        raise TypeError(f'{op}: kernel_size must be two integers (Kh, Kw), got {kernel_size!r}.') from None
    if Kh < 1 or Kw < 1 or Kh % 2 == 0 or Kw % 2 == 0:
        raise ValueError(f'{op}: kernel sizes must be odd and positive, got {Kh} x {Kw}.')
    return Kh, Kw


def check_heads(heads: int, channels: int, op: str) -> None:
    if heads < 1 or channels % heads:
        raise ValueError(
            f'{op}: the number of heads must divide the channels of x, got {heads} heads, {channels} channels.')


def check_choices(normalize: str, dropconnect: float, training: bool, op: str) -> None:
    """The arguments that are no tensors."""
    if normalize not in NORMALIZE:
        raise ValueError(f"{op}: normalize must be 'softmax' or 'none', got {normalize!r}.")
    if isinstance(dropconnect, bool) or not isinstance(dropconnect, Real) or not 0 <= dropconnect < 1:
        raise ValueError(f'{op}: dropconnect must be a probability from 0 to below 1, got {dropconnect!r}.')
    if not isinstance(training, bool):
        raise TypeError(f'{op}: training must be True or False, got {training!r}.')


def _autocasts(x: torch.Tensor) -> bool:
    return x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)


def cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """x as a convolution under the same autocast would take it; weights and logits keep the precision they have."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _autocasts(x) and x.dtype != torch.float64 else x


def autocast_off(x: torch.Tensor) -> AbstractContextManager:
    """The backends choose their own precision, which autocast would take back inside them."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def check_backend(backend: str | None, op: str) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'{op}: backend must be None or one of {", ".join(map(repr, BACKENDS))}, got {backend!r}.')


def choose_backend(
        backend: str | None, x: torch.Tensor, operand: torch.Tensor, kernel: tuple[int, int], largest: int, op: str,
) -> str:
    """The backend of this call: the one asked for if it can run, else kernels for what they cover on CUDA, else eager.

    Args:
        backend: The caller's choice or None.
        x: The input, whose device and dtype decide.
        operand: Weight or logits.
        kernel: (Kh, Kw).
        largest: The largest kernel side that the kernels take.
        op: Name for messages.

    Raises ValueError or RuntimeError if 'triton' is asked for where it cannot run: never another result in its place.
    """
    if backend in ('naive', 'eager'):
        return backend
    covered = x.dtype in KERNEL_DTYPES and operand.dtype in KERNEL_DTYPES and max(kernel) <= largest
    if backend is None:
        # a graph that is exported must run without our operators, and on any device
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return 'triton' if x.is_cuda and covered and not exported and TRITON else 'eager'
    if not TRITON:
        raise RuntimeError(f"{op}: backend='triton' needs the triton package; install it or use backend='eager'.")
    if not x.is_cuda and not (x.device.type == 'cpu' and INTERPRETED):
        raise ValueError(
            f"{op}: backend='triton' needs CUDA tensors, got x on {x.device}; move them with .cuda(), use "
            f"backend='eager', or set TRITON_INTERPRET=1 before the first import to run the kernels in Python.")
    if not covered:
        raise ValueError(
            f"{op}: backend='triton' takes float16, bfloat16 or float32 and kernels up to {largest} x {largest}, got "
            f"{x.dtype} and {operand.dtype}, {kernel[0]} x {kernel[1]}; use backend='eager'.")
    return 'triton'
