"""LightConv in torch operators: normalise the kernels, then one depthwise convolution in channels_last."""
import torch
import torch.nn.functional as F

from ..dropconnect import dropconnect_scale


def lightconv2d_eager(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        normalize: str,
        dropconnect: float,
        seed: torch.Tensor | None,
) -> torch.Tensor:
    """(B, C, H, W), (G, Kh, Kw) -> (B, C, H, W), channels_last; a seed switches DropConnect on."""
    C = x.shape[1]
    G, Kh, Kw = weight.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    kernel = weight.to(dtype)
    if normalize == 'softmax':
        kernel = kernel.flatten(1).softmax(1).view(G, Kh, Kw)
    if seed is not None:
        kernel = kernel * dropconnect_scale(seed, G * Kh * Kw, dropconnect, dtype).view(G, Kh, Kw)
    # CPUs convolve float16 slowly. With torch 2.15 on an AVX-512 CPU, bfloat16 convolutions of 2 to 16 channels hang
    # for kernel sides from 15 up and maps wider than 30
    stuck = C <= 16 and max(Kh, Kw) > 13
    # there, the gradient of a bfloat16 kernel of 5 x 5 or more takes several times as long as in float32
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and max(Kh, Kw) > 3
    widen = x.is_cpu and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and (stuck or learns)))
    compute = torch.float32 if widen else x.dtype
    # (G, Kh, Kw) -> (C, 1, Kh, Kw), a copy for each channel of a head
    kernel = kernel.to(compute)[:, None].expand(G, C // G, Kh, Kw).reshape(C, 1, Kh, Kw)
    bias = bias if bias is None else bias.to(compute)
    # on CPUs, contiguous NCHW takes a path that is 30 times slower for kernels from 15 x 15 up
    inputs = x.to(compute).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return F.conv2d(inputs, kernel, bias, 1, (Kh // 2, Kw // 2), 1, C).to(x.dtype)
