"""DynamicConv in torch operators, in channels_last. Kernels are (B, H, W, G, Kh * Kw), the memory order of the logits.

Windows are never materialised: x is padded once, and each tap reads a shifted view of it. There are three forms:

- `shifted_sum`: one multiply-add of the whole map for each tap. torch.compile fuses them into one loop; the division by
  the sum of the softmax follows it, on fewer elements. Graphs (TorchScript, torch.export, ONNX) and GPUs use it too.
- `weighted_bags`: on a CPU without torch.compile, F.embedding_bag sums the weighted rows of each position in registers.
- `band_product`: on a CPU, for maps hardly larger than the kernel, a matrix product with the kernels as a band matrix,
  as in fairseq.
"""
from functools import partial

import torch
import torch.nn.functional as F

from ..dropconnect import dropconnect_scale


def dynamicconv2d_eager(
        x: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C, H, W), (B, G * Kh * Kw, H, W) -> (B, C, H, W), channels_last; a seed switches DropConnect on."""
    B, C, H, W = x.shape
    taps = kernel_size[0] * kernel_size[1]
    G = logits.shape[1] // taps
    dtype = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)

    kernels = logits.permute(0, 2, 3, 1).reshape(B, H, W, G, taps).to(dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or logits.requires_grad)
    total: torch.Tensor | None = None
    if normalize == 'softmax' and _is_compiling():
        if learns:  # backward reads one tap at many positions: faster if taps come first in memory
            kernels = _stored(kernels.permute(4, 0, 1, 2, 3)).permute(1, 2, 3, 4, 0)
        kernels = (kernels - kernels.detach().amax(-1, keepdim=True)).exp()
        kernels = kernels if learns else _stored(kernels)
        total = kernels.sum(-1, keepdim=True)
    elif normalize == 'softmax':
        kernels = kernels.softmax(-1)
    if seed is not None:
        kernels = kernels * dropconnect_scale(seed, kernels.numel(), dropconnect, dtype).view(B, H, W, G, taps)

    heads = x.permute(0, 2, 3, 1).contiguous().reshape(B, H, W, G, C // G).to(dtype)
    if x.is_cpu and H * W <= (max(64, 3 * taps) if learns else 64):  # for larger maps the band matrix costs more
        out = band_product(heads, kernels, kernel_size)
    elif torch.jit.is_scripting() or torch.jit.is_tracing():  # their graphs cannot hold a backward written in Python
        out = shifted_sum(heads, by_tap(kernels), kernel_size)
    else:
        out = WeightedSum.apply(heads, kernels, kernel_size)
    if total is not None:
        out = out / total
    out = out.reshape(B, H, W, C)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype).permute(0, 3, 1, 2)


def band_product(x: torch.Tensor, kernels: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """`shifted_sum` with kernels (B, H, W, G, Kh * Kw), by band matrices: row i has the weights of position i."""
    B, H, W, G, c = x.shape
    rows = kernels.permute(0, 3, 1, 2, 4).reshape(B, G, H * W, kernel_size[0] * kernel_size[1])
    band = torch.zeros([B, G, H * W, H * W + 1], dtype=x.dtype, device=x.device)  # last column: taps outside
    band = band.scatter(3, sources(H, W, kernel_size, x.device).expand_as(rows), rows)[..., :H * W]
    out = band @ x.permute(0, 3, 1, 2, 4).reshape(B, G, H * W, c)
    return out.view(B, G, H, W, c).permute(0, 2, 3, 1, 4).contiguous()


def sources(H: int, W: int, kernel_size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(H * W, Kh * Kw) int64: flat index of the position that each tap of each position reads, H * W if outside."""
    Kh, Kw = kernel_size
    rows = torch.arange(H, device=device)[:, None] + torch.arange(Kh, device=device) - Kh // 2
    columns = torch.arange(W, device=device)[:, None] + torch.arange(Kw, device=device) - Kw // 2
    inside = ((rows >= 0) & (rows < H))[:, None, :, None] & ((columns >= 0) & (columns < W))[None, :, None, :]
    place = rows[:, None, :, None] * W + columns[None, :, None, :]
    return place.masked_fill(~inside, H * W).reshape(H * W, Kh * Kw)


def shifted_sum(x: torch.Tensor, kernels: list[torch.Tensor], kernel_size: tuple[int, int]) -> torch.Tensor:
    """sum_{u,v} kernels[u * Kw + v] * x shifted by (u - Kh // 2, v - Kw // 2).

    x and the result are (B, H, W, G, c), each of the kernels is (B, H, W, G).
    """
    windows = shifts(x, kernel_size)
    if torch.jit.is_scripting():
        return _accumulate(windows, kernels)
    elif _is_compiling() and len(windows) > 1:
        # two independent sums, so that an addition need not wait for the one before it
        products = [window * kernel.unsqueeze(-1) for window, kernel in zip(windows, kernels, strict=True)]
        return sum(products[2::2], products[0]) + sum(products[3::2], products[1])
    else:
        return _accumulate(windows, kernels)


def _accumulate(windows: list[torch.Tensor], kernels: list[torch.Tensor]) -> torch.Tensor:
    out = windows[0] * kernels[0].unsqueeze(-1)
    for tap in range(1, len(windows)):
        out.addcmul_(windows[tap], kernels[tap].unsqueeze(-1))
    return out


def shifts(x: torch.Tensor, kernel_size: tuple[int, int]) -> list[torch.Tensor]:
    """Input of each tap, in row-major order: Kh * Kw views (B, H, W, G, c) of zero-padded x (B, H, W, G, c)."""
    H, W = x.shape[1], x.shape[2]
    Kh, Kw = kernel_size
    x = _stored(F.pad(x, [0, 0, 0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2]))
    return [x[:, tap // Kw:tap // Kw + H, tap % Kw:tap % Kw + W] for tap in range(Kh * Kw)]


def by_tap(kernels: torch.Tensor) -> list[torch.Tensor]:
    """Split kernels (B, H, W, G, Kh * Kw) into Kh * Kw tensors (B, H, W, G): contiguous ones, or views if compiled."""
    kernels = kernels.permute(4, 0, 1, 2, 3)
    return list((kernels if _is_compiling() else kernels.contiguous()).unbind(0))


def weighted_bags(x: torch.Tensor, kernels: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """`shifted_sum` with kernels (B, H, W, G, Kh * Kw), by F.embedding_bag.

    A bag is one position and head; its entries are the rows (c,) of padded x that the taps read.
    """
    B, H, W, G, c = x.shape
    Kh, Kw = kernel_size
    wide = W + Kw - 1
    # embedding_bag counts the indices in their dtype
    numbers = partial(torch.arange, dtype=torch.int32 if H * W * G * Kh * Kw < 2**31 else torch.int64, device=x.device)
    at = (numbers(H)[:, None, None] * wide + numbers(W)[:, None]) * G + numbers(G)
    taps = (numbers(Kh)[:, None] * wide + numbers(Kw)) * G
    rows = at.view(-1, 1) + taps.view(-1)
    x = F.pad(x, [0, 0, 0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2])
    x = x.reshape(B, (H + Kh - 1) * wide * G, c)
    kernels = kernels.reshape(B, H * W * G, Kh * Kw)
    bags = [F.embedding_bag(rows, x[b], mode='sum', per_sample_weights=kernels[b]) for b in range(B)]
    return torch.stack(bags).view(B, H, W, G, c) if B else x.new_empty(B, H, W, G, c)


def _is_compiling() -> bool:
    """Whether torch.compile may fuse the code that follows; False in scripted and exported graphs."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _stored(x: torch.Tensor) -> torch.Tensor:
    """Return x. Under torch.compile, store it once; it would otherwise be recomputed at each tap."""
    if _is_compiling():
        x = x.contiguous()
        return x.as_strided(x.shape, x.stride())
    else:
        return x


class WeightedSum(torch.autograd.Function):
    """`shifted_sum` with kernels (B, H, W, G, Kh * Kw), and a backward that gathers.

    The backward that autograd derives would pad one gradient for each tap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, kernels: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
        if takes_bags(x):
            return weighted_bags(x, kernels, kernel_size)
        return shifted_sum(x, by_tap(kernels), kernel_size)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, kernels, ctx.kernel_size = inputs
        ctx.save_for_backward(x, kernels)
        ctx.save_for_forward(x, kernels)

    @staticmethod
    def jvp(ctx, x_tangent: torch.Tensor | None, kernels_tangent: torch.Tensor | None, _) -> torch.Tensor:
        x, kernels = ctx.saved_tensors
        out = torch.zeros_like(x)
        if x_tangent is not None:
            out = out + shifted_sum(x_tangent, by_tap(kernels), ctx.kernel_size)
        if kernels_tangent is not None:
            out = out + shifted_sum(x, by_tap(kernels_tangent), ctx.kernel_size)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, kernels = ctx.saved_tensors
        Kh, Kw = ctx.kernel_size
        _, H, W, _, _ = x.shape
        grad_x = grad_kernels = None
        if ctx.needs_input_grad[0]:
            # each position gathers grad from the positions whose windows cover it, through the opposite taps
            around = F.pad(kernels.permute(4, 0, 1, 2, 3).flip(0), [0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2])
            opposite = [around[tap, :, tap // Kw:tap // Kw + H, tap % Kw:tap % Kw + W] for tap in range(Kh * Kw)]
            grad_x = shifted_sum(grad, opposite, ctx.kernel_size)
        if ctx.needs_input_grad[1]:
            products = [(grad * window).sum(-1) for window in shifts(x, ctx.kernel_size)]
            grad_kernels = torch.stack(products).permute(1, 2, 3, 4, 0)
        return grad_x, grad_kernels, None


def takes_bags(x: torch.Tensor) -> bool:
    """Whether `WeightedSum` runs `weighted_bags`: on a CPU, without torch.compile."""
    return x.is_cpu and not torch.compiler.is_compiling()
