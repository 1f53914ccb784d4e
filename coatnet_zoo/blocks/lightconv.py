"""Block type L: the LightConv block, Pay Less Attention section 3.

    x <- Proj(Pool(x)) + Out(LightConv(GLU(In(Pool(Norm(x))))));   x <- x + FFN(Norm(x))

In maps d channels to 2d, GLU(a, b) = a * sigmoid(b), Out maps d to d. Unlike the authors' code (fairseq), the block
follows current vision models: pre-norm, GELU in the FFN, LayerScale (CaiT) and stochastic depth. The shortcut and the
pooling of a stage's first block are those of block type T.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import register_notrace_module
from torch import nn

from ..ops import lightconv2d
from ..ops.dropconnect import draw_seed
from ..ops.lightconv2d.eager import lightconv2d_eager
from ..ops.validation import validate_kernel_size, validate_options
from .activation import GELU
from .downsample import downsample
from .inference import fold_scale_into_previous

__all__ = ['LightConv2d', 'LightConvBlock']

torch.fx.wrap('lightconv2d')  # one node in fx graphs: its checks need tensors


@register_notrace_module
class LightConv2d(nn.Module):
    """`ops.lightconv2d` with its weight: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        dim: Channels.
        kernel_size: Side of the square kernel, odd.
        head_dim: Channels that share a kernel. Divides `dim`, or exceeds it: then all channels share one kernel.
        dropconnect: Probability of dropping a normalised weight in training.
        normalize: 'softmax' or 'none'.

    Raises ValueError for an even kernel size or a `head_dim` that does not fit.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int,
            head_dim: int = 32,
            dropconnect: float = 0.,
            normalize: str = 'softmax',
            device=None,
            dtype=None,
    ):
        super().__init__()
        validate_kernel_size((kernel_size, kernel_size), type(self).__name__)
        validate_options(normalize, dropconnect, False, type(self).__name__)
        heads = conv_heads(dim, head_dim)
        self.dropconnect = dropconnect
        self.normalize = normalize
        self.channels = dim
        self.weight = nn.Parameter(torch.empty(heads, kernel_size, kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight[:, None])  # as in fairseq, whose weight is (heads, 1, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            seed = draw_seed(x.device) if self.training and self.dropconnect > 0 else None
            return lightconv2d_eager(x, self.weight, None, self.normalize, self.dropconnect, seed)
        else:
            return lightconv2d(
                x, self.weight, dropconnect=self.dropconnect, training=self.training, normalize=self.normalize)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Equivalent depthwise nn.Conv2d for evaluation."""
        heads, size, _ = self.weight.shape
        kernel = self.weight.double()
        if self.normalize == 'softmax':
            kernel = kernel.flatten(1).softmax(1).view_as(kernel)
        conv = nn.Conv2d(
            self.channels, self.channels, size, padding=size // 2, groups=self.channels, bias=False, device='meta')
        kernel = kernel.repeat_interleave(self.channels // heads, 0)[:, None].to(self.weight.dtype)
        conv.weight = nn.Parameter(kernel, requires_grad=self.weight.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return (f'{self.channels}, heads={self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[1:])}, '
                f'dropconnect={self.dropconnect}, normalize={self.normalize!r}')


def conv_heads(dim: int, head_dim: int) -> int:
    """Number of heads: dim / head_dim, or 1 if head_dim exceeds dim; ValueError if head_dim does not divide dim."""
    if head_dim < 1 or (dim > head_dim and dim % head_dim):
        raise ValueError(
            f'conv_head_dim must divide the width of its stage, or exceed it, got {head_dim}, width {dim}.')
    return max(1, dim // head_dim)


class LightConvBlock(nn.Module):
    """LightConv and FFN: (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)), channels_last in memory.

    Args:
        dim: Input channels.
        dim_out: Output channels.
        stride: 1, or 2 in the first block of a stage.
        drop_path: Probability of dropping each of the two branches of a sample in training.
        kernel_size: Side of the kernel, odd.
        head_dim: Channels that share a kernel.
        glu: Gate the input of the convolution by a GLU; False for a linear layer d to d instead.
        normalize: 'softmax' or 'none'.
        dropconnect: Probability of dropping a normalised kernel weight in training.
        mlp_ratio: Hidden channels of the FFN as a multiple of `dim_out`.
        layer_scale: Initial value of the LayerScale of each branch; 0 for none.
        pool: Pooling of shortcut and input: 'avg' or 'max'.
        conv_layer: Constructor of the convolution, with the arguments of `LightConv2d`.
        norm_layer: Makes a norm over the last dimension.
        act_layer: Makes an activation.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            stride: int = 1,
            drop_path: float = 0.,
            kernel_size: int = 7,
            head_dim: int = 32,
            glu: bool = True,
            normalize: str = 'softmax',
            dropconnect: float = 0.,
            mlp_ratio: float = 4.,
            layer_scale: float = 0.1,
            pool: str = 'avg',
            conv_layer: Callable[..., nn.Module] = LightConv2d,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            act_layer: Callable[[], nn.Module] = GELU,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        scale: Callable[[], nn.Module] = nn.Identity
        if layer_scale > 0:
            scale = partial(LayerScale, dim_out, layer_scale, **dd)
        self.glu = glu
        self.pool = downsample(stride, pool)
        self.shortcut = nn.Linear(dim, dim_out, **dd) if dim != dim_out else nn.Identity()
        self.norm1 = norm_layer(dim, **dd)
        self.in_proj = nn.Linear(dim, 2 * dim_out if glu else dim_out, **dd)
        self.conv = conv_layer(dim_out, kernel_size, head_dim, dropconnect, normalize, **dd)
        self.out_proj = nn.Linear(dim_out, dim_out, **dd)
        self.scale1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim_out, **dd)
        hidden = max(1, int(dim_out * mlp_ratio))
        self.mlp = Mlp(dim_out, hidden, act_layer=act_layer, **dd)  # type: ignore[arg-type]  # a partial serves too
        self.scale2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(self.pool(x).permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C), a view
        x = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.in_proj(self.pool(x).permute(0, 2, 3, 1))
        if self.glu:
            x = F.glu(x, -1)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = shortcut + self.drop_path1(self.scale1(self.out_proj(x)))
        x = x + self.drop_path2(self.scale2(self.mlp(self.norm2(x))))
        return x.permute(0, 3, 1, 2)

    def fuse(self) -> nn.Module:
        """Fold both LayerScales into the linear layers before them, in place; the convolution has its own `fuse`."""
        self.scale1 = fold_scale_into_previous(self.out_proj, self.scale1)
        self.scale2 = fold_scale_into_previous(self.mlp.fc2, self.scale2)
        return self
