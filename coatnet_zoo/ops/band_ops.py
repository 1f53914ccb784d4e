"""What the band kernels of both operators share: the geometry of a tile, its loads, the shape of a launch.

A tile is 8 x 2 positions. Their windows span 16 columns, in a left and a right half, and Kh + 1 rows. Column c of the
span is slot column c % 8 of its half: the Kw <= 7 columns that one position sees have distinct slot columns. In slot
column s, position column px has tap v = (s - px) % 8, in the left half if s >= px, else in the right one. So the band
matrix of a tile is (16 positions, slots) for both halves: each weight is loaded and exponentiated once. Positions and
slots count row by row.
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
MAX_KERNEL_SIZE = 7  # of the band kernels
PROGRAMS = 4096  # programs of one warp that keep a Hopper GPU busy
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's dot takes bfloat16 for integers


@jit
def product(a, b, acc):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def tap_column(s, px):
    """Tap with which position column px sees slot column s; there is none from the kernel's width on."""
    return (s - px) & 7


@jit
def slot_column(v, px):
    """Slot column in which position column px has tap v."""
    return (v + px) & 7


@jit
def taps_of_slots(position, slot, Kh: tl.constexpr, Kw: tl.constexpr):
    """(u * Kw, v, whether there is such a tap) of positions and slots, broadcast; where there is none, another one."""
    u = slot // 8 - position // 8
    v = tap_column(slot % 8, position % 8)
    return tl.minimum(tl.maximum(u, 0), Kh - 1) * Kw, tl.minimum(v, Kw - 1), (u >= 0) & (u < Kh) & (v < Kw)


@jit
def half_of_span(x, image, row, column, channel, H, W, C: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
                 TMA: tl.constexpr):
    """What lies in the slots (SLOTS, BLOCK_C) of 8 columns from (row, column) on, zero outside the image."""
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
    """(image, tile of the channels, left, top, bottom) of the strip that a program walks down."""
    tile = program % tiles
    program = program // tiles
    left = program % across * 8
    program = program // across
    top = program % down * height
    return program // down, tile, left, top, tl.minimum(top + height, H)


@jit
def positions_of_tile(row, left, bottom, H, W):
    """Offsets (16,) of a tile's positions inside their image, moved into it, and which are the program's own."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    return tl.minimum(row, H - 1) * W + tl.minimum(column, W - 1), (row < bottom) & (column < W)


class Launch(NamedTuple):
    """How a band kernel is launched.

    Args:
        tma: Whether Hopper's copy engine loads x, else ordinary loads do.
        strips: Strips below each other in an image; None for about PROGRAMS programs in all.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining.
        max_registers: Registers of a thread at most, so that more programs share a multiprocessor; None for no bound.
    """

    tma: bool = False
    strips: int | None = None
    num_warps: int = 1
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """What Triton's launcher takes."""
        return {'num_warps': self.num_warps, 'num_stages': self.num_stages, 'maxnreg': self.max_registers}


def default_launch(x: torch.Tensor) -> Launch:
    """The copy engine from compute capability 9.0 on, where x is aligned as it needs."""
    return Launch(tma=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) and x.data_ptr() % 16 == 0)


def grid(x: torch.Tensor, tiles: int, launch: Launch) -> tuple[int, int, int, int]:
    """(programs, strips beside each other, strips below each other, their height, which is even)."""
    B, _, H, W = x.shape
    across = cdiv(W, 8)
    strips = launch.strips or cdiv(PROGRAMS, B * across * tiles)
    height = 2 * cdiv(cdiv(H, 2), min(strips, cdiv(H, 2)))
    down = cdiv(H, height)
    return B * across * down * tiles, across, down, height


def takes_band(op: str, kernels: str, obstacle: str) -> bool:
    """Whether the kernels for tensor cores run: 'auto' where there is no obstacle; 'band' and 'direct' force a choice.

    Raises ValueError if they are asked for and cannot run.
    """
    if kernels not in ('auto', 'band', 'direct'):
        raise ValueError(f"{op}: kernels must be 'auto', 'band' or 'direct', got {kernels!r}.")
    if kernels == 'band' and obstacle:
        raise ValueError(f"{op}: the band kernels cannot run: {obstacle}; use kernels='auto'.")
    return kernels != 'direct' and not obstacle


def slots_of_span(Kh: int) -> int:
    """Slots of a tile's whole span, a power of two."""
    return 8 * next_power_of_2(Kh + 1)


def operand(x: torch.Tensor, channels: int, slots: int, launch: Launch) -> torch.Tensor | TensorDescriptor:
    """x, or the descriptor with which the copy engine loads `slots` slots of `channels` channels."""
    if not launch.tma:
        return x
    B, C, H, W = x.shape
    return TensorDescriptor(x, [B, H, W, C], [x.stride(0), W * C, C, 1], [1, slots // 8, 8, channels])


def tile_obstacle(dtype: torch.dtype, width: int, kernel: tuple[int, int] = (1, 1)) -> str:
    """What the tiles of these kernels do not cover: a dtype, a head of `width` channels, a kernel (Kh, Kw); else ''."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f'limited to float16 or bfloat16, got {dtype}'
    if max(kernel) > MAX_KERNEL_SIZE:
        return f'limited to kernels up to {MAX_KERNEL_SIZE} x {MAX_KERNEL_SIZE}, got {kernel[0]} x {kernel[1]}'
    if width not in HEAD_WIDTHS:
        return f'limited to heads of {", ".join(map(str, HEAD_WIDTHS))} channels, got {width}'
    return ''


def band_obstacle(x: torch.Tensor, kernel: tuple[int, int], heads: int, logits: torch.Tensor | None = None) -> str:
    """What keeps the kernels for tensor cores from a call: '' if nothing, so that they run unless others are forced.

    They are `band.py` of both operators up to 7 x 7, and `lightconv2d/toeplitz.py` for larger kernels.

    Args:
        x: (B, C, H, W), whose dtype, layout, size and device decide.
        kernel: (Kh, Kw).
        heads: G, whose width C // G decides.
        logits: (B, G * Kh * Kw, H, W) of DynamicConv, which takes them as they are; None for LightConv.
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
