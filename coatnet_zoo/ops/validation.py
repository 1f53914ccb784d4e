"""Checks of the arguments of both operators: every error names the argument, the rule and the value found."""
from collections.abc import Sequence
from numbers import Real
from operator import index

import torch

__all__ = [
    'validate_bias', 'validate_heads', 'validate_kernel_size', 'validate_operand', 'validate_options', 'validate_x']

NORMALIZE = ('softmax', 'none')
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def validate_x(x: torch.Tensor, op: str) -> None:
    """Raise TypeError or ValueError unless x is a dense floating-point tensor (B, C, H, W)."""
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


def validate_operand(name: str, tensor: torch.Tensor, x: torch.Tensor, op: str) -> None:
    """Raise TypeError or ValueError unless tensor is dense, floating point and on the device of x."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f'{op}: {name} must be a tensor, got {type(tensor).__name__}.')
    _check_values(name, tensor, op)
    if tensor.device != x.device:
        raise ValueError(f'{op}: {name} is on {tensor.device} but x is on {x.device}; move one of them.')


def validate_bias(bias: torch.Tensor | None, x: torch.Tensor, op: str) -> None:
    """Raise TypeError or ValueError unless bias is None or a floating-point tensor (C,) on the device of x."""
    if bias is None:
        return
    validate_operand('bias', bias, x, op)
    if bias.shape != (x.shape[1],):
        raise ValueError(f'{op}: bias must be ({x.shape[1]},), one value a channel of x, got {tuple(bias.shape)}.')


def validate_kernel_size(kernel_size: Sequence[int], op: str) -> tuple[int, int]:
    """Return (Kh, Kw). Raise TypeError unless they are two integers, ValueError unless both are odd and positive.

    An even kernel has no centre: its output would be shifted by half a pixel.
    """
    try:
        Kh, Kw = map(index, kernel_size)
    except (TypeError, ValueError):
        raise TypeError(f'{op}: kernel_size must be two integers (Kh, Kw), got {kernel_size!r}.') from None
    if Kh < 1 or Kw < 1 or Kh % 2 == 0 or Kw % 2 == 0:
        raise ValueError(f'{op}: kernel sizes must be odd and positive, got {Kh} x {Kw}.')
    return Kh, Kw


def validate_heads(heads: int, channels: int, op: str) -> None:
    if heads < 1 or channels % heads:
        raise ValueError(
            f'{op}: the number of heads must divide the channels of x, got {heads} heads, {channels} channels.')


def validate_options(normalize: str, dropconnect: float, training: bool, op: str) -> None:
    """Raise ValueError or TypeError for an invalid normalize, dropconnect or training."""
    if normalize not in NORMALIZE:
        raise ValueError(f"{op}: normalize must be 'softmax' or 'none', got {normalize!r}.")
    if isinstance(dropconnect, bool) or not isinstance(dropconnect, Real) or not 0 <= dropconnect < 1:
        raise ValueError(f'{op}: dropconnect must be a probability from 0 to below 1, got {dropconnect!r}.')
    if not isinstance(training, bool):
        raise TypeError(f'{op}: training must be True or False, got {training!r}.')
