"""Helpers shared by the band kernels of both operators: tile geometry, loads, launch configuration.

A tile is 8 columns by 2 rows of output positions. Their windows span Kh + 1 rows and 16 columns, split into a left and
a right half. Column c of the span is slot column c % 8 of its half, so the Kw <= 7 columns of one window have distinct
slot columns. At slot column s, position column px reads tap column v = (s - px) % 8, from the left half if s >= px,
else from the right half. One band matrix (16 positions, slots) therefore serves both halves, and each weight is loaded
and exponentiated once. Positions and slots are numbered in row-major order.
"""
from typing import NamedTuple

import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from .dispatch import INTERPRETED
from .triton_ops import needs_int64

HEAD_WIDTHS = (16, 32, 64)
LOG2E = tl.constexpr(1.4426950408889634)
MAX_KERNEL_SIZE = 7  # largest kernel side that the band kernels take
PROGRAMS = 4096  # one-warp programs that keep a Hopper GPU busy
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot reads bfloat16 as integers


@jit
def product(a, b, acc):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def tap_column(s, px):
    """Tap column that position column px reads at slot column s; values from Kw on are no tap."""
    return (s - px) & 7


@jit
def slot_column(v, px):
    """Slot column that position column px reads with tap column v."""
    return (v + px) & 7


@jit
def taps_of_slots(position, slot, Kh: tl.constexpr, Kw: tl.constexpr):
    """(u * Kw, v, mask) of the tap that a position reads at a slot, broadcast; where masked, u and v are clamped."""
    u = slot // 8 - position // 8
    v = tap_column(slot % 8, position % 8)
    return tl.minimum(tl.maximum(u, 0), Kh - 1) * Kw, tl.minimum(v, Kw - 1), (u >= 0) & (u < Kh) & (v < Kw)


@jit
def half_of_span(x, image, row, column, channel, H, W, C: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
                 TMA: tl.constexpr):
    """Load half of a span, the 8 columns from (row, column) on, as (SLOTS, BLOCK_C); zero outside the image.

    x: TMA descriptor if TMA, else a pointer.
    """
    if TMA:
        return tl.reshape(x.load([image, row, column, channel]), (SLOTS, BLOCK_C))
    else:
        slot = tl.arange(0, SLOTS)
        row += slot // 8
        column += slot % 8
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        x += tl.cast(image, tl.int64) * H * W * C + channel
        return tl.load(x + ((row * W + column) * C)[:, None] + tl.arange(0, BLOCK_C)[None, :],
                       mask=inside[:, None], other=0.0)


@jit
def strip_of_columns(program, H, tiles, across, down, height):
    """Strip of a program: (image, channel tile, left column, top row, bottom row exclusive)."""
    tile = program % tiles
    program = program // tiles
    left = program % across * 8
    program = program // across
    top = program % down * height
    return program // down, tile, left, top, tl.minimum(top + height, H)


@jit
def positions_of_tile(row, left, bottom, H, W):
    """Offsets (16,) of a tile's positions, clamped to their image, and the mask of those inside strip and image."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    return tl.minimum(row, H - 1) * W + tl.minimum(column, W - 1), (row < bottom) & (column < W)


class Launch(NamedTuple):
    """Launch configuration of a band kernel.

    Args:
        tma: Load x by the Tensor Memory Accelerator (TMA) of Hopper GPUs instead of ordinary loads.
        strips: Strips that an image is divided into from top to bottom, None for about PROGRAMS programs in all. The
            weight gradient of LightConv takes it as the number of programs.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining.
        max_registers: Maximum registers of a thread, so that more programs share a multiprocessor; None for no limit.
    """

    tma: bool = False
    strips: int | None = None
    num_warps: int = 1
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Keyword arguments of Triton's launcher."""
        return {'num_warps': self.num_warps, 'num_stages': self.num_stages, 'maxnreg': self.max_registers}


def default_launch(x: torch.Tensor) -> Launch:
    """Launch with TMA from compute capability 9.0 on if x is aligned to 16 bytes, else with ordinary loads."""
    return Launch(tma=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) and x.data_ptr() % 16 == 0)


def grid(x: torch.Tensor, tiles: int, launch: Launch) -> tuple[int, int, int, int]:
    """Launch grid: (programs, strips across, strips down, rows of a strip, an even number)."""
    B, _, H, W = x.shape
    across = cdiv(W, 8)
    strips = launch.strips or cdiv(PROGRAMS, B * across * tiles)
    height = 2 * cdiv(cdiv(H, 2), min(strips, cdiv(H, 2)))
    down = cdiv(H, height)
    return B * across * down * tiles, across, down, height


def takes_band(op: str, kernels: str, obstacle: str) -> bool:
    """Whether to run the tensor-core kernels: with 'auto' if there is no obstacle; 'band' and 'direct' force a choice.

    Raises ValueError for another value of `kernels`, and for 'band' if there is an obstacle.
    """
    if kernels not in ('auto', 'band', 'direct'):
        raise ValueError(f"{op}: kernels must be 'auto', 'band' or 'direct', got {kernels!r}.")
    if kernels == 'band' and obstacle:
        raise ValueError(f"{op}: the band kernels cannot run: {obstacle}; use kernels='auto'.")
    return kernels != 'direct' and not obstacle


def slots_of_span(Kh: int) -> int:
    """Slots of half a span: 8 columns by Kh + 1 rows, rounded up to a power of two."""
    return 8 * next_power_of_2(Kh + 1)


def operand(x: torch.Tensor, channels: int, slots: int, launch: Launch) -> torch.Tensor | TensorDescriptor:
    """x, or for TMA the descriptor of x that loads `slots` slots by `channels` channels."""
    if not launch.tma:
        return x
    B, C, H, W = x.shape
    return TensorDescriptor(x, [B, H, W, C], [x.stride(0), W * C, C, 1], [1, slots // 8, 8, channels])


def tile_obstacle(dtype: torch.dtype, width: int, kernel: tuple[int, int] = (1, 1)) -> str:
    """Reason why the tiles cannot take a dtype, a head of `width` channels or a kernel (Kh, Kw); '' if they can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f'limited to float16 or bfloat16, got {dtype}'
    if max(kernel) > MAX_KERNEL_SIZE:
        return f'limited to kernels up to {MAX_KERNEL_SIZE} x {MAX_KERNEL_SIZE}, got {kernel[0]} x {kernel[1]}'
    if width not in HEAD_WIDTHS:
        return f'limited to heads of {", ".join(map(str, HEAD_WIDTHS))} channels, got {width}'
    return ''


def band_obstacle(x: torch.Tensor, kernel: tuple[int, int], heads: int, logits: torch.Tensor | None = None) -> str:
    """Reason why the tensor-core kernels cannot take a call; '' if they can.

    These are `band.py` of both operators for kernels up to 7 x 7, and `lightconv2d/toeplitz.py` for larger ones.

    Args:
        x: (B, C, H, W); its dtype, layout, size and device decide.
        kernel: (Kh, Kw).
        heads: G; the width of a head, C // G, decides.
        logits: (B, G * Kh * Kw, H, W) of DynamicConv, which must have the dtype of x; None for LightConv.
    """
    if logits is not None and logits.dtype != x.dtype:
        return f'x and logits must have one dtype, got {x.dtype} and {logits.dtype}'
    if found := tile_obstacle(x.dtype, x.shape[1] // heads, (1, 1) if logits is None else kernel):
        return found
    for name, tensor in (('x', x), ('logits', logits)):
        if tensor is None:
            continue
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return f'{name} must be dense in channels_last, got strides {tensor.stride()}'
        if needs_int64(tensor):
            return f'{name} must stay below 2^31 elements an image, got shape {tuple(tensor.shape)}'
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f'limited to compute capability 8.0 and newer, got {torch.cuda.get_device_capability(x.device)}'
    return ''
