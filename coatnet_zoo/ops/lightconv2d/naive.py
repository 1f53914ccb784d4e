"""LightConv, reference implementation: a loop over taps, for any device and floating dtype, in float32 or better.

    w = softmax_{u,v}(weight[g])                                        normalize='softmax'; 'none': w = weight[g]
    out[b, c, h, w] = bias[c] + sum_{u,v} w[g, u, v] * x[b, c, h + u - Kh // 2, w + v - Kw // 2],   g = c // (C // G)

x is zero outside the image. The paper's 1-D operator (section 3, "LightConv") is H = 1 with a (1, K) kernel.
"""
import torch
import torch.nn.functional as F

from ..dropconnect import dropconnect_scale


def lightconv2d_naive(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W); see `lightconv2d`, a seed switches DropConnect on."""
    _, C, H, W = x.shape
    G, Kh, Kw = weight.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)

    kernel = weight.to(dtype)
    if normalize == 'softmax':
        kernel = kernel.flatten(1).softmax(1).view(G, Kh, Kw)
    if seed is not None:
        kernel = kernel * dropconnect_scale(seed, G * Kh * Kw, dropconnect, dtype).view(G, Kh, Kw)

    head = torch.arange(C, device=x.device) // (C // G)
    padded = F.pad(x.to(dtype), (Kw // 2, Kw // 2, Kh // 2, Kh // 2))
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for u in range(Kh):
        for v in range(Kw):
            out = out + kernel[head, u, v][:, None, None] * padded[:, :, u:u + H, v:v + W]
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    return out.to(x.dtype)
