"""Block type C: MBConv with squeeze-excite, CoAtNet section 2.1 and appendix A.1.

    x <- Proj(Pool(x)) + Project(SE(DepthConv(Expand(Norm(x)))))

with the stride of a stage's first block in the 1x1 `expand` (the paper's default) or in the 3x3 `depthwise` (its
"stride-2 DConv" rows). Order, widths, biases and the shortcut follow the authors' shared code
(google-research/maxvit, MBConvBlock): pre-norm without activation, expansion and squeeze from the *output* width,
SE with swish after the depthwise activation, a bias but no norm on `project`.
"""
from collections import OrderedDict
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import nn

from .activation import GELU
from .downsample import downsample
from .inference import fold_norm_into_next, fold_norm_into_previous, inplace_mul

__all__ = ['MBConv']

torch.fx.wrap('inplace_mul')  # one node in fx graphs; fx looks the name up in the calling module


class MBConv(nn.Module):
    """Inverted bottleneck (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Args:
        dim: Input channels.
        dim_out: Output channels.
        stride: 1, or 2 in the first block of a stage.
        drop_path: Probability of dropping the branch of a sample in training.
        expand_ratio: Hidden channels as a multiple of `dim_out` (see inner_width).
        se_ratio: Squeeze channels as a fraction of `dim_out` (see inner_width).
        conv_stride: Where the stride sits: 'expand' or 'depthwise'.
        pool: Pooling of the shortcut: 'avg' or 'max'.
        se_act: Activation of squeeze-excite: 'silu', or 'act' for that of the block.
        inner_width: Width that both ratios are taken of: 'output' is `dim_out`, 'input' is `dim`.
        norm_layer: Makes a norm over the channels of NCHW; only BatchNorms can be folded.
        act_layer: Makes an activation.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            stride: int = 1,
            drop_path: float = 0.,
            expand_ratio: float = 4.,
            se_ratio: float = 0.25,
            conv_stride: str = 'expand',
            pool: str = 'avg',
            se_act: str = 'silu',
            inner_width: str = 'output',
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            act_layer: Callable[[], nn.Module] = GELU,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = dim if inner_width == 'input' else dim_out
        hidden, squeezed = max(1, int(inner * expand_ratio)), max(1, int(inner * se_ratio))
        stride_expand, stride_depthwise = (stride, 1) if conv_stride == 'expand' else (1, stride)
        self.folded = False

        self.shortcut = nn.Sequential(OrderedDict(pool=downsample(stride, pool)))
        if dim != dim_out:
            self.shortcut.add_module('proj', nn.Conv2d(dim, dim_out, 1, **dd))
        self.pre_norm = norm_layer(dim, **dd)
        self.expand = nn.Conv2d(dim, hidden, 1, stride_expand, bias=False, **dd)
        self.norm1 = norm_layer(hidden, **dd)
        self.act1 = act_layer()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride_depthwise, 1, groups=hidden, bias=False, **dd)
        self.norm2 = norm_layer(hidden, **dd)
        self.act2 = act_layer()
        self.se = nn.Sequential(OrderedDict(
            reduce=nn.Conv2d(hidden, squeezed, 1, **dd),
            act=nn.SiLU() if se_act == 'silu' else act_layer(),
            expand=nn.Conv2d(squeezed, hidden, 1, **dd),
            gate=nn.Sigmoid(),
        ))
        self.project = nn.Conv2d(hidden, dim_out, 1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        x = self.act1(self.norm1(self.expand(self.pre_norm(x))))
        x = self.act2(self.norm2(self.depthwise(x)))
        gate = self.se(x.mean((2, 3), keepdim=True))
        x = inplace_mul(x, gate) if self.folded else x * gate  # once folded, nothing else uses x
        return shortcut + self.drop_path(self.project(x))

    def fuse(self) -> nn.Module:
        """Fold the three BatchNorms, in place; the block is then for inference only."""
        if self.folded:
            return self
        self.pre_norm = fold_norm_into_next(self.pre_norm, self.expand)
        self.norm1 = fold_norm_into_previous(self.expand, self.norm1)
        self.norm2 = fold_norm_into_previous(self.depthwise, self.norm2)
        self.folded = True
        return self
