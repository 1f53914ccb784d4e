"""DynamicConv in torch operators, in channels_last, with kernels (B, H, W, G, Kh * Kw) as the logits lie in memory.

The K * K windows of a position are never gathered: x is padded once, and a tap is a place in it. There are three forms:

- `shifted_sum`: one multiply-add of the whole map a tap. Compiled, it is one loop, and the kernels are divided by their
  total after it, which has fewer elements. Graphs (TorchScript, torch.export, ONNX) and GPUs take it too.
- `weighted_bags`: on a CPU without a compiler, a sum of rows a position, by the operator of embedding bags, which keeps
  the sum in registers.
- `band_product`: on a CPU, a map hardly larger than its kernels takes the product with their band matrix, as fairseq's
  code does.
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
        if learns:  # backward reads a tap at many positions, and is faster with the kernels taps first
            kernels = _stored(kernels.permute(4, 0, 1, 2, 3)).permute(1, 2, 3, 4, 0)
        kernels = (kernels - kernels.detach().amax(-1, keepdim=True)).exp()
        kernels = kernels if learns else _stored(kernels)
        total = kernels.sum(-1, keepdim=True)
    elif normalize == 'softmax':
        kernels = kernels.softmax(-1)
    if seed is not None:
        kernels = kernels * dropconnect_scale(seed, kernels.numel(), dropconnect, dtype).view(B, H, W, G, taps)

    heads = x.permute(0, 2, 3, 1).contiguous().reshape(B, H, W, G, C // G).to(dtype)
    if x.is_cpu and H * W <= (max(64, 3 * taps) if learns else 64):  # beyond, the matrix outgrows what it saves
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
    """`shifted_sum` of kernels (B, H, W, G, Kh * Kw): row i of a matrix is what position i takes of the others."""
    B, H, W, G, c = x.shape
    rows = kernels.permute(0, 3, 1, 2, 4).reshape(B, G, H * W, kernel_size[0] * kernel_size[1])
    band = torch.zeros([B, G, H * W, H * W + 1], dtype=x.dtype, device=x.device)  # one column for all outside
    band = band.scatter(3, sources(H, W, kernel_size, x.device).expand_as(rows), rows)[..., :H * W]
    out = band @ x.permute(0, 3, 1, 2, 4).reshape(B, G, H * W, c)
    return out.view(B, G, H, W, c).permute(0, 2, 3, 1, 4).contiguous()


def sources(H: int, W: int, kernel_size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(H * W, Kh * Kw) int64: the place that each tap of each position reads, H * W where that is outside."""
    Kh, Kw = kernel_size
    rows = torch.arange(H, device=device)[:, None] + torch.arange(Kh, device=device) - Kh // 2
    columns = torch.arange(W, device=device)[:, None] + torch.arange(Kw, device=device) - Kw // 2
    inside = ((rows >= 0) & (rows < H))[:, None, :, None] & ((columns >= 0) & (columns < W))[None, :, None, :]
    place = rows[:, None, :, None] * W + columns[None, :, None, :]
    return place.masked_fill(~inside, H * W).reshape(H * W, Kh * Kw)


def shifted_sum(x: torch.Tensor, kernels: list[torch.Tensor], kernel_size: tuple[int, int]) -> torch.Tensor:
    """sum_{u,v} kernels[u * Kw + v] * x shifted by (u - Kh // 2, v - Kw // 2): (B, H, W, G, c), each (B, H, W, G)."""
    windows = shifts(x, kernel_size)
    if torch.jit.is_scripting():
        return _accumulate(windows, kernels)
    elif _is_compiling() and len(windows) > 1:
        # two sums at once, so that an addition need not wait for the one before it
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
    """What each tap sees of zero-padded x (B, H, W, G, c), row by row of the kernel: views (B, H, W, G, c)."""
    H, W = x.shape[1], x.shape[2]
    Kh, Kw = kernel_size
    x = _stored(F.pad(x, [0, 0, 0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2]))
    return [x[:, tap // Kw:tap // Kw + H, tap % Kw:tap % Kw + W] for tap in range(Kh * Kw)]


def by_tap(kernels: torch.Tensor) -> list[torch.Tensor]:
    """Kh * Kw kernels (B, H, W, G) of (B, H, W, G, Kh * Kw); a compiled loop reads them where they are."""
    kernels = kernels.permute(4, 0, 1, 2, 3)
    return list((kernels if _is_compiling() else kernels.contiguous()).unbind(0))


def weighted_bags(x: torch.Tensor, kernels: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """`shifted_sum` of kernels (B, H, W, G, Kh * Kw): a bag is a position and head, its rows those of padded x."""
    B, H, W, G, c = x.shape
    Kh, Kw = kernel_size
    wide = W + Kw - 1
    # offsets within the indices have their dtype
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
    """Whether the inductor may fuse what follows: not in scripted or exported graphs."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _stored(x: torch.Tensor) -> torch.Tensor:
    """x; the compiler is made to write it out once, where it would compute it again at each tap."""
    if _is_compiling():
        x = x.contiguous()
        return x.as_strided(x.shape, x.stride())
    else:
        return x


class WeightedSum(torch.autograd.Function):
    """`shifted_sum` of kernels (B, H, W, G, Kh * Kw) with a backward that gathers too; autograd's own would pad one
    gradient a tap."""

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
            # what a position took through a tap, its neighbour gets back through the opposite one
            around = F.pad(kernels.permute(4, 0, 1, 2, 3).flip(0), [0, 0, Kw // 2, Kw // 2, Kh // 2, Kh // 2])
            opposite = [around[tap, :, tap // Kw:tap // Kw + H, tap % Kw:tap % Kw + W] for tap in range(Kh * Kw)]
            grad_x = shifted_sum(grad, opposite, ctx.kernel_size)
        if ctx.needs_input_grad[1]:
            products = [(grad * window).sum(-1) for window in shifts(x, ctx.kernel_size)]
            grad_kernels = torch.stack(products).permute(1, 2, 3, 4, 0)
        return grad_x, grad_kernels, None


def takes_bags(x: torch.Tensor) -> bool:
    """Whether x, where no graph is made of it, is summed by `weighted_bags`."""
    return x.is_cpu and not torch.compiler.is_compiling()
