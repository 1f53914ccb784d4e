"""LightConv in Triton: forward, and a backward without atomics.

    correlate     out[p, c] = bias[c] + sum_t w[g, t] x[p + off(t), c]; with the offsets negated it is dx from g
    tap_sums      partial[s, c, t] = sum_{p in split s} grad[p, c] x[p + off(t), c]
    weight_grad   their sum over splits and channels of a head, through DropConnect and the softmax

A tile is BLOCK_P positions by BLOCK_C channels, channels innermost, in float32; taps read x again through the caches.
Heads of 16 channels on get tiles of their own, so that a weight is one number a tap (ONE_HEAD); smaller heads share
tiles and a weight is a vector over channels. The softmax is taken in the kernels from the raw weights.

`band.py` does the same on tensor cores for the calls it covers.
"""
import torch
import triton.language as tl
from torch.nn.grad import conv2d_weight
from triton import cdiv, jit, next_power_of_2

from ..band_ops import takes_band, why_not
from ..dropconnect import dropconnect_scale, threshold
from ..triton_ops import (
    ENOUGH_PROGRAMS,
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
from .eager import eager

__all__ = ['triton']

SCRATCH = 1 << 20  # float32 elements of partial weight gradients, 4 MB


@jit
def channels_of_tile(tile, C, HEAD: tl.constexpr, ONE_HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels (BLOCK_C,), which exist, and their heads: one number or (BLOCK_C,)."""
    if ONE_HEAD:
        tiles: tl.constexpr = (HEAD + BLOCK_C - 1) // BLOCK_C
        head = tile // tiles
        inner = tile % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        return head * HEAD + inner, inner < HEAD, head
    else:
        channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        return channel, channel < C, tl.minimum(channel, C - 1) // HEAD


@jit
def correlate(
        x_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr,
        x_b, x_c, x_h, x_w, weight_g, weight_u, weight_v, out_b, out_c, out_h, out_w,
        C, H, W, tiles, across, down, width, height, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr, TRANSPOSED: tl.constexpr,
        ONE_HEAD: tl.constexpr, LARGE: tl.constexpr, TAPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """One strip of one image by one tile of channels; TAPS is the power of two from Kh * Kw on."""
    image, tile, top, left, columns, count = strip_of_program(
        tl.program_id(0), H, W, tiles, across, down, width, height)
    channel, exists, head = channels_of_tile(tile, C, HEAD, ONE_HEAD, BLOCK_C)
    x_ptr += image * x_b
    out_ptr += image * out_b
    weight_ptr += head * weight_g
    if LARGE:
        channel = channel.to(tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        first = (head * (Kh * Kw)).to(tl.int64)

    if SOFTMAX:
        if ONE_HEAD:
            tap = tl.arange(0, TAPS)
            logits = tl.load(weight_ptr + tap // Kw * weight_u + tap % Kw * weight_v,
                             mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
            most = tl.max(logits, 0)
            total = tl.sum(tl.exp(logits - most), 0)
        else:
            most = tl.full((BLOCK_C,), float('-inf'), tl.float32)
            for tap in range(Kh * Kw):
                most = tl.maximum(most, tl.load(weight_ptr + tap // Kw * weight_u + tap % Kw * weight_v).to(tl.float32))
            total = tl.zeros((BLOCK_C,), tl.float32)
            for u in range(Kh):
                line = tl.zeros((BLOCK_C,), tl.float32)  # a sum of sums rounds less
                for v in range(Kw):
                    line += tl.exp(tl.load(weight_ptr + u * weight_u + v * weight_v).to(tl.float32) - most)
                total += line

    for start in range(0, count, BLOCK_P):
        row, column, here = positions_of_chunk(start, count, top, left, columns, LARGE, BLOCK_P)
        x_at = (row * x_h + column * x_w)[:, None] + (channel * x_c)[None, :]
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for u in range(Kh):
            dy = -offset(u, Kh) if TRANSPOSED else offset(u, Kh)
            row_inside = within(row + dy, H)
            # unrolled, so that the loads of several taps are in flight together
            for v in tl.range(0, Kw, loop_unroll_factor=UNROLL):
                dx = -offset(v, Kw) if TRANSPOSED else offset(v, Kw)
                inside = row_inside & within(column + dx, W)
                window = tl.load(x_ptr + shift(dy, dx, x_h, x_w) + x_at,
                                 mask=inside[:, None] & exists[None, :], other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + u * weight_u + v * weight_v).to(tl.float32)
                if SOFTMAX:
                    weight = tl.exp(weight - most)
                if seed_ptr is not None:
                    weight *= dropconnect_factor(first + (u * Kw + v), seed, threshold, scale)
                acc += weight * window
        if SOFTMAX:
            acc = acc / total
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + (row * out_h + column * out_w)[:, None] + (channel * out_c)[None, :],
                 acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & exists[None, :])


@jit
def tap_sums(
        x_ptr, grad_ptr, partial_ptr, x_b, x_c, x_h, x_w, grad_b, grad_c, grad_h, grad_w,
        C, H, W, tiles, groups, rows, total, share, pieces,
        Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, ONE_HEAD: tl.constexpr, LARGE: tl.constexpr,
        TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """partial (splits, rows, Kh * Kw) over a split, a group of TAPS taps and a tile of channels.

    A row of partial is a tile of channels, already summed (ONE_HEAD), or a channel. A line of an image falls into
    `pieces` of BLOCK_P positions, `total` in all, of which a split has `share`.
    """
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles % groups
    split = program // tiles // groups
    channel, exists, _ = channels_of_tile(tile, C, HEAD, ONE_HEAD, BLOCK_C)
    tap = group * TAPS + tl.arange(0, TAPS)
    u = offset(tap // Kw, Kh)
    v = offset(tap % Kw, Kw)
    if LARGE:
        channel = channel.to(tl.int64)
        u = u.to(tl.int64)
        v = v.to(tl.int64)
    x_at = (u * x_h + v * x_w)[:, None] + (channel * x_c)[None, :]

    acc = tl.zeros((TAPS, BLOCK_C), tl.float32)
    begin = split * share
    for piece in range(begin, tl.minimum(begin + share, total)):
        line = piece // pieces
        image = (line // H).to(tl.int64)
        row = line % H
        column = piece % pieces * BLOCK_P + tl.arange(0, BLOCK_P)
        here = column < W
        if LARGE:
            row = row.to(tl.int64)
            column = column.to(tl.int64)
        grad = tl.load(grad_ptr + (image * grad_b + row * grad_h)
                       + ((column * grad_w)[:, None] + (channel * grad_c)[None, :]),
                       mask=here[:, None] & exists[None, :], other=0.0).to(tl.float32)
        inside = ((tap < Kh * Kw) & within(row + u, H))[None, :] & here[:, None]
        inside = inside & within(column[:, None] + v[None, :], W)
        window = tl.load(x_ptr + (image * x_b + row * x_h) + ((column * x_w)[:, None, None] + x_at[None, :, :]),
                         mask=inside[:, :, None] & exists[None, None, :], other=0.0).to(tl.float32)
        acc += tl.sum(grad[:, None, :] * window, 0)

    partial_ptr += split * rows * (Kh * Kw)  # below SCRATCH
    if ONE_HEAD:
        tl.store(partial_ptr + tile * (Kh * Kw) + tap, tl.sum(acc, 1), mask=tap < Kh * Kw)
    else:
        tl.store(partial_ptr + channel[None, :] * (Kh * Kw) + tap[:, None], acc,
                 mask=(tap < Kh * Kw)[:, None] & exists[None, :])


@jit
def weight_grad(
        partial_ptr, weight_ptr, seed_ptr, out_ptr, weight_g, weight_u, weight_v, splits, G, per_head, threshold, scale,
        Kh: tl.constexpr, Kw: tl.constexpr, SOFTMAX: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):
    """out (G, Kh * Kw) from partial (splits, G * per_head, Kh * Kw), one head a program."""
    head = tl.program_id(0)
    tap = tl.arange(0, TAPS)
    acc = tl.zeros((BLOCK, TAPS), tl.float32)
    for start in range(0, splits * per_head, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = (row // per_head * G + head) * per_head + row % per_head
        acc += tl.load(partial_ptr + place[:, None] * (Kh * Kw) + tap[None, :],
                       mask=(row < splits * per_head)[:, None] & (tap < Kh * Kw)[None, :], other=0.0)
    grad = tl.sum(acc, 0)
    if seed_ptr is not None:
        grad *= dropconnect_factor((head * (Kh * Kw) + tap).to(tl.int64), tl.load(seed_ptr), threshold, scale)
    if SOFTMAX:
        logits = tl.load(weight_ptr + head * weight_g + tap // Kw * weight_u + tap % Kw * weight_v,
                         mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
        weight = tl.exp(logits - tl.max(logits, 0))
        weight = weight / tl.sum(weight, 0)
        grad = weight * (grad - tl.sum(weight * grad, 0))
    tl.store(out_ptr + head * (Kh * Kw) + tap, grad.to(out_ptr.dtype.element_ty), mask=tap < Kh * Kw)


def launch_correlate(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool, transposed: bool) -> torch.Tensor:
    """Forward, or with `transposed` the gradient of x from that of the output."""
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
        correlate[B * strip.across * strip.down * tiles,](
            x, weight, bias, seed, out, *x.stride(), *weight.stride(), *out.stride(), C, H, W, tiles, *strip,
            threshold(dropconnect), 1 / (1 - dropconnect), Kh=Kh, Kw=Kw, HEAD=C // G, SOFTMAX=softmax,
            TRANSPOSED=transposed, ONE_HEAD=one_head, LARGE=large(x, out), TAPS=next_power_of_2(Kh * Kw),
            UNROLL=Kw if Kw * x.element_size() <= 14 else 4, BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return out


def launch_weight_grad(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool) -> torch.Tensor:
    """(G, Kh, Kw) in the dtype of weight: sums of splits of the positions, then one program a head."""
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
    pieces = cdiv(W, block_p)
    total = B * H * pieces
    splits = min(cdiv(ENOUGH_PROGRAMS, tiles * groups), SCRATCH // (G * per_head * Kh * Kw), cdiv(total, 4))
    share = cdiv(total, max(1, splits))
    splits = cdiv(total, share)
    partial = torch.empty((splits, G * per_head, Kh * Kw), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        tap_sums[splits * groups * tiles,](
            x, grad, partial, *x.stride(), *grad.stride(), C, H, W, tiles, groups, G * per_head, total, share,
            pieces, Kh=Kh, Kw=Kw, HEAD=C // G, ONE_HEAD=one_head, LARGE=large(x, grad), TAPS=taps,
            BLOCK_P=block_p, BLOCK_C=block_c, **OPTIONS)
    return finish_weight_grad(partial, weight, seed, dropconnect, softmax, per_head)


def finish_weight_grad(
        partial: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool,
        per_head: int) -> torch.Tensor:
    """(G, Kh, Kw) in the dtype of weight from partial sums (parts, G * per_head, Kh * Kw)."""
    G, Kh, Kw = weight.shape
    out = torch.empty((G, Kh, Kw), dtype=weight.dtype, device=weight.device)
    taps = next_power_of_2(Kh * Kw)
    with on_device_of(weight):
        weight_grad[G,](
            partial, weight, seed, out, *weight.stride(), len(partial), G, per_head, threshold(dropconnect),
            1 / (1 - dropconnect), Kh=Kh, Kw=Kw, SOFTMAX=softmax, TAPS=taps, BLOCK=max(1, 4096 // taps), **OPTIONS)
    return out


def launch_band_weight_grad(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool) -> torch.Tensor:
    """`launch_weight_grad` on tensor cores."""
    G, Kh, Kw = weight.shape
    if x.numel() == 0:
        return torch.zeros((G, Kh, Kw), dtype=weight.dtype, device=x.device)
    return finish_weight_grad(band.launch_bwd_weight(grad, x, (Kh, Kw), G), weight, seed, dropconnect, softmax, 1)


def on_tensor_cores(x: torch.Tensor, weight: torch.Tensor, kernels: str) -> bool:
    """Whether the kernels of `band.py` run, else those of this file."""
    G, Kh, Kw = weight.shape
    return takes_band('lightconv2d', kernels, why_not(x, (Kh, Kw), x.shape[1] // G))


@torch.library.custom_op('coatnet_zoo::lightconv2d', mutates_args=())
def lightconv2d(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None,
        dropconnect: float, softmax: bool, kernels: str = 'auto') -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W), channels_last; on a CPU without the interpreter through eager."""
    if runs_triton(x):
        launch = band.launch_fwd if on_tensor_cores(x, weight, kernels) else launch_correlate
        return launch(x, weight, bias, seed, dropconnect, softmax, transposed=False)
    return empty_channels_last(x).copy_(eager(x, weight, bias, dropconnect, seed, 'softmax' if softmax else 'none'))


@torch.library.custom_op('coatnet_zoo::lightconv2d_backward', mutates_args=())
def lightconv2d_backward(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, needed: list[bool], kernels: str = 'auto',
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, each in its dtype; what is not `needed` comes back with no elements."""
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    if needed[0]:
        if runs_triton(x):
            launch = band.launch_fwd if on_tensor_cores(x, weight, kernels) else launch_correlate
            grad_x = launch(grad, weight, None, seed, dropconnect, softmax, transposed=True)
        else:
            kernel, _ = _normalised(weight, seed, dropconnect, softmax)
            grad_x = empty_channels_last(x).copy_(eager(grad, kernel.flip(1, 2), None, 0., None, 'none'))
    if needed[1]:
        if not runs_triton(x):
            gradient = _weight_grad_in_torch
        else:
            gradient = launch_band_weight_grad if on_tensor_cores(x, weight, kernels) else launch_weight_grad
        grad_weight = gradient(grad, x, weight, seed, dropconnect, softmax)
    if needed[2]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _normalised(
        weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The kernels (G, Kh, Kw) as they are applied, and the factors that DropConnect gave them."""
    kernel = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if softmax:
        kernel = kernel.flatten(1).softmax(1).view(weight.shape)
    if seed is None:
        return kernel, 1.
    factors = dropconnect_scale(seed, weight.numel(), dropconnect, kernel.dtype).view(weight.shape)
    return kernel * factors, factors


def _weight_grad_in_torch(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool) -> torch.Tensor:
    """`launch_weight_grad` in torch operators."""
    C = x.shape[1]
    G, Kh, Kw = weight.shape
    kernel, factors = _normalised(weight, seed, dropconnect, softmax)
    taps = conv2d_weight(x.to(kernel.dtype), (C, 1, Kh, Kw), grad.to(kernel.dtype), 1, (Kh // 2, Kw // 2), 1, C)
    taps = taps.view(G, C // G, Kh, Kw).sum(1)
    if softmax:
        products = kernel * taps
        plain, _ = _normalised(weight, None, 0., True)
        taps = factors * taps * plain - plain * products.sum((1, 2), keepdim=True)
    else:
        taps = factors * taps
    return taps.to(weight.dtype).contiguous()


@lightconv2d.register_fake
def _(x, weight, bias, seed, dropconnect, softmax, kernels='auto'):
    return empty_channels_last(x)


@lightconv2d_backward.register_fake
def _(grad, x, weight, bias, seed, dropconnect, softmax, needed, kernels='auto'):
    return (empty_channels_last(x) if needed[0] else x.new_empty(0),
            weight.new_empty(weight.shape) if needed[1] else weight.new_empty(0),
            bias.new_empty(bias.shape) if needed[2] else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, seed, ctx.dropconnect, ctx.softmax, ctx.kernels = inputs
    ctx.save_for_backward(x, weight, bias, seed)


def _backward(ctx, grad: torch.Tensor):
    needed = list(ctx.needs_input_grad[:3])
    grads = lightconv2d_backward(grad, *ctx.saved_tensors, ctx.dropconnect, ctx.softmax, needed, ctx.kernels)
    return *(one if need else None for one, need in zip(grads, needed, strict=True)), None, None, None, None


lightconv2d.register_autograd(_backward, setup_context=_save)
lightconv2d_backward.register_autograd(refuse('double backward', 'lightconv2d'))
lightconv2d.register_vmap(refuse('vmap', 'lightconv2d'))
lightconv2d_backward.register_vmap(refuse('vmap', 'lightconv2d'))


def triton(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dropconnect: float,
        seed: torch.Tensor | None,
        normalize: str,
        kernels: str = 'auto',
) -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W), channels_last; a seed switches DropConnect on.

    kernels: 'auto', or one of 'band' and 'direct' to force the kernels of one file.
    """
    weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()  # small, and read without strides
    return lightconv2d(x, weight, bias, seed, float(dropconnect), normalize == 'softmax', kernels)
