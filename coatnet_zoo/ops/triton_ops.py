"""What the Triton kernels of both operators share: the DropConnect hash, the walk over an image, refusals.

A program works on a strip of one image, some columns wide and some rows high, and walks down it in chunks of BLOCK
positions, row by row. The rows above that the next chunk reads again are then still in the SM's first-level cache.
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
    """The bijection of 32 bits in `dropconnect.py`; h is uint32."""
    h = (h ^ (h >> 16)) * 0x21f0aaad
    h = (h ^ (h >> 15)) * 0x735a2d97
    return h ^ (h >> 15)


@jit
def dropconnect_factor(index, seed, threshold, scale):
    """0 where the weight `index` (int64) is dropped, else `scale`, as `dropconnect_scale` has it; seed is int64."""
    h = _mix((index ^ seed).to(tl.uint32))
    h = _mix(h ^ (index >> 32).to(tl.uint32) ^ (seed >> 32).to(tl.uint32))
    # threshold may be 2^32
    return tl.where(h.to(tl.int64) >= threshold, scale, 0.0)


@jit
def strip_of_program(program, H, W, tiles, across, down, width, height):
    """(image as int64, tile of the channels, top, left, columns, positions) of the strip that a program walks."""
    tile = program % tiles
    program = program // tiles
    left = program % across * width
    program = program // across
    top = program % down * height
    columns = tl.minimum(width, W - left)
    return (program // down).to(tl.int64), tile, top, left, columns, columns * tl.minimum(height, H - top)


@jit
def positions_of_chunk(start, count, top, left, columns, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns (BLOCK,) of a strip's positions from `start`, and which exist; the others repeat the last."""
    here = start + tl.arange(0, BLOCK)
    position = tl.minimum(here, count - 1)
    row = top + position // columns
    column = left + position % columns
    if LARGE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return row, column, here < count


class Strips(NamedTuple):
    """Strips that cover an image: how many beside and below each other, their width and height."""

    across: int
    down: int
    width: int
    height: int


def strips(B: int, H: int, W: int, tiles: int, block: int, multiple: int = 1) -> Strips:
    """About 16 columns wide, a `multiple`, and high unless that left too few programs, in whole chunks of `block`."""
    width = cdiv(cdiv(W, cdiv(W, STRIP_WIDTH)), multiple) * multiple
    across = cdiv(W, width)
    chunks = cdiv(H * width, block)
    down = min(chunks, cdiv(ENOUGH_PROGRAMS, max(1, B * across * tiles)))
    height = min(H, max(1, cdiv(chunks, down) * block // width))
    return Strips(across, cdiv(H, height), width, height)


def channel_block(channels: int) -> int:
    """Channels of a tile: the power of two up to 64 that pads least, from 16 on, where a row of it fills a sector."""
    if channels <= 16:
        return next_power_of_2(channels)
    return min((64, 32, 16), key=lambda block: cdiv(channels, block) * block)


def needs_int64(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside an image, and a halo of 31 around it, may pass 2^31."""
    return any(sum((size + 31) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2 ** 31
               for t in tensors)


def empty_channels_last(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the shape and dtype of x: (B, C, H, W), stored as (B, H, W, C)."""
    B, C, H, W = x.shape
    return x.new_empty((B, H, W, C)).permute(0, 3, 1, 2)


def dense_images(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless each of its images is dense in channels_last; they may lie apart."""
    dense = x[:1].is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.contiguous(memory_format=torch.channels_last)


def require_triton(x: torch.Tensor, op: str) -> None:
    """Kernels run on CUDA, and on CPUs in Triton's interpreter."""
    if not (x.is_cuda or (x.device.type == 'cpu' and INTERPRETED)):
        raise RuntimeError(
            f'torch.ops.coatnet_zoo.{op} runs on CUDA tensors, or on a CPU under TRITON_INTERPRET=1, got x on '
            f"{x.device}; call coatnet_zoo.ops.{op}, which chooses backend='eager' there.")


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Launches go to the current device, which may be another one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def not_implemented(what: str, op: str) -> Callable[..., NoReturn]:
    """A function that raises NotImplementedError, whatever it is called with."""
    def refusal(*args, **kwargs) -> NoReturn:
        raise NotImplementedError(f"{op}: the Triton kernels have no {what}; use backend='eager'.")

    return refusal
