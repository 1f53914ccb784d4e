"""DynamicConv on tensor cores: 16-bit, channels_last, kernels up to 7 x 7, heads of 16, 32 or 64 channels.

    fwd          out = bias + W x,    W = softmax(logits), a band matrix (positions, inputs)
    bwd_input    dx = W^T grad
    bwd_logits   dW = grad x^T along the band,    dlogits = W (dW - sum W dW)

`band_ops.py` describes tiles and slots. A penalty, 0 at slots with a tap and -1e38 elsewhere, masks the logits. The
tensor cores add it, which leaves the logits in the register layout that the next product expects. Sums are in float32;
weights are rounded to the dtype of x. A program handles one head and 8 columns of an image from top to bottom; there
are no atomic adds.

Pointers to taps (positions, slots) carry the hint `max_contiguous(ptr, (1, 2))`. It makes Triton lay a warp's lanes
along the slots, whose taps are adjacent in memory. Without it, Triton 3.6 lays them along the positions, and every
access touches 16 cache lines. The hint changes nothing else, since the addresses have no known alignment.
"""
import torch
import triton.language as tl
from triton import jit

from ..band_ops import (
    LOG2E,
    Launch,
    default_launch,
    grid,
    half_of_span,
    operand,
    positions_of_tile,
    product,
    slots_of_span,
    strip_of_columns,
    taps_of_slots,
)
from ..dropconnect import threshold
from ..triton_ops import dropconnect_factor, empty_channels_last, on_device_of

__all__ = ['launch_bwd_input', 'launch_bwd_logits', 'launch_fwd']


@jit
def _identity():
    i = tl.arange(0, 16)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.bfloat16)


@jit
def _penalty(allowed):
    return tl.where(allowed, 0.0, -1e38).to(tl.bfloat16)


@jit
def _mask_logits(logits, exists, SOFTMAX: tl.constexpr):
    """logits (16, slots) in float32, masked where there is no tap: by -1e38 for a softmax, else by 0."""
    if SOFTMAX:
        return product(_identity(), _penalty(exists), logits.to(tl.float32))
    else:
        return tl.where(exists, logits.to(tl.float32), 0.0)


@jit
def _dynamicconv2d_band_fwd_kernel(
        x, logits_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr, H, W, across, down, height, threshold, scale,
        G: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr,
        SOFTMAX: tl.constexpr, TMA: tl.constexpr,
):
    """out (B, H, W, C), stats (B, H, W, G, 2): maximum and reciprocal sum of each softmax. x: descriptor or pointer."""
    image, head, left, top, bottom = strip_of_columns(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    logits_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    out_ptr += before * (G * HEAD) + head * HEAD
    stats_ptr += (before * G + head) * 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    channel = tl.arange(0, HEAD)
    u, v, exists = taps_of_slots(i, slot, Kh, Kw)
    tap = u + v
    in_left = tl.where(slot % 8 >= i % 8, 1.0, 0.0)

    for row in range(top, bottom, 2):
        offs, mask = positions_of_tile(row, left, bottom, H, W)
        ptr = tl.max_contiguous((logits_ptr + offs * (G * Kh * Kw))[:, None] + v + u, (1, 2))  # lanes along slots
        weight = _mask_logits(tl.load(ptr), exists, SOFTMAX)
        if SOFTMAX:
            row_max = tl.max(weight, 1)
            weight = tl.math.exp2(weight * LOG2E - (row_max * LOG2E)[:, None])
            norm = 1 / tl.sum(weight, 1)
            tl.store(stats_ptr + offs * (2 * G), row_max, mask=mask)
            tl.store(stats_ptr + offs * (2 * G) + 1, norm, mask=mask)
        if seed_ptr is not None:
            index = (((before + offs) * G + head) * (Kh * Kw))[:, None] + tap
            weight *= dropconnect_factor(index, tl.load(seed_ptr), threshold, 1.0)
        x_left = half_of_span(
            x, image, row - Kh // 2, left - Kw // 2, head * HEAD, H, W, G * HEAD, HEAD, SLOTS, TMA)
        x_right = half_of_span(
            x, image, row - Kh // 2, left - Kw // 2 + 8, head * HEAD, H, W, G * HEAD, HEAD, SLOTS, TMA)
        near = weight * in_left
        acc = product(near.to(x_left.dtype), x_left, tl.zeros((16, HEAD), tl.float32))
        acc = product((weight - near).to(x_left.dtype), x_right, acc)
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
        SOFTMAX: tl.constexpr, STATS_SAVED: tl.constexpr, TMA: tl.constexpr,
):
    """Gradient w.r.t. the logits (B, H, W, G * Kh * Kw). Computes and stores the statistics unless STATS_SAVED."""
    image, head, left, top, bottom = strip_of_columns(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    logits_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    out_ptr += before * (G * Kh * Kw) + head * (Kh * Kw)
    grad_ptr += before * (G * HEAD) + head * HEAD
    stats_ptr += (before * G + head) * 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    channel = tl.arange(0, HEAD)
    u, v, exists = taps_of_slots(i, slot, Kh, Kw)
    tap = u + v
    in_left = slot % 8 >= i % 8

    for row in range(top, bottom, 2):
        offs, mask = positions_of_tile(row, left, bottom, H, W)
        grad = tl.load(grad_ptr + (offs * (G * HEAD))[:, None] + channel[None, :])
        x_left = half_of_span(
            x, image, row - Kh // 2, left - Kw // 2, head * HEAD, H, W, G * HEAD, HEAD, SLOTS, TMA)
        x_right = half_of_span(
            x, image, row - Kh // 2, left - Kw // 2 + 8, head * HEAD, H, W, G * HEAD, HEAD, SLOTS, TMA)
        none = tl.zeros((16, SLOTS), tl.float32)
        dw = tl.where(in_left, product(grad, tl.trans(x_left), none), product(grad, tl.trans(x_right), none))
        if seed_ptr is not None:
            index = (((before + offs) * G + head) * (Kh * Kw))[:, None] + tap
            dw *= dropconnect_factor(index, tl.load(seed_ptr), threshold, scale)
        if SOFTMAX:
            ptr = tl.max_contiguous((logits_ptr + offs * (G * Kh * Kw))[:, None] + v + u, (1, 2))  # lanes along slots
            weight = _mask_logits(tl.load(ptr), exists, True)
            row_max = tl.load(stats_ptr + offs * (2 * G)) if STATS_SAVED else tl.max(weight, 1)
            weight = tl.math.exp2(weight * LOG2E - (row_max * LOG2E)[:, None])
            norm = tl.load(stats_ptr + offs * (2 * G) + 1) if STATS_SAVED else 1 / tl.sum(weight, 1)
            if not STATS_SAVED:
                tl.store(stats_ptr + offs * (2 * G), row_max, mask=mask)
                tl.store(stats_ptr + offs * (2 * G) + 1, norm, mask=mask)
            mean = tl.sum(weight * dw, 1) * norm * norm
            dw = weight * (dw * norm[:, None] - mean[:, None])
        ptr = tl.max_contiguous((out_ptr + offs * (G * Kh * Kw))[:, None] + v + u, (1, 2))  # lanes along slots
        tl.store(ptr, dw.to(out_ptr.dtype.element_ty), mask=exists & mask[:, None])


@jit
def _columns_of_rows(row, left, H, W):
    """Offsets (16,) in their image of 8 columns of two rows, 0 if outside, and the mask of those inside."""
    i = tl.arange(0, 16)
    row += i // 8
    column = left + i % 8
    mask = (row < H) & (column >= 0) & (column < W)
    return tl.where(mask, row * W + column, 0), mask


@jit
def _store_rows(acc, out_ptr, row, top, bottom, left, W, scale, G: tl.constexpr, HEAD: tl.constexpr):
    """Store two rows of 8 columns, multiplied by `scale`, where they lie in the program's strip."""
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
    """Gradient w.r.t. x (B, H, W, C). Two rows are stored once the loop over positions is Kh // 2 rows below them.

    The positions whose windows cover 8 input columns form a left and a right half of 8 columns. Position column px of
    either half reads slot column s with tap column v = (s - px) % 8, in the right half if s >= px, else in the left.
    So both halves share one set of weights, each of which belongs to one half.
    """
    image, head, left, top, bottom = strip_of_columns(tl.program_id(0), H, G, across, down, height)
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
    # start at the first pair of rows whose windows reach the strip; strips begin at even rows
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
            u, v, exists = taps_of_slots(i, slot + 16 * j, Kh, Kw)
            ptr = tl.max_contiguous(logits_ptr + offs * (G * Kh * Kw) + v + u, (1, 2))  # lanes along slots
            weight = _mask_logits(tl.load(ptr), exists, SOFTMAX)
            if SOFTMAX:
                weight = tl.math.exp2(weight * LOG2E - shift) * norm
            if seed_ptr is not None:
                index = ((before + offs) * G + head) * (Kh * Kw) + v + u
                weight *= dropconnect_factor(index, tl.load(seed_ptr), threshold, 1.0)
            near = tl.where(in_right, 0.0, weight)
            far = tl.trans((weight - near).to(grad_left.dtype))
            near = tl.trans(near.to(grad_left.dtype))
            if j == 0:
                acc0 = product(far, grad_right, product(near, grad_left, acc0))
            elif j == 1:
                acc1 = product(far, grad_right, product(near, grad_left, acc1))
            elif j == 2:
                acc2 = product(far, grad_right, product(near, grad_left, acc2))
            else:
                acc3 = product(far, grad_right, product(near, grad_left, acc3))
        _store_rows(acc0, out_ptr, row - Kh // 2, top, bottom, left, W, scale, G, HEAD)
        acc0 = acc1
        acc1 = acc2
        acc2 = acc3
        acc3 = tl.zeros((16, HEAD), tl.float32)
    row = first + (last - first + 1) // 2 * 2 - Kh // 2
    _store_rows(acc0, out_ptr, row, top, bottom, left, W, scale, G, HEAD)
    _store_rows(acc1, out_ptr, row + 2, top, bottom, left, W, scale, G, HEAD)


def bounded(launch: Launch, seed: torch.Tensor | None) -> Launch:
    """Limit registers so that 12 programs fit on a Hopper multiprocessor; not with DropConnect, which would spill."""
    return launch._replace(max_registers=168) if launch.tma and seed is None else launch


def launch_of_bwd_input(launch: Launch, head: int, seed: torch.Tensor | None) -> Launch:
    """`bounded`, but two warps per program for heads of 64 channels, which spill the registers of one."""
    return launch._replace(num_warps=2) if head == 64 else bounded(launch, seed)


def launch_of_bwd_logits(launch: Launch, head: int, slots: int) -> Launch:
    """Two warps per program where the gradient of the logits spills the registers of one."""
    return launch._replace(num_warps=2) if slots == 64 and (head == 64 or not launch.tma) else launch


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
    launch, slots = launch or bounded(default_launch(x), seed), slots_of_span(Kh)
    programs, *strips = grid(x, G, launch)
    with on_device_of(x):
        _dynamicconv2d_band_fwd_kernel[programs,](
            operand(x, C // G, slots, launch), logits, bias, seed, out, stats, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), G=G, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=slots, SOFTMAX=softmax, TMA=launch.tma,
            **launch.options)
    return out, stats


def launch_bwd_input(
        grad: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None) -> torch.Tensor:
    """Gradient w.r.t. x (B, C, H, W), in the dtype of grad."""
    _, C, H, W = grad.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = empty_channels_last(grad)
    if out.numel() == 0:
        return out
    launch = launch or launch_of_bwd_input(default_launch(grad), C // G, seed)
    programs, *strips = grid(grad, G, launch)
    with on_device_of(grad):
        _dynamicconv2d_band_bwd_input_kernel[programs,](
            grad, logits, stats, seed, out, H, W, *strips, threshold(dropconnect), 1 / (1 - dropconnect), G=G, Kh=Kh,
            Kw=Kw, HEAD=C // G, SOFTMAX=softmax, **launch.options)
    return out


def launch_bwd_logits(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None,
        stats_saved: bool = True,
) -> torch.Tensor:
    """Gradient w.r.t. the logits (B, G * Kh * Kw, H, W), channels_last. Writes `stats` unless `stats_saved`."""
    _, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = empty_channels_last(logits)
    if out.numel() == 0:
        return out
    slots = slots_of_span(Kh)
    launch = launch or launch_of_bwd_logits(default_launch(x), C // G, slots)
    programs, *strips = grid(x, G, launch)
    with on_device_of(x):
        _dynamicconv2d_band_bwd_logits_kernel[programs,](
            operand(x, C // G, slots, launch), grad, logits, stats, seed, out, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), G=G, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=slots, SOFTMAX=softmax,
            STATS_SAVED=stats_saved, TMA=launch.tma, **launch.options)
    return out
