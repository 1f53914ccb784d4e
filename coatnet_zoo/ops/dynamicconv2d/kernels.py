"""DynamicConv in Triton: forward, and a backward without atomics.

    aggregate     out[p, c] = bias[c] + sum_t w[p, t] x[p + off(t), c],     w = softmax_t(l)
    scatter_back  dx[p, c] = sum_t w[p - off(t), t] grad[p - off(t), c], gathered: nothing is added in memory
    logits_grad   dw[p, t] = sum_c grad[p, c] x[p + off(t), c];     dl = w (dw - sum_t w dw)

DropConnect multiplies w and dw by its factors. A program has one head, a tile of its channels and a strip of one image;
a tile is BLOCK_P positions by BLOCK_C channels, channels innermost, in float32. Taps read x and the logits again
through the caches; normalised weights never reach memory. Forward saves the maximum and the reciprocal of the sum of
each softmax, apart: their log-sum-exp would lose the digits that large logits need.

`band.py` does the same on tensor cores, with the same statistics, for the calls it covers.
"""
import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from ..band_ops import takes_band
from ..dropconnect import dropconnect_scale, threshold
from ..triton_ops import (
    OPTIONS,
    channel_block,
    dropconnect_factor,
    empty_channels_last,
    large,
    offset,
    on_device_of,
    positions_of_chunk,
    refuse,
    runs_triton,
    shift,
    strip_of_program,
    strips,
    within,
)
from . import band
from .eager import eager, shifted_sum, shifts

__all__ = ['triton']


@jit
def channels_of_head(tile, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """(head, channels (BLOCK_C,) of a tile, which exist)."""
    tiles: tl.constexpr = (HEAD + BLOCK_C - 1) // BLOCK_C
    head = tile // tiles
    inner = tile % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return head, head * HEAD + inner, inner < HEAD


@jit
def aggregate(
        x_ptr, logits_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr,
        x_b, x_c, x_h, x_w, logits_b, logits_c, logits_h, logits_w, out_b, out_c, out_h, out_w,
        G, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, LARGE: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Forward. stats (B, H, W, G, 2): maximum and reciprocal sum."""
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    head, channel, exists = channels_of_head(tile, HEAD, BLOCK_C)
    x_ptr += image * x_b
    out_ptr += image * out_b
    logits_ptr += image * logits_b
    before = image * H * W * G  # softmaxes of the images before this one
    stats_ptr += before * 2
    first = head * (Kh * Kw)
    if LARGE:
        channel = channel.to(tl.int64)
        head = head.to(tl.int64)
        first = first.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for start in range(0, count, BLOCK_P):
        row, column, here = positions_of_chunk(start, count, top, left, columns, LARGE, BLOCK_P)
        index = (row * W + column) * G + head
        logits = logits_ptr + (row * logits_h + column * logits_w)
        if SOFTMAX:
            most = tl.full((BLOCK_P,), float('-inf'), tl.float32)
            for tap in range(Kh * Kw):
                most = tl.maximum(most, tl.load(logits + (first + tap) * logits_c).to(tl.float32))
            total = tl.zeros((BLOCK_P,), tl.float32)
            for u in range(Kh):
                line = tl.zeros((BLOCK_P,), tl.float32)  # a sum of sums rounds less
                for v in range(Kw):
                    line += tl.exp(tl.load(logits + (first + (u * Kw + v)) * logits_c).to(tl.float32) - most)
                total += line
            tl.store(stats_ptr + index * 2, most, mask=here)
            tl.store(stats_ptr + index * 2 + 1, 1 / total, mask=here)
            # read back in the layout of acc: else the weights of each tap would pass through shared memory
            tl.debug_barrier()
            most = tl.load(stats_ptr + index * 2)
            total = tl.load(stats_ptr + index * 2 + 1)

        x_at = (row * x_h + column * x_w)[:, None] + (channel * x_c)[None, :]
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = offset(u, Kh)
            row_inside = within(row + dy, H)
            for v in range(Kw):
                dx = offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(x_ptr + shift(dy, dx, x_h, x_w) + x_at,
                                 mask=inside[:, None] & exists[None, :], other=0.0).to(tl.float32)
                weight = tl.load(logits + (first + (u * Kw + v)) * logits_c).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp(weight - most)
                if seed_ptr is not None:
                    weight *= dropconnect_factor((before + index) * (Kh * Kw) + (u * Kw + v), seed, threshold, scale)
                acc += weight[:, None] * window
        if SOFTMAX:
            acc *= total[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & exists[None, :])


@jit
def scatter_back(
        grad_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr,
        grad_b, grad_c, grad_h, grad_w, logits_b, logits_c, logits_h, logits_w, out_b, out_c, out_h, out_w,
        G, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, LARGE: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The gradient of x: each position asks the ones that looked at it for their weights."""
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    head, channel, exists = channels_of_head(tile, HEAD, BLOCK_C)
    grad_ptr += image * grad_b
    out_ptr += image * out_b
    logits_ptr += image * logits_b
    before = image * H * W * G  # softmaxes of the images before this one
    stats_ptr += before * 2
    first = head * (Kh * Kw)
    if LARGE:
        channel = channel.to(tl.int64)
        head = head.to(tl.int64)
        first = first.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for start in range(0, count, BLOCK_P):
        row, column, here = positions_of_chunk(start, count, top, left, columns, LARGE, BLOCK_P)
        grad_at = (row * grad_h + column * grad_w)[:, None] + (channel * grad_c)[None, :]
        logits_at = row * logits_h + column * logits_w + first * logits_c
        index = (row * W + column) * G + head
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = -offset(u, Kh)
            row_inside = within(row + dy, H)
            for v in range(Kw):
                dx = -offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(grad_ptr + shift(dy, dx, grad_h, grad_w) + grad_at,
                                 mask=inside[:, None] & exists[None, :], other=0.0).to(tl.float32)
                # outside the image any finite weight will do: what it weighs is zero there
                at_tap = shift(dy, dx, logits_h, logits_w) + tl.cast(u * Kw + v, tl.int64) * logits_c
                weight = tl.load(logits_ptr + at_tap + logits_at, mask=inside, other=0.0).to(tl.float32)
                away = shift(dy, dx, W * G, G)
                if SOFTMAX:
                    stats = stats_ptr + away * 2
                    most = tl.load(stats + index * 2, mask=inside, other=0.0)
                    weight = tl.exp(weight - most) * tl.load(stats + 1 + index * 2, mask=inside, other=0.0)
                if seed_ptr is not None:
                    there = before + away + index
                    weight *= dropconnect_factor(there * (Kh * Kw) + (u * Kw + v), seed, threshold, scale)
                acc += weight[:, None] * window
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & exists[None, :])


@jit
def logits_grad(
        grad_ptr, x_ptr, logits_ptr, stats_ptr, seed_ptr, out_ptr,
        grad_b, grad_c, grad_h, grad_w, x_b, x_c, x_h, x_w, logits_b, logits_c, logits_h, logits_w,
        G, H, W, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, LARGE: tl.constexpr,
        TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The gradient (B, H, W, G, Kh * Kw) of the logits: all TAPS taps of BLOCK_P positions at once."""
    image, head, top, left, columns, count = strip_of_program(tl.program_id(0), H, W, G, across, down, width, height)
    grad_ptr += image * grad_b
    x_ptr += image * x_b
    logits_ptr += image * logits_b
    tap = tl.arange(0, TAPS)
    u = offset(tap // Kw, Kh)
    v = offset(tap % Kw, Kw)
    channel = tl.arange(0, BLOCK_C)
    if LARGE:
        channel = channel.to(tl.int64)
        u = u.to(tl.int64)
        v = v.to(tl.int64)
    grad_ptr += tl.cast(head * HEAD, tl.int64) * grad_c
    x_ptr += tl.cast(head * HEAD, tl.int64) * x_c
    logits_ptr += tl.cast(head * (Kh * Kw), tl.int64) * logits_c

    pieces = tl.cdiv(columns, BLOCK_P)
    for piece in range(pieces * (count // columns)):
        row = (top + piece // pieces).to(tl.int64)
        inner = piece % pieces * BLOCK_P + tl.arange(0, BLOCK_P)
        column = left + inner
        here = inner < columns
        if LARGE:
            column = column.to(tl.int64)
        inside = (here[:, None] & ((tap < Kh * Kw) & within(row + u, H))[None, :]
                  & within(column[:, None] + v[None, :], W))
        grad_at = grad_ptr + row * grad_h
        x_at = x_ptr + row * x_h
        x_taps = (column * x_w)[:, None] + (u * x_h + v * x_w)[None, :]
        dw = tl.zeros((BLOCK_P, TAPS), tl.float32)
        for begin in range(0, HEAD, BLOCK_C):
            exists = begin + tl.arange(0, BLOCK_C) < HEAD
            grad = tl.load(grad_at + ((column * grad_w)[:, None] + ((channel + begin) * grad_c)[None, :]),
                           mask=here[:, None] & exists[None, :], other=0.0).to(tl.float32)
            window = tl.load(x_at + (x_taps[:, :, None] + ((channel + begin) * x_c)[None, None, :]),
                             mask=inside[:, :, None] & exists[None, None, :], other=0.0).to(tl.float32)
            dw += tl.sum(grad[:, None, :] * window, 2)

        index = ((image * H + row) * W + column) * G + head
        place = index[:, None] * (Kh * Kw) + tap[None, :]
        stored = here[:, None] & (tap < Kh * Kw)[None, :]
        if seed_ptr is not None:
            dw *= dropconnect_factor(place, tl.load(seed_ptr), threshold, scale)
        if SOFTMAX:
            weight = tl.load(logits_ptr + row * logits_h + ((column * logits_w)[:, None] + (tap * logits_c)[None, :]),
                             mask=stored, other=float('-inf')).to(tl.float32)
            most = tl.load(stats_ptr + index * 2, mask=here, other=0.0)
            total = tl.load(stats_ptr + index * 2 + 1, mask=here, other=0.0)
            weight = tl.exp(weight - most[:, None]) * total[:, None]
            dw = weight * (dw - tl.sum(weight * dw, 1)[:, None])
        tl.store(out_ptr + place, dw.to(out_ptr.dtype.element_ty), mask=stored)


def launch_aggregate(
        x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, C, H, W) and the statistics (B, H, W, G, 2) of its softmaxes."""
    B, C, H, W = x.shape
    Kh, Kw = kernel
    G = logits.shape[1] // (Kh * Kw)
    out = empty_channels_last(x)
    stats = _empty_stats(x, G, softmax)
    if out.numel() == 0:
        return out, stats
    block_p, block_c = _blocks(C // G)
    tiles = G * cdiv(C // G, block_c)
    strip = strips(B, H, W, tiles, block_p)
    with on_device_of(x):
        aggregate[B * strip.across * strip.down * tiles,](
            x, logits, bias, seed, out, stats, *x.stride(), *logits.stride(), *out.stride(), G, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            LARGE=large(x, logits, out, stats), BLOCK_P=block_p,
            BLOCK_C=block_c, **OPTIONS)
    return out, stats


def _empty_stats(x: torch.Tensor, G: int, softmax: bool) -> torch.Tensor:
    B, _, H, W = x.shape
    return x.new_empty((B, H, W, G, 2) if softmax else (0,), dtype=torch.promote_types(x.dtype, torch.float32))


def _blocks(channels: int) -> tuple[int, int]:
    """Positions and channels of a tile in a head of that many channels: 16 values a thread of 4 warps."""
    block_c = channel_block(channels)
    return min(256, 2048 // block_c), block_c


def launch_scatter_back(
        grad: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> torch.Tensor:
    """The gradient (B, C, H, W) of x, in the dtype of grad."""
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
        scatter_back[B * strip.across * strip.down * tiles,](
            grad, logits, stats, seed, out, *grad.stride(), *logits.stride(), *out.stride(), G, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            LARGE=large(grad, logits, out, stats), BLOCK_P=block_p,
            BLOCK_C=block_c, **OPTIONS)
    return out


def launch_logits_grad(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool) -> torch.Tensor:
    """The gradient (B, G * Kh * Kw, H, W), channels_last, in the dtype of logits."""
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
        logits_grad[B * strip.across * strip.down * G,](
            grad, x, logits, stats, seed, out, *grad.stride(), *x.stride(), *logits.stride(), G, H, W, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            LARGE=large(grad, x, logits, out), TAPS=taps, BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return out


@torch.library.custom_op('coatnet_zoo::dynamicconv2d', mutates_args=())
def dynamicconv2d(
        x: torch.Tensor, logits: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None, seed: torch.Tensor | None,
        dropconnect: float, softmax: bool, kernels: str = 'auto') -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, C, H, W), channels_last, and statistics for the backward, which are no function to differentiate.

    On a CPU without the interpreter through eager.
    """
    if runs_triton(x):
        on_tensor_cores = takes_band('dynamicconv2d', kernels, band.why_not(x, logits, (Kh, Kw)))
        launch = band.launch_fwd if on_tensor_cores else launch_aggregate
        return launch(x, logits, (Kh, Kw), bias, seed, dropconnect, softmax)
    out = eager(x, logits, (Kh, Kw), bias, 'softmax' if softmax else 'none', dropconnect, seed)
    stats = _empty_stats(x, logits.shape[1] // (Kh * Kw), softmax)
    if softmax and logits.numel():
        taps = _taps(logits, Kh * Kw, stats.dtype)
        most = taps.amax(-1)
        stats = torch.stack((most, 1 / (taps - most[..., None]).exp().sum(-1)), -1)
    return empty_channels_last(x).copy_(out), stats


@torch.library.custom_op('coatnet_zoo::dynamicconv2d_backward', mutates_args=())
def dynamicconv2d_backward(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, Kh: int, Kw: int, bias: torch.Tensor | None,
        stats: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool],
        kernels: str = 'auto',
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, logits and bias, each in its dtype; what is not `needed` comes back with no elements."""
    grad_x, grad_logits, grad_bias = x.new_empty(0), logits.new_empty(0), x.new_empty(0)
    if runs_triton(x):
        on_tensor_cores = takes_band('dynamicconv2d', kernels, band.why_not(x, logits, (Kh, Kw)))
        if needed[0]:
            launch = band.launch_bwd_input if on_tensor_cores else launch_scatter_back
            grad_x = launch(grad, logits, (Kh, Kw), stats, seed, dropconnect, softmax)
        if needed[1]:
            launch = band.launch_bwd_logits if on_tensor_cores else launch_logits_grad
            grad_logits = launch(grad, x, logits, (Kh, Kw), stats, seed, dropconnect, softmax)
    elif needed[0] or needed[1]:
        grad_x, grad_logits = _gradients_in_torch(grad, x, logits, (Kh, Kw), stats, seed, dropconnect, softmax, needed)
    if needed[2]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(bias.dtype)
    return grad_x, grad_logits, grad_bias


def _taps(logits: torch.Tensor, taps: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, G * taps, H, W) as (B, H, W, G, taps)."""
    B, channels, H, W = logits.shape
    return logits.permute(0, 2, 3, 1).reshape(B, H, W, channels // taps, taps).to(dtype)


def _gradients_in_torch(
        grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, kernel: tuple[int, int], stats: torch.Tensor,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and logits in torch operators."""
    B, C, H, W = x.shape
    Kh, Kw = kernel
    dtype = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)
    plain = _taps(logits, Kh * Kw, dtype)
    G = plain.shape[3]
    if softmax:
        plain = (plain - stats[..., :1]).exp() * stats[..., 1:]
    factors = torch.ones((), dtype=dtype, device=x.device)
    if seed is not None:
        factors = dropconnect_scale(seed, plain.numel(), dropconnect, dtype).view(plain.shape)
    heads, gradient = (t.permute(0, 2, 3, 1).reshape(B, H, W, G, C // G).to(dtype) for t in (x, grad))

    grad_x, grad_logits = x.new_empty(0), logits.new_empty(0)
    if needed[0]:
        around = torch.nn.functional.pad(plain * factors, [0, 0, 0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2]).flip(-1)
        opposite = [around[:, tap // Kw:tap // Kw + H, tap % Kw:tap % Kw + W, :, tap] for tap in range(Kh * Kw)]
        total = shifted_sum(gradient, opposite, kernel).reshape(B, H, W, C)
        grad_x = empty_channels_last(x).copy_(total.permute(0, 3, 1, 2))
    if needed[1]:
        taps = torch.stack([(gradient * window).sum(-1) for window in shifts(heads, kernel)], -1) * factors
        if softmax:
            taps = plain * (taps - (plain * taps).sum(-1, keepdim=True))
        grad_logits = empty_channels_last(logits).copy_(taps.reshape(B, H, W, -1).permute(0, 3, 1, 2))
    return grad_x, grad_logits


@dynamicconv2d.register_fake
def _(x, logits, Kh, Kw, bias, seed, dropconnect, softmax, kernels='auto'):
    return empty_channels_last(x), _empty_stats(x, logits.shape[1] // (Kh * Kw), softmax)


@dynamicconv2d_backward.register_fake
def _(grad, x, logits, Kh, Kw, bias, stats, seed, dropconnect, softmax, needed, kernels='auto'):
    return (empty_channels_last(x) if needed[0] else x.new_empty(0),
            empty_channels_last(logits) if needed[1] else logits.new_empty(0),
            bias.new_empty(bias.shape) if needed[2] else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, logits, ctx.Kh, ctx.Kw, bias, seed, ctx.dropconnect, ctx.softmax, ctx.kernels = inputs
    ctx.save_for_backward(x, logits, bias, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the statistics


def _backward(ctx, grad: torch.Tensor | None, _):
    if grad is None:
        return (None,) * 9
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    x, logits, bias, stats, seed = ctx.saved_tensors
    grad_x, grad_logits, grad_bias = dynamicconv2d_backward(
        grad, x, logits, ctx.Kh, ctx.Kw, bias, stats, seed, ctx.dropconnect, ctx.softmax, needed,
        ctx.kernels)
    return (grad_x if needed[0] else None, grad_logits if needed[1] else None, None, None,
            grad_bias if needed[2] else None, None, None, None, None)


dynamicconv2d.register_autograd(_backward, setup_context=_save)
dynamicconv2d_backward.register_autograd(refuse('double backward', 'dynamicconv2d'))
dynamicconv2d.register_vmap(refuse('vmap', 'dynamicconv2d'))
dynamicconv2d_backward.register_vmap(refuse('vmap', 'dynamicconv2d'))


def triton(
        x: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
        kernels: str = 'auto',
) -> torch.Tensor:
    """(B, C, H, W), (B, G * Kh * Kw, H, W) -> (B, C, H, W), channels_last; a seed switches DropConnect on.

    kernels: 'auto', or one of 'band' and 'direct' to force the kernels of one file.
    """
    Kh, Kw = kernel_size
    bias = bias if bias is None else bias.contiguous()  # read without a stride
    out, _ = dynamicconv2d(x, logits, Kh, Kw, bias, seed, float(dropconnect), normalize == 'softmax', kernels)
    return out
