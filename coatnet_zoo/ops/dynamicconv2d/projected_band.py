"""DynamicConv and the projection of its logits in one kernel on tensor cores; no logits are ever stored.

    fwd    out = bias + W x,    W = softmax(P x) of each position, a band matrix (positions, inputs)

Tiles are those of `band.py`. The logits of a tile are computed one kernel row at a time, as a product of its positions
and the taps, (16, C) x (C, 8). They stay in registers and are not rounded before the softmax. A penalty in the
accumulator masks the columns that are no taps. Each weight then moves from its tap to its slot: a rotation among 8
neighbours, one shuffle, gives the slot column; the slot row needs no data movement. A program keeps the P of its head
in shared memory. The backward pass is that of `band.py`, on logits recomputed by a matrix product.
"""
# Tuples grow in loops that Triton unrolls; mypy expects tuples of fixed length.
# mypy: disable-error-code="assignment,misc"
import torch
import triton.language as tl
from triton import jit

from .. import band_ops
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
    tile_obstacle,
)
from ..dropconnect import threshold
from ..triton_ops import dropconnect_factor, empty_channels_last, on_device_of

__all__ = ['MAX_CHANNELS', 'launch_fwd', 'obstacle']

# Per tile and head, this kernel reads 32 C bytes to compute the logits. The two-step form reads 1,568 bytes of logits
# (7 x 7), and its projection moves about 2,600 bytes: less in all beyond 128 channels.
MAX_CHANNELS = 128


@jit
def _rotate(weight):
    """Weights (16 positions, 8 tap columns) -> (16, 8 slot columns): tap v of position column px to (v + px) % 8."""
    px = tl.arange(0, 16)[:, None] % 8
    pair = tl.arange(0, 4)[None, :]
    even, odd = tl.split(tl.reshape(weight, (16, 4, 2)))
    # slot columns of one parity take tap columns of one parity, which depends on the position alone
    first = tl.where(band_ops.tap_column(0, px) % 2 == 0, even, odd)
    second = tl.where(band_ops.tap_column(1, px) % 2 == 0, even, odd)
    first = tl.gather(first, band_ops.tap_column(2 * pair, px) // 2, 1)
    second = tl.gather(second, band_ops.tap_column(2 * pair + 1, px) // 2, 1)
    return tl.reshape(tl.join(first, second), (16, 8))


@jit
def _stack(r):
    """Concatenate 2, 4 or 8 slot rows (16, 8) into (16, slots)."""
    if len(r) == 2:
        slots = tl.permute(tl.join(r[0], r[1]), (0, 2, 1))
    elif len(r) == 4:
        slots = tl.permute(tl.join(tl.join(r[0], r[2]), tl.join(r[1], r[3])), (0, 2, 3, 1))
    else:
        even = tl.join(tl.join(r[0], r[4]), tl.join(r[2], r[6]))
        slots = tl.permute(tl.join(even, tl.join(tl.join(r[1], r[5]), tl.join(r[3], r[7]))), (0, 2, 3, 4, 1))
    return tl.reshape(slots, (16, 8 * len(r)))


@jit
def _dynamicconv2d_projected_band_fwd_kernel(
        x, x_ptr, projection_ptr, bias_ptr, seed_ptr, out_ptr, H, W, across, down, height, threshold, scale,
        G: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr,
        CHUNK: tl.constexpr, SOFTMAX: tl.constexpr, TMA: tl.constexpr,
):
    """out (B, H, W, C) from x (B, H, W, C) and the projection (G * Kh * Kw, C). x: descriptor of x_ptr, or x_ptr."""
    C: tl.constexpr = G * HEAD
    image, head, left, top, bottom = strip_of_columns(tl.program_id(0), H, G, across, down, height)
    before = tl.cast(image, tl.int64) * H * W
    x_ptr += before * C
    out_ptr += before * C + head * HEAD
    projection_ptr += head * (Kh * Kw * C)
    i = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 8)[None, :]
    tap = tl.arange(0, 8)[:, None]
    chunk = tl.arange(0, CHUNK)[None, :]
    channel = tl.arange(0, HEAD)
    is_tap = (tap < Kw) & (chunk >= 0)
    in_left = column >= i % 8
    penalty = tl.where((column < Kw) & (i >= 0), 0.0, -1e38 if SOFTMAX else 0.0)
    # one matrix (CHUNK, 8) for each row of the kernel and each chunk of channels
    projection = ()
    for u in tl.static_range(Kh):
        for k in tl.static_range(C // CHUNK):
            ptr = projection_ptr + (u * Kw + tap) * C + k * CHUNK + chunk
            projection += (tl.trans(tl.load(ptr, mask=is_tap, other=0.0)),)

    for row in range(top, bottom, 2):
        offs, mask = positions_of_tile(row, left, bottom, H, W)
        weight = (penalty,) * Kh
        for k in tl.static_range(C // CHUNK):
            x_chunk = tl.load(x_ptr + (offs * C)[:, None] + k * CHUNK + chunk)
            logits = ()
            for u in tl.static_range(Kh):
                logits += (product(x_chunk, projection[u * (C // CHUNK) + k], weight[u]),)
            weight = logits
        if SOFTMAX:
            row_max = weight[0]
            for u in tl.static_range(1, Kh):
                row_max = tl.maximum(row_max, weight[u])
            shift = (tl.max(row_max, 1) * LOG2E)[:, None]
            exps = ()
            for u in tl.static_range(Kh):
                exps += (tl.math.exp2(weight[u] * LOG2E - shift),)
            weight = exps
            total = weight[0]
            for u in tl.static_range(1, Kh):
                total += weight[u]
            norm = 1 / tl.sum(total, 1)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            kept = ()
            for u in tl.static_range(Kh):
                index = (((before + offs) * G + head) * (Kh * Kw))[:, None] + u * Kw + column
                kept += (weight[u] * dropconnect_factor(index, seed, threshold, 1.0),)
            weight = kept
        x_left = half_of_span(x, image, row - Kh // 2, left - Kw // 2, head * HEAD, H, W, C, HEAD, SLOTS, TMA)
        x_right = half_of_span(x, image, row - Kh // 2, left - Kw // 2 + 8, head * HEAD, H, W, C, HEAD, SLOTS, TMA)
        none = tl.zeros((16, 8), x_left.dtype)
        rotated = ()
        for u in tl.static_range(Kh):
            rotated += (_rotate(weight[u].to(x_left.dtype)),)
        # tap row u is in slot row u of the upper positions, in slot row u + 1 of the lower ones
        upper = rotated + (none,) * (SLOTS // 8 - Kh)
        lower = (none,) + rotated + (none,) * (SLOTS // 8 - Kh - 1)
        near = ()
        far = ()
        for r in tl.static_range(SLOTS // 8):
            slot_row = tl.where(i < 8, upper[r], lower[r])
            near += (tl.where(in_left, slot_row, none),)
            far += (tl.where(in_left, none, slot_row),)
        acc = product(_stack(near), x_left, tl.zeros((16, HEAD), tl.float32))
        acc = product(_stack(far), x_right, acc)
        if SOFTMAX:
            acc *= norm[:, None]
        if seed_ptr is not None:
            acc *= scale
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + head * HEAD + channel).to(tl.float32)[None, :]
        tl.store(out_ptr + (offs * C)[:, None] + channel[None, :], acc.to(out_ptr.dtype.element_ty),
                 mask=mask[:, None])


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def obstacle(x: torch.Tensor, projection: torch.Tensor, kernel: tuple[int, int], dtype: torch.dtype) -> str:
    """Reason why this kernel cannot take a call in `dtype` or is slower than the two-step form; '' if none."""
    _, C, H, W = x.shape
    taps = kernel[0] * kernel[1]
    head = C * taps // projection.shape[0]
    if found := tile_obstacle(dtype, head, kernel):
        return found
    if C > MAX_CHANNELS:
        return f'limited to up to {MAX_CHANNELS} channels, got {C}'
    if not x.permute(0, 2, 3, 1).is_contiguous():  # vmap cannot ask for channels_last
        return f'x must be dense in channels_last, got strides {x.stride()}'
    if (H + 31) * (W + 31) * max(projection.shape) >= 2 ** 31:
        return f'an image and its logits must stay below 2^31 elements, got shape {tuple(x.shape)}'
    if x.is_cuda and _capability(x.device) < (8, 0):
        return f'limited to compute capability 8.0 and newer, got {_capability(x.device)}'
    return ''


def launch_fwd(
        x: torch.Tensor, projection: torch.Tensor, kernel: tuple[int, int], bias: torch.Tensor | None,
        seed: torch.Tensor | None, dropconnect: float, softmax: bool, launch: Launch | None = None) -> torch.Tensor:
    """Output (B, C, H, W); x dense in channels_last, projection (G * Kh * Kw, C) dense, in the dtype of x."""
    _, C, H, W = x.shape
    Kh, Kw = kernel
    G = projection.shape[0] // (Kh * Kw)
    out = empty_channels_last(x)
    if out.numel() == 0:
        return out
    launch, slots = launch or default_launch(x), slots_of_span(Kh)
    programs, *strips = grid(x, G, launch)
    with on_device_of(x):
        _dynamicconv2d_projected_band_fwd_kernel[programs,](
            operand(x, C // G, slots, launch), x, projection, bias, seed, out, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), G=G, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=slots, CHUNK=32 if C % 32 == 0 else 16,
            SOFTMAX=softmax, TMA=launch.tma, **launch.options)
    return out
