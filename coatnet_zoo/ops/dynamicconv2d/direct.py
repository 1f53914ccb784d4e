"""DynamicConv in Triton without tensor cores: 16- and 32-bit, any layout and head width, kernels up to 13 x 13.

    fwd          out[p, c] = bias[c] + sum_t w[p, t] x[p + off(t), c],     w = softmax_t(l)
    bwd_input    dx[p, c] = sum_t w[p - off(t), t] grad[p - off(t), c], a gather, without atomic adds
    bwd_logits   dw[p, t] = sum_c grad[p, c] x[p + off(t), c];     dl = w (dw - sum_t w dw)

DropConnect multiplies w and dw by its factors. A program handles one head, a tile of its channels and a strip of one
image, in tiles of BLOCK_P positions by BLOCK_C channels, channels innermost, in float32. Each tap loads x and logits
again, through the caches; normalised weights are never stored. Strides of channels and columns are compile-time
constants, so that the taps of a kernel row lie at fixed offsets. Forward saves the maximum and the reciprocal sum of
each softmax separately: their log-sum-exp would lose precision for large logits.
"""
import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from ..band_ops import LOG2E
from ..dropconnect import threshold
from ..triton_ops import (
    OPTIONS,
    channel_block,
    dropconnect_factor,
    empty_channels_last,
    needs_int64,
    offset,
    on_device_of,
    positions_of_chunk,
    shift,
    strip_of_program,
    strips,
    within,
)

__all__ = ['empty_stats', 'launch_bwd_input', 'launch_bwd_logits', 'launch_fwd']


@jit
def channels_of_head(tile, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """(head, channels (BLOCK_C,), mask of the channels that exist) of a channel tile."""
    tiles: tl.constexpr = (HEAD + BLOCK_C - 1) // BLOCK_C
    head = tile // tiles
    inner = tile % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return head, head * HEAD + inner, inner < HEAD


@jit
def _dynamicconv2d_fwd_kernel(
        x_ptr, logits_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr,
        x_b, x_c: tl.constexpr, x_h, x_w: tl.constexpr, logits_b, logits_c: tl.constexpr, logits_h,
        logits_w: tl.constexpr, out_b, out_c: tl.constexpr, out_h, out_w: tl.constexpr,
        G, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, INT64: tl.constexpr,
        TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Forward. stats (B, H, W, G, 2): maximum and reciprocal sum of each softmax. TAPS: next power of two of Kw."""
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    head, channel, mask_c = channels_of_head(tile, HEAD, BLOCK_C)
    x_ptr += image * x_b
    out_ptr += image * out_b
    logits_ptr += image * logits_b
    before = image * H * W * G  # softmaxes in the preceding images
    stats_ptr += before * 2
    first = head * (Kh * Kw)
    if INT64:
        channel = channel.to(tl.int64)
        head = head.to(tl.int64)
        first = first.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for start in range(0, count, BLOCK_P):
        row, column, mask_p = positions_of_chunk(start, count, top, left, columns, INT64, BLOCK_P)
        index = (row * W + column) * G + head
        logits = logits_ptr + (row * logits_h + column * logits_w + first * logits_c)
        if SOFTMAX:
            # online softmax over kernel rows: the sum is rescaled to the largest logit so far, as in flash attention
            row_max = tl.full((BLOCK_P,), float('-inf'), tl.float32)
            row_sum = tl.zeros((BLOCK_P,), tl.float32)
            tap = tl.arange(0, TAPS)
            for u in range(Kh):
                logit = tl.load(logits[:, None] + ((u * Kw + tap) * logits_c)[None, :], mask=(tap < Kw)[None, :],
                                other=float('-inf')).to(tl.float32)
                largest = tl.maximum(row_max, tl.max(logit, 1))
                base = tl.where(largest == float('-inf'), 0.0, largest)  # -inf - -inf is NaN
                row_sum *= tl.exp2((row_max - base) * LOG2E)
                row_sum += tl.sum(tl.exp2((logit - base[:, None]) * LOG2E), 1)
                row_max = largest
            tl.store(stats_ptr + index * 2, row_max, mask=mask_p)
            tl.store(stats_ptr + index * 2 + 1, 1 / row_sum, mask=mask_p)
            # reload in the register layout of acc: else the weights of each tap would pass through shared memory
            tl.debug_barrier()
            row_max = tl.load(stats_ptr + index * 2)
            norm = tl.load(stats_ptr + index * 2 + 1)

        x_offs = x_ptr + ((row * x_h + column * x_w)[:, None] + (channel * x_c)[None, :])
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = offset(u, Kh)
            row_inside = within(row + dy, H)
            for v in tl.range(0, Kw, loop_unroll_factor=Kw if Kw <= 7 else 4):
                dx = offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(x_offs + shift(dy, dx, x_h, x_w),
                                 mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
                weight = tl.load(logits + (u * Kw + v) * logits_c).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp2((weight - row_max) * LOG2E)
                if seed_ptr is not None:
                    weight *= dropconnect_factor((before + index) * (Kh * Kw) + (u * Kw + v), seed, threshold, scale)
                acc += weight[:, None] * window
        if SOFTMAX:
            acc *= norm[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@jit
def _dynamicconv2d_bwd_input_kernel(
        grad_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr,
        grad_b, grad_c: tl.constexpr, grad_h, grad_w: tl.constexpr, logits_b, logits_c: tl.constexpr, logits_h,
        logits_w: tl.constexpr, out_b, out_c: tl.constexpr, out_h, out_w: tl.constexpr,
        G: tl.constexpr, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, INT64: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradient w.r.t. x: gathers from every output position whose window covers this input."""
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    head, channel, mask_c = channels_of_head(tile, HEAD, BLOCK_C)
    grad_ptr += image * grad_b
    out_ptr += image * out_b
    logits_ptr += image * logits_b
    before = image * H * W * G  # softmaxes in the preceding images
    stats_ptr += before * 2
    first = head * (Kh * Kw)
    if INT64:
        channel = channel.to(tl.int64)
        head = head.to(tl.int64)
        first = first.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for start in range(0, count, BLOCK_P):
        row, column, mask_p = positions_of_chunk(start, count, top, left, columns, INT64, BLOCK_P)
        grad_offs = grad_ptr + ((row * grad_h + column * grad_w)[:, None] + (channel * grad_c)[None, :])
        logits_offs = logits_ptr + (row * logits_h + column * logits_w + first * logits_c)
        index = (row * W + column) * G + head
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = -offset(u, Kh)
            row_inside = within(row + dy, H)
            for v in tl.range(0, Kw, loop_unroll_factor=Kw if Kw <= 7 else 4):
                dx = -offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(grad_offs + shift(dy, dx, grad_h, grad_w),
                                 mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
                # outside the image grad is loaded as zero, so any finite weight will do
                at_tap = shift(dy, dx, logits_h, logits_w) + tl.cast(u * Kw + v, tl.int64) * logits_c
                weight = tl.load(logits_offs + at_tap, mask=inside, other=0.0).to(tl.float32)
                away = shift(dy, dx, W * G, G)
                if SOFTMAX:
                    stats = stats_ptr + index * 2 + away * 2
                    row_max = tl.load(stats, mask=inside, other=0.0)
                    weight = tl.exp2((weight - row_max) * LOG2E)
                    weight *= tl.load(stats + 1, mask=inside, other=0.0)
                if seed_ptr is not None:
                    there = before + away + index
                    weight *= dropconnect_factor(there * (Kh * Kw) + (u * Kw + v), seed, threshold, scale)
                acc += weight[:, None] * window
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@jit
def _dynamicconv2d_bwd_logits_kernel(
        grad_ptr, x_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr,
        grad_b, grad_c: tl.constexpr, grad_h, grad_w: tl.constexpr, x_b, x_c: tl.constexpr, x_h, x_w: tl.constexpr,
        logits_b, logits_c: tl.constexpr, logits_h, logits_w: tl.constexpr,
        G, H, W, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, INT64: tl.constexpr,
        TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Gradient w.r.t. the logits (B, H, W, G, Kh * Kw): all taps of BLOCK_P positions at once, padded to TAPS."""
    image, head, top, left, columns, count = strip_of_program(tl.program_id(0), H, W, G, across, down, width, height)
    grad_ptr += image * grad_b
    x_ptr += image * x_b
    logits_ptr += image * logits_b
    tap = tl.arange(0, TAPS)
    u = offset(tap // Kw, Kh)
    v = offset(tap % Kw, Kw)
    channel = tl.arange(0, BLOCK_C)
    if INT64:
        channel = channel.to(tl.int64)
        u = u.to(tl.int64)
        v = v.to(tl.int64)
    grad_ptr += tl.cast(head * HEAD, tl.int64) * grad_c
    x_ptr += tl.cast(head * HEAD, tl.int64) * x_c
    logits_ptr += tl.cast(head * (Kh * Kw), tl.int64) * logits_c

    chunks = tl.cdiv(columns, BLOCK_P)
    for chunk in range(chunks * (count // columns)):
        row = (top + chunk // chunks).to(tl.int64)
        inner = chunk % chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        column = left + inner
        mask_p = inner < columns
        if INT64:
            column = column.to(tl.int64)
        inside = (mask_p[:, None] & ((tap < Kh * Kw) & within(row + u, H))[None, :]
                  & within(column[:, None] + v[None, :], W))
        grad_offs = grad_ptr + row * grad_h
        x_offs = x_ptr + row * x_h
        x_taps = (column * x_w)[:, None] + (u * x_h + v * x_w)[None, :]
        dw = tl.zeros((BLOCK_P, TAPS), tl.float32)
        for begin in range(0, HEAD, BLOCK_C):
            mask_c = begin + tl.arange(0, BLOCK_C) < HEAD
            grad = tl.load(grad_offs + ((column * grad_w)[:, None] + ((channel + begin) * grad_c)[None, :]),
                           mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            window = tl.load(x_offs + (x_taps[:, :, None] + ((channel + begin) * x_c)[None, None, :]),
                             mask=inside[:, :, None] & mask_c[None, None, :], other=0.0).to(tl.float32)
            dw += tl.sum(grad[:, None, :] * window, 2)

        index = ((image * H + row) * W + column) * G + head
        offs = index[:, None] * (Kh * Kw) + tap[None, :]
        stored = mask_p[:, None] & (tap < Kh * Kw)[None, :]
        if seed_ptr is not None:
            dw *= dropconnect_factor(offs, tl.load(seed_ptr), threshold, scale)
        if SOFTMAX:
            weight = tl.load(logits_ptr + row * logits_h + ((column * logits_w)[:, None] + (tap * logits_c)[None, :]),
                             mask=stored, other=float('-inf')).to(tl.float32)
            row_max = tl.load(stats_ptr + index * 2, mask=mask_p, other=0.0)
            norm = tl.load(stats_ptr + index * 2 + 1, mask=mask_p, other=0.0)
            weight = tl.exp2((weight - row_max[:, None]) * LOG2E) * norm[:, None]
            dw = weight * (dw - tl.sum(weight * dw, 1)[:, None])
        tl.store(out_ptr + offs, dw.to(out_ptr.dtype.element_ty), mask=stored)


def launch_fwd(
        x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, C, H, W) and the statistics (B, H, W, G, 2) of its softmaxes."""
    B, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    out = empty_channels_last(x)
    stats = empty_stats(x, G, softmax)
    if out.numel() == 0:
        return out, stats
    block_p, block_c = _blocks(C // G)
    tiles = G * cdiv(C // G, block_c)
    strip = strips(B, H, W, tiles, block_p)
    with on_device_of(x):
        _dynamicconv2d_fwd_kernel[B * strip.across * strip.down * tiles,](
            x, logits, bias, seed, out, stats, *x.stride(), *logits.stride(), *out.stride(), G, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            INT64=needs_int64(x, logits, out, stats), TAPS=next_power_of_2(Kw), BLOCK_P=block_p,
            BLOCK_C=block_c, **OPTIONS)
    return out, stats


def empty_stats(x: torch.Tensor, G: int, softmax: bool) -> torch.Tensor:
    """Uninitialised statistics (B, H, W, G, 2), or (0,) without a softmax."""
    B, _, H, W = x.shape
    return x.new_empty((B, H, W, G, 2) if softmax else (0,), dtype=torch.promote_types(x.dtype, torch.float32))


def _blocks(channels: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C) for heads of `channels` channels: up to 2,048 values, 16 for each thread of 4 warps."""
    block_c = channel_block(channels)
    return min(256, 2048 // block_c), block_c


def launch_bwd_input(
        grad: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> torch.Tensor:
    """Gradient w.r.t. x (B, C, H, W), in the dtype of grad."""
    B, C, H, W = grad.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    out = empty_channels_last(grad)
    if out.numel() == 0:
        return out
    block_p, block_c = _blocks(C // G)
    tiles = G * cdiv(C // G, block_c)
    strip = strips(B, H, W, tiles, block_p)
    with on_device_of(grad):
        _dynamicconv2d_bwd_input_kernel[B * strip.across * strip.down * tiles,](
            grad, logits, stats, seed, out, *grad.stride(), *logits.stride(), *out.stride(), G, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            INT64=needs_int64(grad, logits, out, stats), BLOCK_P=block_p,
            BLOCK_C=block_c, **OPTIONS)
    return out


def launch_bwd_logits(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> torch.Tensor:
    """Gradient w.r.t. the logits (B, G * Kh * Kw, H, W), channels_last, in their dtype."""
    B, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    out = empty_channels_last(logits)
    if x.numel() == 0:
        return out.zero_()
    taps = next_power_of_2(Kh * Kw)
    block_c = min(32, channel_block(C // G))
    block_p = min(32, next_power_of_2(W), max(1, 8192 // (taps * max(block_c, 8))))
    strip = strips(B, H, W, G, 64, block_p)
    with on_device_of(x):
        _dynamicconv2d_bwd_logits_kernel[B * strip.across * strip.down * G,](
            grad, x, logits, stats, seed, out, *grad.stride(), *x.stride(), *logits.stride(), G, H, W, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            INT64=needs_int64(grad, x, logits, out), TAPS=taps, BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return out
