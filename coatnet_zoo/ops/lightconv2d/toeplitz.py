"""LightConv on tensor cores for kernels of 9 to 31: 16-bit, channels_last, heads of 16, 32 or 64 channels.

    fwd          out[p] = bias + sum_d A[d] x[p + d],    p, p + d tiles of 8 x 2 positions, A[d] (16, 16)
    bwd_input    the same from grad, with the kernel turned by 180 degrees
    bwd_weight   dA[p, q] = sum grad[p] x[q]^T over images and columns, then sums along the diagonals of equal taps

Tiles form a grid: an image is divided into pairs of rows and octets of columns. One kernel writes the blocks A,
normalised and rounded to the dtype of x, for all tile offsets d that a head needs. The other two kernels are matrix
products. Their rows are the positions of PAIRS vertically stacked tiles. The channels of IMAGES images are the columns
in fwd and the summed dimension in bwd_weight. Tiles outside the image are skipped, so that maps of up to 16 rows take
one dense product a head. Sums are in float32.
"""
from typing import NamedTuple

import torch
import triton.language as tl
from triton import cdiv, jit, next_power_of_2

from ..band_ops import LOG2E, product
from ..dropconnect import threshold
from ..triton_ops import dense_images, dropconnect_factor, empty_channels_last, on_device_of
from .direct import reduce_weight_grad

__all__ = ['launch_bwd_weight', 'launch_fwd']

WEIGHT_PROGRAMS = 528  # four for each of the 132 multiprocessors of a Hopper GPU


@jit
def columns_between(slot, position):
    """Column distance from a position to a slot, each within its octet."""
    return slot % 8 - position % 8


@jit
def column_of_slot(dv, position):
    """Column within the octet of the slot dv columns from a position; outside 0 to 7 there is none."""
    return dv + position % 8


@jit
def _lightconv2d_toeplitz_blocks_kernel(
        weight_ptr, seed_ptr, out_ptr, first, blocks, threshold, scale, REACH_W: tl.constexpr, Kh: tl.constexpr,
        Kw: tl.constexpr, TAPS: tl.constexpr, SOFTMAX: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):
    """out (G, 2 * REACH_W + 1, blocks, 16, 16): A from octet -REACH_W and pair `first` on, zero where there is no tap.

    A program writes BLOCK rows of one head and one octet.
    """
    OCTETS: tl.constexpr = 2 * REACH_W + 1
    head = tl.program_id(0) // OCTETS
    octet = tl.program_id(0) % OCTETS - REACH_W
    row_max = 0.0
    norm = 1.0
    if SOFTMAX:
        tap = tl.arange(0, TAPS)
        logits = tl.load(weight_ptr + head * (Kh * Kw) + tap, mask=tap < Kh * Kw, other=float('-inf')).to(tl.float32)
        row_max = tl.max(logits, 0)
        norm = 1 / tl.sum(tl.exp2((logits - row_max) * LOG2E), 0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    position = row % 16
    slot = tl.arange(0, 16)[None, :]
    u = 2 * (row // 16 + first) + slot // 8 - position // 8 + Kh // 2
    v = 8 * octet + columns_between(slot, position) + Kw // 2
    tap = u * Kw + v
    if TRANSPOSED:
        tap = Kh * Kw - 1 - tap
    exists = (u >= 0) & (u < Kh) & (v >= 0) & (v < Kw)
    weight = tl.load(weight_ptr + head * (Kh * Kw) + tap, mask=exists, other=0.0).to(tl.float32)
    if SOFTMAX:
        weight = tl.exp2((weight - row_max) * LOG2E) * norm
    if seed_ptr is not None:
        weight *= dropconnect_factor((head * (Kh * Kw) + tap).to(tl.int64), tl.load(seed_ptr), threshold, scale)
    out_ptr += tl.program_id(0) * blocks * 256
    tl.store(out_ptr + row * 16 + slot, tl.where(exists, weight, 0.0).to(out_ptr.dtype.element_ty),
             mask=row < blocks * 16)


@jit
def tile_positions(pair, octet, H, W, POSITIONS: tl.constexpr):
    """Offsets (POSITIONS,) in an image of vertically stacked tiles from `pair` on, and the mask of those inside."""
    i = tl.arange(0, POSITIONS)
    row = 2 * pair + i // 8
    column = octet * 8 + i % 8
    return row * W + column, (row >= 0) & (row < H) & (column < W)


@jit
def images_by_channels(ptr, stride, first, B, head, HEAD: tl.constexpr, IMAGES: tl.constexpr):
    """Pointers (IMAGES * HEAD,) to the channels of a head in images from `first` on, and the mask of valid images."""
    i = tl.arange(0, IMAGES * HEAD)
    image = first + i // HEAD
    return ptr + image.to(tl.int64) * stride + (head * HEAD + i % HEAD), image < B


@jit
def _lightconv2d_toeplitz_fwd_kernel(
        x_ptr, table_ptr, bias_ptr, out_ptr, x_b, out_b, B, H, W, down, octets, blocks, reach,
        C: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr, SLICE: tl.constexpr, REACH_W: tl.constexpr,
        IMAGES: tl.constexpr,
):
    """out (B, H, W, C) from x and the table of blocks A: PAIRS vertically stacked tiles, one head, IMAGES images.

    SLICE tiles of x are loaded at once. The first input tile lies `reach` pairs above the first output tile.
    """
    G: tl.constexpr = C // HEAD
    head = tl.program_id(0) % G
    program = tl.program_id(0) // G
    top = program % down * PAIRS
    program = program // down
    octet = program % octets
    first = program // octets * IMAGES
    x_ptr, exists = images_by_channels(x_ptr, x_b, first, B, head, HEAD, IMAGES)
    m = tl.arange(0, PAIRS * 16)[:, None]
    k = tl.arange(0, SLICE * 16)[None, :]
    table_ptr += head * (2 * REACH_W + 1) * blocks * 256
    table_ptr += (k // 16 - m // 16 + (PAIRS - 1)) * 256 + m % 16 * 16 + k % 16
    # slices and octets that lie at least partly in the image
    begin = tl.maximum(reach - top, 0) // SLICE
    slices = tl.cdiv(tl.minimum(PAIRS + 2 * reach, (H + 1) // 2 - top + reach), SLICE) - begin
    left = tl.maximum(octet - REACH_W, 0)
    steps = slices * (tl.minimum(octet + REACH_W, octets - 1) + 1 - left)
    acc = tl.zeros((PAIRS * 16, IMAGES * HEAD), tl.float32)
    for step in range(steps):
        column = left + step // slices
        slice = begin + step % slices
        offs, inside = tile_positions(top - reach + slice * SLICE, column, H, W, SLICE * 16)
        x = tl.load(x_ptr[None, :] + (offs * C)[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
        weight = tl.load(table_ptr + ((column - octet + REACH_W) * blocks + slice * SLICE) * 256)
        acc = product(weight, x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + head * HEAD + tl.arange(0, IMAGES * HEAD) % HEAD).to(tl.float32)[None, :]
    out_ptr, exists = images_by_channels(out_ptr, out_b, first, B, head, HEAD, IMAGES)
    offs, inside = tile_positions(top, octet, H, W, PAIRS * 16)
    tl.store(out_ptr[None, :] + (offs * C)[:, None], acc.to(out_ptr.dtype.element_ty),
             mask=inside[:, None] & exists[None, :])


@jit
def _lightconv2d_toeplitz_bwd_weight_kernel(
        x_ptr, grad_ptr, partial_ptr, x_b, grad_b, B, H, W, down, windows, octets, splits, reach,
        C: tl.constexpr, Kh: tl.constexpr, Kw: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr,
        REACH_W: tl.constexpr, IMAGES: tl.constexpr,
):
    """partial (programs of a head, G, Kh * Kw), zero-initialised: weight gradient, partial sums.

    A program multiplies PAIRS vertically stacked tiles of grad by a window of as many tiles of x, `shift` octets to the
    right, and sums over a split of all images and columns of tiles.
    """
    G: tl.constexpr = C // HEAD
    ROWS: tl.constexpr = PAIRS * 16
    SHIFTS: tl.constexpr = 2 * PAIRS  # block diagonals, one unused
    head = tl.program_id(0) % G
    part = tl.program_id(0) // G
    shift = part % (2 * REACH_W + 1) - REACH_W
    program = part // (2 * REACH_W + 1)
    window = program % windows
    program = program // windows
    top = program % down * PAIRS
    split = program // down
    away = window * PAIRS - reach  # pairs from the first tile of grad to that of x
    columns = tl.maximum(octets - tl.abs(shift), 0)
    total = tl.cdiv(B, IMAGES) * columns
    if (top + away + PAIRS <= 0) | (top + away >= (H + 1) // 2):
        total = 0
    share = tl.cdiv(total, splits)
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, total)):
        octet = step % columns + tl.maximum(-shift, 0)
        image = step // columns * IMAGES
        grad, exists = images_by_channels(grad_ptr, grad_b, image, B, head, HEAD, IMAGES)
        offs, inside = tile_positions(top, octet, H, W, ROWS)
        grad = tl.load(grad[None, :] + (offs * C)[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
        x, exists = images_by_channels(x_ptr, x_b, image, B, head, HEAD, IMAGES)
        offs, inside = tile_positions(top + away, octet + shift, H, W, ROWS)
        x = tl.load(x[None, :] + (offs * C)[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
        acc = product(grad, tl.trans(x), acc)

    # sum over pairs of tiles at equal distance: (16 positions, SHIFTS blocks of slots)
    m = tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, SHIFTS * 16)[None, :] + (m // 16 - (PAIRS - 1)) * 16
    inside = (n >= 0) & (n < ROWS)
    blocks = tl.where(inside, tl.gather(acc, tl.minimum(tl.maximum(n, 0), ROWS - 1), 1), 0.0)
    blocks = tl.sum(tl.reshape(blocks, (PAIRS, 16, SHIFTS * 16)), 0)
    # sum over positions with equal taps: t numbers the taps that the blocks reach, from the first on, 16 columns a row
    t = tl.arange(0, SHIFTS * 32)
    i = tl.arange(0, 16)[:, None]
    du = t[None, :] // 16 + i // 8 - 1
    column = column_of_slot(t[None, :] % 16 - 7, i)
    slot = du // 2 * 16 + du % 2 * 8 + column
    inside = (du >= 0) & (du < 2 * SHIFTS) & (column >= 0) & (column < 8)
    taps = tl.sum(tl.where(inside, tl.gather(blocks, tl.where(inside, slot, 0), 1), 0.0), 0)
    u = t // 16 - 1 + 2 * (away - (PAIRS - 1)) + Kh // 2
    v = t % 16 - 7 + 8 * shift + Kw // 2
    tl.store(partial_ptr + (part * G + head) * (Kh * Kw) + u * Kw + v, taps,
             mask=(u >= 0) & (u < Kh) & (v >= 0) & (v < Kw) & (t % 16 < 15))


class Tiles(NamedTuple):
    """Grid of tiles of a call, and the part of one program.

    Args:
        pairs: Vertically stacked tiles of a program.
        down: Programs that cover the height of an image.
        octets: Tiles across an image.
        reach: Pairs by which a program's input begins above its output; 0 if the program has the whole height.
        reach_w: Octets of input to either side of the output octet.
    """

    pairs: int
    down: int
    octets: int
    reach: int
    reach_w: int


def tiles(H: int, W: int, Kh: int, Kw: int) -> Tiles:
    pairs = min(8, next_power_of_2(cdiv(H, 2)))
    down = cdiv(cdiv(H, 2), pairs)
    octets = cdiv(W, 8)
    return Tiles(pairs, down, octets, (Kh // 2 + 1) // 2 if down > 1 else 0, min(cdiv(Kw // 2, 8), octets - 1))


def slice_of(pairs: int, reach: int) -> int:
    """Tiles of x that are loaded at once, few enough that the last slice stays within the table of blocks."""
    return min(4, pairs) if (pairs + 2 * reach) % 4 == 0 else min(2, pairs)


def _table(x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float, softmax: bool,
           transposed: bool, first: int, blocks: int, reach_w: int) -> torch.Tensor:
    """Table of the blocks A, (G, 2 * reach_w + 1, blocks, 16, 16), in the dtype of x."""
    G, Kh, Kw = weight.shape
    out = x.new_empty((G, 2 * reach_w + 1, blocks, 16, 16))
    _lightconv2d_toeplitz_blocks_kernel[G * (2 * reach_w + 1), cdiv(blocks, 4)](
        weight, seed, out, first, blocks, threshold(dropconnect), 1 / (1 - dropconnect), REACH_W=reach_w, Kh=Kh, Kw=Kw,
        TAPS=next_power_of_2(Kh * Kw), SOFTMAX=softmax, TRANSPOSED=transposed, BLOCK=64, num_warps=4)
    return out


def launch_fwd(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool, transposed: bool) -> torch.Tensor:
    """Output (B, C, H, W); with `transposed`, the gradient w.r.t. x, where `x` is that w.r.t. the output."""
    B, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    x = dense_images(x)
    out = empty_channels_last(x)
    if out.numel() == 0:
        return out
    pairs, down, octets, reach, reach_w = tiles(H, W, Kh, Kw)
    part = slice_of(pairs, reach)
    images = min(256 * G // C, next_power_of_2(B))
    blocks = 2 * (pairs + reach) - 1 + part
    with on_device_of(x):
        table = _table(x, weight, seed, dropconnect, softmax, transposed, 1 - pairs - reach, blocks, reach_w)
        _lightconv2d_toeplitz_fwd_kernel[G * down * octets * cdiv(B, images),](
            x, table, bias, out, x.stride(0), out.stride(0), B, H, W, down, octets, blocks, reach, C=C, HEAD=C // G,
            PAIRS=pairs, SLICE=part, REACH_W=reach_w, IMAGES=images,
            num_warps=8 if pairs * 16 * images * C // G > 16384 else 4, num_stages=3)
    return out


def launch_bwd_weight(
        grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor | None, dropconnect: float,
        softmax: bool) -> torch.Tensor:
    """Gradient w.r.t. the weight (G, Kh, Kw), in its dtype."""
    B, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    if x.numel() == 0:
        return torch.zeros((G, Kh, Kw), dtype=weight.dtype, device=x.device)
    grad, x = dense_images(grad), dense_images(x)
    pairs, down, octets, reach, reach_w = tiles(H, W, Kh, Kw)
    windows = cdiv(pairs + 2 * reach, pairs)
    images = min(max(1, 64 * G // C), next_power_of_2(B))
    parts = down * windows * (2 * reach_w + 1)
    splits = min(cdiv(WEIGHT_PROGRAMS, parts * G), cdiv(B, images) * octets)
    partial = torch.zeros((splits * parts, G, Kh * Kw), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _lightconv2d_toeplitz_bwd_weight_kernel[splits * parts * G,](
            x, grad, partial, x.stride(0), grad.stride(0), B, H, W, down, windows, octets, splits, reach, C=C, Kh=Kh,
            Kw=Kw, HEAD=C // G, PAIRS=pairs, REACH_W=reach_w, IMAGES=images, num_warps=8 if pairs == 8 else 4,
            num_stages=3)
    return reduce_weight_grad(partial, weight, seed, dropconnect, softmax, per_head=1)
