"""LightConv in Triton without tensor cores: 16- and 32-bit, any layout and head width, kernels up to 31 x 31.

    fwd                 out[p, c] = bias[c] + sum_t w[g, t] x[p + off(t), c]; with negated offsets, dx from grad
    bwd_weight_partial  partial[s, c, t] = sum_{p in split s} grad[p, c] x[p + off(t), c]
    bwd_weight_reduce   their sum over splits and channels of a head, through DropConnect and the softmax

A tile is BLOCK_P positions by BLOCK_C channels, channels innermost, in float32. Each tap loads x again, through the
caches. Heads of at least 16 channels have tiles of their own, so that the weight of a tap is a scalar (ONE_HEAD);
narrower heads share tiles, and the weight is a vector over channels. The kernels compute the softmax of the weights.
"""
import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from ..band_ops import LOG2E
from ..dropconnect import threshold
from ..triton_ops import (
    ENOUGH_PROGRAMS,
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

__all__ = ['launch_bwd_weight', 'launch_fwd', 'reduce_weight_grad']

SCRATCH = 1 << 20  # float32 elements of partial weight gradients, 4 MB
SUMMED = 32  # partial weight gradients that one program sums


@jit
def channels_of_tile(tile, C, HEAD: tl.constexpr, ONE_HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """(channels (BLOCK_C,), mask of those that exist, heads) of a tile; heads: scalar if ONE_HEAD, else (BLOCK_C,)."""
    if ONE_HEAD:
        tiles: tl.constexpr = (HEAD + BLOCK_C - 1) // BLOCK_C
        head = tile // tiles
        inner = tile % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        return head * HEAD + inner, inner < HEAD, head
    else:
        channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        return channel, channel < C, tl.minimum(channel, C - 1) // HEAD


@jit
def _lightconv2d_fwd_kernel(
        x_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr,
        x_b, x_c: tl.constexpr, x_h, x_w: tl.constexpr, weight_g, weight_u: tl.constexpr, weight_v: tl.constexpr,
        out_b, out_c: tl.constexpr, out_h, out_w: tl.constexpr,
        C, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, TRANSPOSED: tl.constexpr,
        ONE_HEAD: tl.constexpr, INT64: tl.constexpr, TAPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Output, or if TRANSPOSED the gradient w.r.t. x, of one strip and one channel tile.

    TAPS: Kh * Kw rounded up to a power of two.
    """
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    channel, mask_c, head = channels_of_tile(tile, C, HEAD, ONE_HEAD, BLOCK_C)
    x_ptr += image * x_b
    out_ptr += image * out_b
    weight_ptr += head * weight_g
    if INT64:
        channel = channel.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        first = (head * (Kh * Kw)).to(tl.int64)

    if SOFTMAX:
        if ONE_HEAD:
            tap = tl.arange(0, TAPS)
            logits = tl.load(weight_ptr + tap // Kw * weight_u + tap % Kw * weight_v,
                             mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
            row_max = tl.max(logits, 0)
            row_sum = tl.sum(tl.exp2((logits - row_max) * LOG2E), 0)
        else:
            row_max = tl.full((BLOCK_C,), float('-inf'), tl.float32)
            for tap in range(Kh * Kw):
                logits = tl.load(weight_ptr + tap // Kw * weight_u + tap % Kw * weight_v).to(tl.float32)
                row_max = tl.maximum(row_max, logits)
            row_sum = tl.zeros((BLOCK_C,), tl.float32)
            for u in range(Kh):
                partial_sum = tl.zeros((BLOCK_C,), tl.float32)  # a sum of sums rounds less
                for v in range(Kw):
                    logit = tl.load(weight_ptr + u * weight_u + v * weight_v).to(tl.float32)
                    partial_sum += tl.exp2((logit - row_max) * LOG2E)
                row_sum += partial_sum

    for start in range(0, count, BLOCK_P):
        row, column, mask_p = positions_of_chunk(start, count, top, left, columns, INT64, BLOCK_P)
        x_offs = x_ptr + ((row * x_h + column * x_w)[:, None] + (channel * x_c)[None, :])
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = -offset(u, Kh) if TRANSPOSED else offset(u, Kh)
            row_inside = within(row + dy, H)
            # unrolled, so that the loads of several taps are in flight together
            for v in tl.range(0, Kw, loop_unroll_factor=UNROLL):
                dx = -offset(v, Kw) if TRANSPOSED else offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(x_offs + shift(dy, dx, x_h, x_w),
                                 mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + u * weight_u + v * weight_v).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp2((weight - row_max) * LOG2E)
                if seed_ptr is not None:
                    weight *= dropconnect_factor(first + (u * Kw + v), seed, threshold, scale)
                acc += weight * window
        if SOFTMAX:
            acc = acc / row_sum
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])


@jit
def _lightconv2d_bwd_weight_partial_kernel(
        x_ptr, grad_ptr, partial_ptr, x_b, x_c: tl.constexpr, x_h, x_w: tl.constexpr, grad_b, grad_c: tl.constexpr,
        grad_h, grad_w: tl.constexpr, C, H, W, tiles, groups, rows, chunks, share, chunks_per_row,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, ONE_HEAD: tl.constexpr, INT64: tl.constexpr,
        TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """partial (splits, rows, Kh * Kw); a program computes one split, one group of TAPS taps and one channel tile.

    A row of partial is a channel tile, summed over its channels (ONE_HEAD), or a single channel. A row of an image is
    divided into `chunks_per_row` chunks of BLOCK_P positions. Of all `chunks`, a split has `share`.
    """
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles % groups
    split = program // tiles // groups
    channel, mask_c, _ = channels_of_tile(tile, C, HEAD, ONE_HEAD, BLOCK_C)
    tap = group * TAPS + tl.arange(0, TAPS)
    u = offset(tap // Kw, Kh)
    v = offset(tap % Kw, Kw)
    if INT64:
        channel = channel.to(tl.int64)
        u = u.to(tl.int64)
        v = v.to(tl.int64)
    x_offs = (u * x_h + v * x_w)[:, None] + (channel * x_c)[None, :]

    acc = tl.zeros((TAPS, BLOCK_C), tl.float32)
    begin = split * share
    for chunk in range(begin, tl.minimum(begin + share, chunks)):
        image_row = chunk // chunks_per_row
        image = (image_row // H).to(tl.int64)
        row = image_row % H
        column = chunk % chunks_per_row * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = column < W
        if INT64:
            row = row.to(tl.int64)
            column = column.to(tl.int64)
        grad = tl.load(grad_ptr + (image * grad_b + row * grad_h)
                       + ((column * grad_w)[:, None] + (channel * grad_c)[None, :]),
                       mask=mask_p[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        inside = ((tap < Kh * Kw) & within(row + u, H))[None, :] & mask_p[:, None]
        inside = inside & within(column[:, None] + v[None, :], W)
        window = tl.load(x_ptr + (image * x_b + row * x_h) + ((column * x_w)[:, None, None] + x_offs[None, :, :]),
                         mask=inside[:, :, None] & mask_c[None, None, :], other=0.0).to(tl.float32)
        acc += tl.sum(grad[:, None, :] * window, 0)

    partial_ptr += split * rows * (Kh * Kw)  # int32: at most SCRATCH
    if ONE_HEAD:
        tl.store(partial_ptr + tile * (Kh * Kw) + tap, tl.sum(acc, 1), mask=tap < Kh * Kw)
    else:
        tl.store(partial_ptr + channel[None, :] * (Kh * Kw) + tap[:, None], acc,
                 mask=(tap < Kh * Kw)[:, None] & mask_c[None, :])


@jit
def _lightconv2d_bwd_weight_sum_kernel(
        partial_ptr, out_ptr, parts, columns, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """out (groups, columns): sums over PARTS of the rows of partial (parts, columns)."""
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(partial_ptr + part.to(tl.int64)[:, None] * columns + column[None, :],
                     mask=(part < parts)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * columns + column, tl.sum(values, 0), mask=column < columns)


@jit
def _lightconv2d_bwd_weight_reduce_kernel(
        partial_ptr, weight_ptr, seed_ptr, out_ptr, weight_g, weight_u, weight_v, splits, G, per_head, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, SOFTMAX: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):
    """out (G, Kh * Kw) from partial (splits, G * per_head, Kh * Kw): sum, DropConnect, softmax; one head a program."""
    head = tl.program_id(0)
    tap = tl.arange(0, TAPS)
    acc = tl.zeros((BLOCK, TAPS), tl.float32)
    for start in range(0, splits * per_head, BLOCK):
        row = start + tl.arange(0, BLOCK)
        offs = (row // per_head * G + head) * per_head + row % per_head
        acc += tl.load(partial_ptr + offs[:, None] * (Kh * Kw) + tap[None, :],
                       mask=(row < splits * per_head)[:, None] & (tap < Kh * Kw)[None, :], other=0.0)
    grad = tl.sum(acc, 0)
    if seed_ptr is not None:
        grad *= dropconnect_factor((head * (Kh * Kw) + tap).to(tl.int64), tl.load(seed_ptr), threshold, scale)
    if SOFTMAX:
        logits = tl.load(weight_ptr + head * weight_g + tap // Kw * weight_u + tap % Kw * weight_v,
                         mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
        weight = tl.exp2((logits - tl.max(logits, 0)) * LOG2E)
        weight = weight / tl.sum(weight, 0)
        grad = weight * (grad - tl.sum(weight * grad, 0))
    tl.store(out_ptr + head * (Kh * Kw) + tap, grad.to(out_ptr.dtype.element_ty), mask=tap < Kh * Kw)


def launch_fwd(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool, transposed: bool) -> torch.Tensor:
    """Output (B, C, H, W); with `transposed`, the gradient w.r.t. x, where `x` is that w.r.t. the output."""
    B, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    out = empty_channels_last(x)
    if out.numel() == 0:
        return out
    one_head = C // G >= 16
    block_c = channel_block(C // G) if one_head else min(32, next_power_of_2(C))
    block_p = 2048 // block_c if block_c >= 8 else 256
    tiles = G * cdiv(C // G, block_c) if one_head else cdiv(C, block_c)
    strip = strips(B, H, W, tiles, block_p)
    with on_device_of(x):
        _lightconv2d_fwd_kernel[B * strip.across * strip.down * tiles,](
            x, weight, bias, seed, out, *x.stride(), *weight.stride(), *out.stride(), C, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            TRANSPOSED=transposed, ONE_HEAD=one_head, INT64=needs_int64(x, out), TAPS=next_power_of_2(Kh * Kw),
            UNROLL=Kw if Kw * x.element_size() <= 14 else 4, BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return out


def launch_bwd_weight(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool) -> torch.Tensor:
    """Gradient w.r.t. the weight (G, Kh, Kw), in its dtype: partial sums over splits of positions, then their sum."""
    B, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    if x.numel() == 0:
        return torch.zeros((G, Kh, Kw), dtype=weight.dtype, device=x.device)
    one_head = C // G >= 16
    block_c = min(32, channel_block(C // G) if one_head else next_power_of_2(C))
    taps = min(64, next_power_of_2(Kh * Kw))
    block_p = min(next_power_of_2(W), max(1, 8192 // (taps * max(block_c, 8))))
    per_head = cdiv(C // G, block_c) if one_head else C // G
    tiles = G * per_head if one_head else cdiv(C, block_c)
    groups = cdiv(Kh * Kw, taps)
    chunks_per_row = cdiv(W, block_p)
    chunks = B * H * chunks_per_row
    splits = min(cdiv(ENOUGH_PROGRAMS, tiles * groups), SCRATCH // (G * per_head * Kh * Kw), cdiv(chunks, 4))
    share = cdiv(chunks, max(1, splits))
    splits = cdiv(chunks, share)
    partial = torch.empty((splits, G * per_head, Kh * Kw), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _lightconv2d_bwd_weight_partial_kernel[splits * groups * tiles,](
            x, grad, partial, *x.stride(), *grad.stride(), C, H, W, tiles, groups, G * per_head, chunks, share,
            chunks_per_row, Kh=Kh, Kw=Kw, HEAD=C // G, ONE_HEAD=one_head, INT64=needs_int64(x, grad), TAPS=taps,
            BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return reduce_weight_grad(partial, weight, seed, dropconnect, softmax, per_head)


def reduce_weight_grad(
        partial: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool,
        per_head: int) -> torch.Tensor:
    """Gradient w.r.t. the weight (G, Kh, Kw), in its dtype, from partial sums (parts, G * per_head, Kh * Kw).

    Many programs sum groups of SUMMED parts until at most SUMMED are left; one program a head sums these.
    """
    G, Kh, Kw = weight.shape
    with on_device_of(weight):
        while len(partial) > SUMMED:
            parts, columns = len(partial), partial[0].numel()
            sums = partial.new_empty((cdiv(parts, SUMMED), *partial.shape[1:]))
            _lightconv2d_bwd_weight_sum_kernel[cdiv(columns, 64), len(sums)](
                partial, sums, parts, columns, PARTS=SUMMED, BLOCK=64, **OPTIONS)
            partial = sums
    out = torch.empty((G, Kh, Kw), dtype=weight.dtype, device=weight.device)
    taps = next_power_of_2(Kh * Kw)
    with on_device_of(weight):
        _lightconv2d_bwd_weight_reduce_kernel[G,](
            partial, weight, seed, out, *weight.stride(), len(partial), G, per_head, threshold(dropconnect),
            1 / (1 - dropconnect), Kh=Kh, Kw=Kw, SOFTMAX=softmax, TAPS=taps, BLOCK=max(1, 4096 // taps), **OPTIONS)
    return out
