"""Block type D: the DynamicConv block, Pay Less Attention section 4.

The block of type L, with a kernel for each position i. One linear layer without bias predicts it from the input x_i of
the convolution at that position alone: W_i = Linear(x_i), d to heads * K * K.
"""
from functools import partial
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import nn

from ..ops import dynamicconv2d, dynamicconv2d_projected
from ..ops.dropconnect import draw_seed
from ..ops.dynamicconv2d.eager import dynamicconv2d_eager
from ..ops.dynamicconv2d.projected import fuses_projection
from ..ops.validation import validate_kernel_size, validate_options
from .inference import is_plain
from .lightconv import LightConv2d, LightConvBlock, conv_heads

__all__ = ['DynamicConv2d', 'DynamicConvBlock']

torch.fx.wrap('dynamicconv2d')  # one node in fx graphs: its checks need tensors


@register_notrace_module
class DynamicConv2d(nn.Module):
    """`ops.dynamicconv2d` with the layer that predicts its kernels: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        dim: Channels.
        kernel_size: Side of the square kernel, odd.
        head_dim: Channels that share a kernel. Divides `dim`, or exceeds it: then all channels share one kernel.
        dropconnect: Probability of dropping a normalised weight in training.
        normalize: 'softmax' or 'none'.
        static_branch: Add a learned depthwise convolution of the same size, one kernel a channel.

    Raises ValueError for an even kernel size or a `head_dim` that does not fit.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int,
            head_dim: int = 32,
            dropconnect: float = 0.,
            normalize: str = 'softmax',
            static_branch: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.kernel_size = validate_kernel_size((kernel_size, kernel_size), type(self).__name__)
        validate_options(normalize, dropconnect, False, type(self).__name__)
        self.dropconnect = dropconnect
        self.normalize = normalize
        self.logits = nn.Linear(dim, conv_heads(dim, head_dim) * kernel_size ** 2, bias=False, **dd)
        self.static = LightConv2d(dim, kernel_size, 1, dropconnect, 'none', **dd) if static_branch else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            logits = self.logits(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            seed = draw_seed(x.device) if self.training and self.dropconnect > 0 else None
            out = dynamicconv2d_eager(x, logits, self.kernel_size, None, self.normalize, self.dropconnect, seed)
        elif self.fuses_projection(x):
            out = dynamicconv2d_projected(
                x, self.logits.weight, self.kernel_size, normalize=self.normalize, dropconnect=self.dropconnect,
                training=self.training, backend='triton')
        else:
            logits = self.logits(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out = dynamicconv2d(
                x, logits, self.kernel_size, normalize=self.normalize, dropconnect=self.dropconnect,
                training=self.training)
        return out if self.static is None else out + self.static(x)

    def fuses_projection(self, x: torch.Tensor) -> bool:
        """Whether `logits` and convolution run as one kernel: if it takes x and `logits` is nn.Linear without hooks.

        False under torch.fx, whose x is a proxy: the graph keeps both steps.
        """
        layer = self.logits
        plain = is_plain(layer, nn.Linear) and layer.bias is None
        return plain and isinstance(x, torch.Tensor) and fuses_projection(x, layer.weight, self.kernel_size)

    def extra_repr(self) -> str:
        return f'kernel_size={self.kernel_size}, dropconnect={self.dropconnect}, normalize={self.normalize!r}'


class DynamicConvBlock(LightConvBlock):
    """DynamicConv and FFN; shapes and arguments of `LightConvBlock`, and `static_branch` of `DynamicConv2d`."""

    def __init__(self, dim: int, dim_out: int, stride: int = 1, static_branch: bool = False, **kwargs: Any):
        conv_layer = partial(DynamicConv2d, static_branch=static_branch)
        super().__init__(dim, dim_out, stride, conv_layer=conv_layer, **kwargs)
