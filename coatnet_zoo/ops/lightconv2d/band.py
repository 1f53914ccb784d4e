"""LightConv on tensor cores: 16-bit, channels_last, kernels up to 7 x 7, heads of 16, 32 or 64 channels.

    fwd          out = bias + W x,    W a band matrix (positions, inputs), the same for every tile
    bwd_input    the same from grad, with the kernel turned by 180 degrees
    bwd_weight   grad x^T along the band, summed over tiles

`band_ops.py` describes tiles and slots. A program builds W once, in slices of two rows of the span, and keeps it in
registers. Forward walks down 8 columns in steps of two rows of x. It loads each row once and adds it to the up to four
pairs of output rows whose windows contain it. Weights are rounded to the dtype of x; sums are in float32.
"""
import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from ..band_ops import (
    LOG2E,
    Launch,
    default_launch,
    grid,
    half_of_span,
    operand,
    positions_of_tile,
    product,
    slot_column,
    slots_of_span,
    strip_of_columns,
    taps_of_slots,
)
from ..dropconnect import threshold
from ..triton_ops import dense_images, dropconnect_factor, empty_channels_last, on_device_of
from .direct import reduce_weight_grad

__all__ = ['launch_bwd_weight', 'launch_fwd']

WEIGHT_PROGRAMS = 2048


@jit
def _slice_of_band(
        weight_ptr, seed_ptr, row_max, norm, head, threshold, scale, j: tl.constexpr, Kh: tl.constexpr,
        Kw: tl.constexpr, SOFTMAX: tl.constexpr, TRANSPOSED: tl.constexpr, dtype: tl.constexpr,
):
    """(left, right): weights (16 positions, 16 slots) of rows 2 j and 2 j + 1 of either half of the span."""
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, 16)[None, :]
    u, v, exists = taps_of_slots(i, slot + 16 * j, Kh, Kw)
    tap = u + v
    if TRANSPOSED:
        tap = Kh * Kw - 1 - tap
    weight = tl.load(weight_ptr + head * (Kh * Kw) + tap).to(tl.float32)
    if SOFTMAX:
        weight = tl.exp2((weight - row_max) * LOG2E) * norm
    if seed_ptr is not None:
        weight *= dropconnect_factor((head * (Kh * Kw) + tap).to(tl.int64), tl.load(seed_ptr), threshold, scale)
    weight = tl.where(exists, weight, 0.0)
    in_left = slot % 8 >= i % 8
    return tl.where(in_left, weight, 0.0).to(dtype), tl.where(in_left, 0.0, weight).to(dtype)


@jit
def _lightconv2d_band_fwd_kernel(
        x, weight_ptr, bias_ptr, seed_ptr, out_ptr, H, W, across, down, height, threshold, scale,
        C: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, TAPS: tl.constexpr,
        SOFTMAX: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
):
    """out (B, H, W, C); with TRANSPOSED the gradient w.r.t. x from that w.r.t. out. x: descriptor or pointer."""
    SLICES: tl.constexpr = (Kh + 1) // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    image, head, left, top, bottom = strip_of_columns(tl.program_id(0), H, C // HEAD, across, down, height)
    out_ptr += tl.cast(image, tl.int64) * H * W * C + head * HEAD
    channel = tl.arange(0, HEAD)
    row_max = 0.0
    norm = 1.0
    if SOFTMAX:
        tap = tl.arange(0, TAPS)
        logits = tl.load(weight_ptr + head * (Kh * Kw) + tap, mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
        row_max = tl.max(logits, 0)
        norm = 1 / tl.sum(tl.exp2((logits - row_max) * LOG2E), 0)
    bias = tl.zeros((HEAD,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head * HEAD + channel).to(tl.float32)
    near0, far0 = _slice_of_band(weight_ptr, seed_ptr, row_max, norm, head, threshold, scale, 0, Kh, Kw, SOFTMAX,
                                 TRANSPOSED, dtype)
    near1, far1 = _slice_of_band(weight_ptr, seed_ptr, row_max, norm, head, threshold, scale, 1, Kh, Kw, SOFTMAX,
                                 TRANSPOSED, dtype)
    near2, far2 = _slice_of_band(weight_ptr, seed_ptr, row_max, norm, head, threshold, scale, 2, Kh, Kw, SOFTMAX,
                                 TRANSPOSED, dtype)
    near3, far3 = _slice_of_band(weight_ptr, seed_ptr, row_max, norm, head, threshold, scale, 3, Kh, Kw, SOFTMAX,
                                 TRANSPOSED, dtype)

    # unfinished output rows, begun in the last step, the one before and the third last. Each is a tensor of its own:
    # Triton carries no name through a loop that has the same value before and after
    acc0 = tl.zeros((16, HEAD), tl.float32)
    acc1 = tl.zeros((16, HEAD), tl.float32)
    acc2 = tl.zeros((16, HEAD), tl.float32)
    for row in range(top, bottom + 2 * (SLICES - 1), 2):
        x_left = half_of_span(x, image, row - Kh // 2, left - Kw // 2, head * HEAD, H, W, C, HEAD, 16, TMA)
        x_right = half_of_span(x, image, row - Kh // 2, left - Kw // 2 + 8, head * HEAD, H, W, C, HEAD, 16, TMA)
        acc = acc0
        if SLICES > 3:
            acc = product(far3, x_right, product(near3, x_left, acc2))
        if SLICES > 2:
            acc2 = product(far2, x_right, product(near2, x_left, acc1))
        if SLICES == 3:
            acc = acc2
        if SLICES > 1:
            acc1 = product(far1, x_right, product(near1, x_left, acc0))
        if SLICES == 2:
            acc = acc1
        acc0 = product(far0, x_right, product(near0, x_left, tl.zeros((16, HEAD), tl.float32)))
        if SLICES == 1:
            acc = acc0
        done = row - 2 * (SLICES - 1)
        offs, mask = positions_of_tile(done, left, bottom, H, W)
        tl.store(out_ptr + (offs * C)[:, None] + channel[None, :], (acc + bias[None, :]).to(dtype),
                 mask=(mask & (done >= top))[:, None])


@jit
def _lightconv2d_band_bwd_weight_kernel(
        x, grad_ptr, partial_ptr, x_b, grad_b, H, W, across, share, total, C: tl.constexpr, Kh: tl.constexpr,
        Kw: tl.constexpr, HEAD: tl.constexpr, SLOTS: tl.constexpr, TAPS: tl.constexpr, TMA: tl.constexpr,
):
    """partial (programs of a head, G, Kh * Kw): weight gradient over `share` of the `total` row pairs of all images."""
    G: tl.constexpr = C // HEAD
    program = tl.program_id(0)
    head = program % G
    program = program // G
    left = program % across * 8
    begin = program // across * share
    pairs = (H + 1) // 2
    i = tl.arange(0, 16)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    channel = tl.arange(0, HEAD)
    from_left = tl.zeros((16, SLOTS), tl.float32)
    from_right = tl.zeros((16, SLOTS), tl.float32)
    for index in range(begin, tl.minimum(begin + share, total)):
        image = index // pairs
        row = index % pairs * 2
        offs, mask = positions_of_tile(row, left, H, H, W)
        grad = tl.load(grad_ptr + tl.cast(image, tl.int64) * grad_b + head * HEAD
                       + ((offs * C)[:, None] + channel[None, :]), mask=mask[:, None], other=0.0)
        source = x
        if not TMA:
            source += tl.cast(image, tl.int64) * x_b
            image = 0
        x_left = half_of_span(source, image, row - Kh // 2, left - Kw // 2, head * HEAD, H, W, C, HEAD, SLOTS, TMA)
        x_right = half_of_span(source, image, row - Kh // 2, left - Kw // 2 + 8, head * HEAD, H, W, C, HEAD, SLOTS, TMA)
        from_left = product(grad, tl.trans(x_left), from_left)
        from_right = product(grad, tl.trans(x_right), from_right)
    band = tl.where(slot % 8 >= i % 8, from_left, from_right)
    # gather taps from slots
    tap = tl.arange(0, TAPS)[None, :]
    slot = tl.minimum(tap // Kw + i // 8, SLOTS // 8 - 1) * 8 + slot_column(tap % Kw, i % 8)
    taps = tl.sum(tl.gather(band, slot, 1), 0)
    tap = tl.arange(0, TAPS)
    tl.store(partial_ptr + (program * G + head) * (Kh * Kw) + tap, taps, mask=tap < Kh * Kw)


def launch_fwd(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool, transposed: bool, launch: Launch | None = None) -> torch.Tensor:
    """Output (B, C, H, W); with `transposed`, the gradient w.r.t. x, where `x` is that w.r.t. the output."""
    _, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = empty_channels_last(x)
    if out.numel() == 0:
        return out
    launch = launch or default_launch(x)
    programs, *strips = grid(x, G, launch)
    with on_device_of(x):
        _lightconv2d_band_fwd_kernel[programs,](
            operand(x, C // G, 16, launch), weight, bias, seed, out, H, W, *strips, threshold(dropconnect),
            1 / (1 - dropconnect), C=C, Kh=Kh, Kw=Kw, HEAD=C // G, TAPS=next_power_of_2(Kh * Kw), SOFTMAX=softmax,
            TRANSPOSED=transposed, TMA=launch.tma, **launch.options)
    return out


def launch_bwd_weight(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool, launch: Launch | None = None) -> torch.Tensor:
    """Gradient w.r.t. the weight (G, Kh, Kw), in its dtype: partial sums over rows of all images, then their sum."""
    B, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    if x.numel() == 0:
        return torch.zeros((G, Kh, Kw), dtype=weight.dtype, device=x.device)
    grad, x = dense_images(grad), dense_images(x)
    launch, slots = launch or default_launch(x), slots_of_span(Kh)
    across, total = cdiv(W, 8), B * cdiv(H, 2)
    share = cdiv(total, cdiv(launch.strips or WEIGHT_PROGRAMS, across * G))
    parts = across * cdiv(total, share)
    partial = torch.empty((parts, G, Kh * Kw), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _lightconv2d_band_bwd_weight_kernel[parts * G,](
            operand(x, C // G, slots, launch), grad, partial, x.stride(0), grad.stride(0), H, W, across, share, total,
            C=C, Kh=Kh, Kw=Kw, HEAD=C // G, SLOTS=slots, TAPS=max(16, next_power_of_2(Kh * Kw)), TMA=launch.tma,
            **launch.options)
    return reduce_weight_grad(partial, weight, seed, dropconnect, softmax, per_head=1)
