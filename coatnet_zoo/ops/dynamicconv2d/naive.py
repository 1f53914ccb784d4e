"""DynamicConv, reference implementation: a loop over taps, for any device and floating dtype, in float32 or better.

    k = softmax_{u,v}(logits[b, g, :, :, h, w])                                normalize='softmax'; 'none': the logits
    out[b, c, h, w] = bias[c] + sum_{u,v} k[u, v] * x[b, c, h + u - Kh // 2, w + v - Kw // 2],        g = c // (C // G)

x is zero outside the image. The paper's 1-D operator (section 4, "DynamicConv") is H = 1 with a (1, K) kernel.
"""
import torch
import torch.nn.functional as F

from ..dropconnect import dropconnect_scale


def dynamicconv2d_naive(
        x: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: tuple[int, int],
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C, H, W), (B, G * Kh * Kw, H, W) -> (B, C, H, W); see `dynamicconv2d`, a seed switches DropConnect on."""
    B, C, H, W = x.shape
    Kh, Kw = kernel_size
    G = logits.shape[1] // (Kh * Kw)
    dtype = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)

    kernel = logits.to(dtype).reshape(B, G, Kh * Kw, H, W)
    if normalize == 'softmax':
        kernel = kernel.softmax(2)
    if seed is not None:
        scale = dropconnect_scale(seed, B * H * W * G * Kh * Kw, dropconnect, dtype)
        kernel = kernel * scale.view(B, H, W, G, Kh * Kw).permute(0, 3, 4, 1, 2)

    head = torch.arange(C, device=x.device) // (C // G)
    padded = F.pad(x.to(dtype), (Kw // 2, Kw // 2, Kh // 2, Kh // 2))
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for u in range(Kh):
        for v in range(Kw):
            out = out + kernel[:, head, u * Kw + v] * padded[:, :, u:u + H, v:v + W]
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    return out.to(x.dtype)
