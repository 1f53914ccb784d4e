"""Helpers shared by the Triton kernels: DropConnect hash, division of an image into strips, launch checks.

A program processes one strip of an image, about STRIP_WIDTH columns wide, from top to bottom in chunks of BLOCK
positions in row-major order. The input rows that consecutive chunks share then stay in the SM's L1 cache.
"""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, NoReturn

import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from .dispatch import INTERPRETED

ENOUGH_PROGRAMS = 2048  # about two waves of small programs on the 132 SMs of a Hopper GPU
STRIP_WIDTH = 16
OPTIONS = {'num_warps': 4, 'enable_fp_fusion': True}


@jit
def offset(u, K: tl.constexpr):
    """Offset of tap u of K from the output position."""
    return u - K // 2


@jit
def within(i, n):
    """0 <= i < n, in one comparison."""
    return tl.cast(i, tl.uint32) < tl.cast(n, tl.uint32)


@jit
def shift(dy, dx, stride_h, stride_w):
    """int64 memory offset of a (dy, dx) shift."""
    return tl.cast(dy, tl.int64) * stride_h + tl.cast(dx, tl.int64) * stride_w


@jit
def _mix(h):
    """Bijective 32-bit hash, as in `dropconnect.py`; h is uint32."""
    h = (h ^ (h >> 16)) * 0x21f0aaad
    h = (h ^ (h >> 15)) * 0x735a2d97
    return h ^ (h >> 15)


@jit
def dropconnect_factor(index, seed, threshold, scale):
    """DropConnect factor of a weight: 0 if dropped, else `scale`; as `dropconnect_scale`. index and seed are int64."""
    h = _mix((index ^ seed).to(tl.uint32))
    h = _mix(h ^ (index >> 32).to(tl.uint32) ^ (seed >> 32).to(tl.uint32))
    # in int64: threshold may exceed 2^31
    return tl.where(h.to(tl.int64) >= threshold, scale, 0.0)


@jit
def strip_of_program(program, H, W, tiles, across, down, width, height):
    """Strip of a program: (image as int64, channel tile, top row, left column, columns, positions)."""
    tile = program % tiles
    program = program // tiles
    left = program % across * width
    program = program // across
    top = program % down * height
    columns = tl.minimum(width, W - left)
    return (program // down).to(tl.int64), tile, top, left, columns, columns * tl.minimum(height, H - top)


@jit
def positions_of_chunk(start, count, top, left, columns, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, mask), each (BLOCK,), of a strip's positions from `start` on; masked ones repeat the last."""
    here = start + tl.arange(0, BLOCK)
    position = tl.minimum(here, count - 1)
    row = top + position // columns
    column = left + position % columns
    if LARGE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return row, column, here < count


class Strips(NamedTuple):
    """Division of an image into strips: number of strips across and down, columns and rows of a strip."""

    across: int
    down: int
    width: int
    height: int


def strips(B: int, H: int, W: int, tiles: int, block: int, multiple: int = 1) -> Strips:
    """Choose strips about STRIP_WIDTH columns wide, and as high as ENOUGH_PROGRAMS programs in all allow.

    The width is a multiple of `multiple`. The height covers whole chunks of `block` positions, rounded down to rows.
    """
    width = cdiv(cdiv(W, cdiv(W, STRIP_WIDTH)), multiple) * multiple
    across = cdiv(W, width)
    chunks = cdiv(H * width, block)
    down = min(chunks, cdiv(ENOUGH_PROGRAMS, max(1, B * across * tiles)))
    height = min(H, max(1, cdiv(chunks, down) * block // width))
    return Strips(across, cdiv(H, height), width, height)


def channel_block(channels: int) -> int:
    """Channels of a tile: the one of 64, 32 and 16 that pads least; up to 16 channels, the next power of two.

    16 channels of two bytes fill a 32-byte memory sector.
    """
    if channels <= 16:
        return next_power_of_2(channels)
    return min((64, 32, 16), key=lambda block: cdiv(channels, block) * block)


def needs_int64(*tensors: torch.Tensor) -> bool:
    """Whether element offsets within one image and its halo may reach 2^31 and overflow int32."""
    return any(sum((size + 31) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2 ** 31
               for t in tensors)


def empty_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised tensor (B, C, H, W) with the shape and dtype of x, in channels_last."""
    B, C, H, W = x.shape
    return x.new_empty((B, H, W, C)).permute(0, 3, 1, 2)


def dense_images(x: torch.Tensor) -> torch.Tensor:
    """Copy x to channels_last unless each of its images is dense in it already; the batch stride is free."""
    dense = x[:1].is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.contiguous(memory_format=torch.channels_last)


def require_triton(x: torch.Tensor, op: str) -> None:
    """Raise RuntimeError unless x is on CUDA, or on a CPU under Triton's interpreter."""
    if not (x.is_cuda or (x.device.type == 'cpu' and INTERPRETED)):
        raise RuntimeError(
            f'torch.ops.coatnet_zoo.{op} runs on CUDA tensors, or on a CPU under TRITON_INTERPRET=1, got x on '
            f"{x.device}; call coatnet_zoo.ops.{op}, which chooses backend='eager' there.")


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Context that makes the device of x current, where Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def not_implemented(what: str, op: str) -> Callable[..., NoReturn]:
    """Make a function that raises NotImplementedError for any arguments, since `op` has no `what` in Triton."""
    def refusal(*args, **kwargs) -> NoReturn:
        raise NotImplementedError(f"{op}: the Triton kernels have no {what}; use backend='eager'.")

    return refusal
