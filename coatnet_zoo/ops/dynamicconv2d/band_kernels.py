"""DynamicConv on tensor cores: 16-bit, channels_last, kernels up to 7 x 7, heads of 16, 32 or 64 channels.

    fwd          out = bias + W x,    W = softmax(logits), a band matrix (positions, inputs)
    bwd_input    dx = W^T grad
    bwd_logits   dW = grad x^T along the band,    dlogits = W (dW - sum W dW)

A tile is 8 x 2 positions. Their windows span 16 columns, in a left and a right half, and Kh + 1 rows. Column c of the
span is slot column c % 8 of its half: the Kw <= 7 columns that one position sees have distinct slot columns. In slot
column s, position column px has tap v = (s - px) % 8, in the left half if s >= px, else in the right one. So the band
matrix of a tile is (16 positions, slots) for both halves: each weight is loaded and exponentiated once.

The penalty of a slot is 0 where it has a tap, hugely negative elsewhere, and the tensor cores add it: that masks, and
leaves the logits in the register layout in which the next product takes them. Sums are taken in float32; weights are
rounded to the dtype of x. A program has one head and 8 columns of an image and walks down; nothing is added in memory.
"""
from typing import NamedTuple

import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contract import INTERPRETED
from ..dropconnect import threshold
from ..triton_ops import dropconnect_factor, empty_channels_last, large, on_device_of

__all__ = ['Launch', 'launch_bwd_input', 'launch_bwd_logits', 'launch_fwd', 'why_not']

HEAD_WIDTHS = (16, 32, 64)
MAX_KERNEL_SIZE = 7

LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS = 8192  # programs of one warp that keep a Hopper GPU busy
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's dot takes bfloat16 for integers


@jit
def _product(a, b, acc):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@jit
def tap_column(s, px):
    """Tap with which position column px sees slot column s; there is none from the kernel's width on."""
    return (s - px) & 7


@jit
def _taps(position, slot, Kh: tl.constexpr, Kw: tl.constexpr):
    """(tap, whether there is one) of positions and slots, broadcast; where there is none, some other tap."""
    u = slot // 8 - position // 8
    v = tap_column(slot % 8, position % 8)
    return tl.minimum(tl.maximum(u, 0), Kh - 1) * Kw, tl.minimum(v, Kw - 1), (u >= 0) & (u < Kh) & (v < Kw)


@jit
def _identity():
    i = tl.arange(0, 16)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.bfloat16)


@jit
def _penalty(allowed):
    return tl.where(allowed, 0.0, -1e38).to(tl.bfloat16)


@jit
def _mask_logits(logits, exists, SOFTMAX: tl.constexpr):
    """logits (16, slots) in float32, of which a softmax leaves nothing where there is no tap; or 0 there."""
    if SOFTMAX:
        return _product(_identity(), _penalty(exists), logits.to(tl.float32))
    else:
        return tl.where(exists, logits.to(tl.float32), 0.0)


@jit
def _windows(x, image, row, column, head, H, W, G: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr,
             TMA: tl.constexpr):
    """What lies in the slots (SLOTS, HEAD) of the half that begins at (row, column), zero outside the image."""
    if TMA:
        return tl.reshape(x.load([image, row, column, head * HEAD]), (SLOTS, HEAD))
    else:
        slot = tl.arange(0, SLOTS)
        row += slot // 8
        column += slot % 8
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        x += tl.cast(image, tl.int64) * H * W * (G * HEAD) + head * HEAD
        return tl.load(x + ((row * W + column) * (G * HEAD))[:, None] + tl.arange(0, HEAD)[None, :],
                       mask=inside[:, None], other=0.0)


@jit
def _strip_of_program(program, H, G: tl.constexpr, across, down, height):
    """(image, head, left, top, bottom) of the strip that a program walks down."""
    head = program % G
    program = program // G
    left = program % across * 8
    program = program // across
    top = program % down * height
    return program // down, head, left, top, tl.minimum(top + height, H)


@jit
def _positions(row, left, bottom, H, W):
    """Offsets (16,) of a tile's positions inside their image, moved into it, and which are the program's own."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    return tl.minimum(row, H - 1) * W + tl.minimum(column, W - 1), (row < bottom) & (column < W)


@jit
def _dynamicconv2d_band_fwd_kernel(
        x, logits_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr, H, W, across, down, height, threshold, scale,
        G: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr,
        SOFTMAX: tl.constexpr, TMA: tl.constexpr,
):
    """out (B, H, W, C), stats (B, H, W, G, 2): maximum and reciprocal sum of each softmax. x: descriptor or pointer."""
    image, head, left, top, bottom = _strip_of_program(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    logits_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    out_ptr += before * (G * HEAD) + head * HEAD
    stats_ptr += (before * G + head) * 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    channel = tl.arange(0, HEAD)
    u, v, exists = _taps(i, slot, Kh, Kw)
    tap = u + v
    in_left = tl.where(slot % 8 >= i % 8, 1.0, 0.0)

    for row in range(top, bottom, 2):
        offs, mask = _positions(row, left, bottom, H, W)
        weight = _mask_logits(tl.load((logits_ptr + offs * (G * Kh * Kw))[:, None] + v + u), exists, SOFTMAX)
        if SOFTMAX:
            row_max = tl.max(weight, 1)
            weight = tl.math.exp2(weight * LOG2E - (row_max * LOG2E)[:, None])
            norm = 1 / tl.sum(weight, 1)
            tl.store(stats_ptr + offs * (2 * G), row_max, mask=mask)
            tl.store(stats_ptr + offs * (2 * G) + 1, norm, mask=mask)
        if seed_ptr is not None:
            index = (((before + offs) * G + head) * (Kh * Kw))[:, None] + tap
            weight *= dropconnect_factor(index, tl.load(seed_ptr), threshold, 1.0)
        x_left = _windows(x, image, row - Kh // 2, left - Kw // 2, head, H, W, G, HEAD, SLOTS, TMA)
        x_right = _windows(x, image, row - Kh // 2, left - Kw // 2 + 8, head, H, W, G, HEAD, SLOTS, TMA)
        near = weight * in_left
        acc = _product(near.to(x_left.dtype), x_left, tl.zeros((16, HEAD), tl.float32))
        acc = _product((weight - near).to(x_left.dtype), x_right, acc)
        if SOFTMAX:
            acc *= norm[:, None]
        if seed_ptr is not None:
            acc *= scale
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + head * HEAD + channel).to(tl.float32)[None, :]
        tl.store(out_ptr + (offs * (G * HEAD))[:, None] + channel[None, :], acc.to(out_ptr.dtype.element_ty),
                 mask=mask[:, None])


@jit
def _dynamicconv2d_band_bwd_logits_kernel(
        x, grad_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr, H, W, across, down, height, threshold, scale,
        G: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr,
        SOFTMAX: tl.constexpr, TMA: tl.constexpr,
):
    """Gradient w.r.t. the logits (B, H, W, G * Kh * Kw)."""
    image, head, left, top, bottom = _strip_of_program(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    logits_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    out_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    grad_ptr += before * (G * HEAD) + head * HEAD
    stats_ptr += (before * G + head) * 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    channel = tl.arange(0, HEAD)
    u, v, exists = _taps(i, slot, Kh, Kw)
    tap = u + v
    in_left = slot % 8 >= i % 8

    for row in range(top, bottom, 2):
        offs, mask = _positions(row, left, bottom, H, W)
        grad = tl.load(grad_ptr + (offs * (G * HEAD))[:, None] + channel[None, :])
        x_left = _windows(x, image, row - Kh // 2, left - Kw // 2, head, H, W, G, HEAD, SLOTS, TMA)
        x_right = _windows(x, image, row - Kh // 2, left - Kw // 2 + 8, head, H, W, G, HEAD, SLOTS, TMA)
        none = tl.zeros((16, SLOTS), tl.float32)
        dw = tl.where(in_left, _product(grad, tl.trans(x_left), none), _product(grad, tl.trans(x_right), none))
        if seed_ptr is not None:
            index = (((before + offs) * G + head) * (Kh * Kw))[:, None] + tap
            dw *= dropconnect_factor(index, tl.load(seed_ptr), threshold, scale)
        if SOFTMAX:
            weight = _mask_logits(tl.load((logits_ptr + offs * (G * Kh * Kw))[:, None] + v + u), exists, True)
            row_max = tl.load(stats_ptr + offs * (2 * G))
            norm = tl.load(stats_ptr + offs * (2 * G) + 1)
            weight = tl.math.exp2(weight * LOG2E - (row_max * LOG2E)[:, None])
            mean = tl.sum(weight * dw, 1) * norm * norm
            dw = weight * (dw * norm[:, None] - mean[:, None])
        tl.store((out_ptr + offs * (G * Kh * Kw))[:, None] + v + u, dw.to(out_ptr.dtype.element_ty),
                 mask=exists & mask[:, None])


@jit
def _columns_of_rows(row, left, H, W):
    """Offsets (16,) of 8 columns of two rows inside their image, and which lie in it; 0 where they do not."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    mask = (row < H) & (column >= 0) & (column < W)
    return tl.where(mask, row * W + column, 0), mask


@jit
def _store_rows(acc, out_ptr, row, top, bottom, left, W, scale, G: tl.constexpr, HEAD: tl.constexpr):
    """Two rows of 8 columns, scaled, as far as they lie in the program's strip."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    tl.store(out_ptr + ((row * W + column) * (G * HEAD))[:, None] + tl.arange(0, HEAD)[None, :],
             (acc * scale).to(out_ptr.dtype.element_ty), mask=((row >= top) & (row < bottom) & (column < W))[:, None])


@jit
def _dynamicconv2d_band_bwd_input_kernel(
        grad_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr, H, W, across, down, height, threshold, scale,
        G: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr,
):
    """Gradient w.r.t. x (B, H, W, C). Two of its rows are complete once the positions have passed Kh // 2 rows below.

    Of the positions that see an input column in tap v, those at column px of the left or right half of their span have
    v = (slot column - px) % 8 again. So both halves share one set of weights, each of which goes to one of them.
    """
    image, head, left, top, bottom = _strip_of_program(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    grad_ptr += before * (G * HEAD) + head * HEAD
    out_ptr += before * (G * HEAD) + head * HEAD
    logits_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    stats_ptr += (before * G + head) * 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, 16)[None, :]
    channel = tl.arange(0, HEAD)[None, :]
    in_right = slot % 8 >= i % 8
    acc0, acc1 = tl.zeros((16, HEAD), tl.float32), tl.zeros((16, HEAD), tl.float32)
    acc2, acc3 = tl.zeros((16, HEAD), tl.float32), tl.zeros((16, HEAD), tl.float32)
    # from the first positions on whose windows reach the strip, which begins at an even row
    first = tl.maximum(top - (Kh // 2 + 1) // 2 * 2, 0)
    last = tl.minimum(bottom + Kh // 2, H)
    for row in range(first, last, 2):
        offs_left, mask_left = _columns_of_rows(row, left - 8 + Kw // 2, H, W)
        offs_right, mask_right = _columns_of_rows(row, left + Kw // 2, H, W)
        grad_left = tl.load(grad_ptr + (offs_left * (G * HEAD))[:, None] + channel, mask=mask_left[:, None], other=0.0)
        grad_right = tl.load(
            grad_ptr + (offs_right * (G * HEAD))[:, None] + channel, mask=mask_right[:, None], other=0.0)
        offs = tl.where(in_right, offs_right[:, None], offs_left[:, None])
        if SOFTMAX:
            shift = tl.where(in_right, tl.load(stats_ptr + offs_right * (2 * G))[:, None],
                             tl.load(stats_ptr + offs_left * (2 * G))[:, None]) * LOG2E
            norm = tl.where(in_right, tl.load(stats_ptr + offs_right * (2 * G) + 1)[:, None],
                            tl.load(stats_ptr + offs_left * (2 * G) + 1)[:, None])
        for j in tl.static_range((Kh + 1) // 2):
            u, v, exists = _taps(i, slot + 16 * j, Kh, Kw)
            weight = _mask_logits(tl.load(logits_ptr + offs * (G * Kh * Kw) + v + u), exists, SOFTMAX)
            if SOFTMAX:
                weight = tl.math.exp2(weight * LOG2E - shift) * norm
            if seed_ptr is not None:
                index = ((before + offs) * G + head) * (Kh * Kw) + v + u
                weight *= dropconnect_factor(index, tl.load(seed_ptr), threshold, 1.0)
            near = tl.where(in_right, 0.0, weight)
            far = tl.trans((weight - near).to(grad_left.dtype))
            near = tl.trans(near.to(grad_left.dtype))
            if j == 0:
                acc0 = _product(far, grad_right, _product(near, grad_left, acc0))
            elif j == 1:
                acc1 = _product(far, grad_right, _product(near, grad_left, acc1))
            elif j == 2:
                acc2 = _product(far, grad_right, _product(near, grad_left, acc2))
            else:
                acc3 = _product(far, grad_right, _product(near, grad_left, acc3))
        _store_rows(acc0, out_ptr, row - Kh // 2, top, bottom, left, W, scale, G, HEAD)
        acc0 = acc1
        acc1 = acc2
        acc2 = acc3
        acc3 = tl.zeros((16, HEAD), tl.float32)
    row = first + (last - first + 1) // 2 * 2 - Kh // 2
    _store_rows(acc0, out_ptr, row, top, bottom, left, W, scale, G, HEAD)
    _store_rows(acc1, out_ptr, row + 2, top, bottom, left, W, scale, G, HEAD)


def why_not(x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int]) -> str:
    """Why these kernels cannot take a call, '' if they can: the whole choice between them and `kernels.py`."""
    head = x.shape[1] * kernel[0] * kernel[1] // logits.shape[1]
    if x.dtype not in (torch.float16, torch.bfloat16) or logits.dtype != x.dtype:
        return f'they take float16 or bfloat16, the same for x and logits, got {x.dtype} and {logits.dtype}'
    if max(kernel) > MAX_KERNEL_SIZE:
        return f'they take kernels up to {MAX_KERNEL_SIZE} x {MAX_KERNEL_SIZE}, got {kernel[0]} x {kernel[1]}'
    if head not in HEAD_WIDTHS:
        return f'they take heads of {", ".join(map(str, HEAD_WIDTHS))} channels, got {head}'
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, logits)):
        return f'x and logits must be dense in channels_last, got strides {x.stride()} and {logits.stride()}'
    if large(x, logits):
        return f'an image must stay below 2^31 elements, got shapes {tuple(x.shape)} and {tuple(logits.shape)}'
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f'they need compute capability 8.0, got {torch.cuda.get_device_capability(x.device)}'
    return ''


class Launch(NamedTuple):
    """How a band kernel is launched. Defaults are those that were fastest where it was measured.

    Args:
        tma: Whether Hopper's copy engine loads x, else ordinary loads do.
        strips: Strips below each other in an image; None for about PROGRAMS programs in all.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelining.
    """

    tma: bool = False
    strips: int | None = None
    num_warps: int = 1
    num_stages: int = 2


def default_launch(x: torch.Tensor) -> Launch:
    """The copy engine from compute capability 9.0 on, where x is aligned as it needs."""
    return Launch(tma=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) and x.data_ptr() % 16 == 0)


def _grid(x: torch.Tensor, G: int, launch: Launch) -> tuple[int, int, int, int]:
    """(programs, strips beside each other, strips below each other, their height, which is even)."""
    B, _, H, W = x.shape
    across = cdiv(W, 8)
    strips = launch.strips or cdiv(PROGRAMS, B * across * G)
    height = 2 * cdiv(cdiv(H, 2), min(strips, cdiv(H, 2)))
    down = cdiv(H, height)
    return B * across * down * G, across, down, height


def _rows_of_slots(Kh: int) -> int:
    return next_power_of_2(Kh + 1)


def _operand(x: torch.Tensor, head: int, Kh: int, launch: Launch) -> torch.Tensor | TensorDescriptor:
    """x, or the descriptor with which the copy engine loads one half of a span."""
    if not launch.tma:
        return x
    B, C, H, W = x.shape
    return TensorDescriptor(x, [B, H, W, C], [H * W * C, W * C, C, 1], [1, _rows_of_slots(Kh), 8, head])


def launch_fwd(
        x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, C, H, W) and the statistics (B, H, W, G, 2) of its softmaxes; x and logits dense in channels_last."""
    B, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    out = empty_channels_last(x)
    stats = x.new_empty((B, H, W, G, 2) if softmax else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, stats
    launch = launch or default_launch(x)
    programs, *strips = _grid(x, G, launch)
    with on_device_of(x):
        _dynamicconv2d_band_fwd_kernel[programs,](
            _operand(x, C // G, Kh, launch), logits, bias, seed, out, stats, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), G=G, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=8 * _rows_of_slots(Kh), SOFTMAX=softmax,
            TMA=launch.tma, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return out, stats


def launch_bwd_input(
        grad: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None) -> torch.Tensor:
    """The gradient (B, C, H, W) of x, in the dtype of grad."""
    _, C, H, W = grad.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = empty_channels_last(grad)
    if out.numel() == 0:
        return out
    launch = launch or default_launch(grad)
    programs, *strips = _grid(grad, G, launch)
    with on_device_of(grad):
        _dynamicconv2d_band_bwd_input_kernel[programs,](
            grad, logits, stats, seed, out, H, W, *strips, threshold(dropconnect), 1 / (1 - dropconnect), G=G, Kh=Kh,
            Kw=Kw, HEAD=C // G, SOFTMAX=softmax, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return out


def launch_bwd_logits(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None) -> torch.Tensor:
    """The gradient (B, G * Kh * Kw, H, W), channels_last, in the dtype of logits."""
    _, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = empty_channels_last(logits)
    if out.numel() == 0:
        return out
    launch = launch or default_launch(x)
    programs, *strips = _grid(x, G, launch)
    with on_device_of(x):
        _dynamicconv2d_band_bwd_logits_kernel[programs,](
            _operand(x, C // G, Kh, launch), grad, logits, stats, seed, out, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), G=G, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=8 * _rows_of_slots(Kh), SOFTMAX=softmax,
            TMA=launch.tma, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return out
