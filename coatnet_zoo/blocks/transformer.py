"""Block type T: the Transformer block with relative attention, CoAtNet section 2.1 (eq. 3) and appendix A.1.

    x <- Proj(Pool(x)) + Attention(Pool(Norm(x)));   x <- x + FFN(Norm(x))

    y_i = sum_j softmax_j(x_i . x_j / sqrt(d) + w_{i-j}) x_j      rel_bias='pre', the paper's choice
    y_i = sum_j (softmax_j(x_i . x_j / sqrt(d)) + w_{i-j}) x_j    rel_bias='post', its other variant

with w learned per block and head, independent of the input. The layer of q, k, v changes the width, and the shortcut is
projected only if the width changes, as in the authors' shared code (google-research/maxvit, TransformerBlock).
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import register_notrace_module
from torch import nn
from torch.jit import Final

from .activation import GELU
from .downsample import downsample

__all__ = ['RelativeAttention2d', 'RelativeBias', 'TransformerBlock', 'resize_bias_table']


def refuse_legacy_onnx() -> None:
    """Raise RuntimeError in an ONNX export by tracing, which cannot follow the sizes of a resized bias table."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            'the legacy ONNX exporter (dynamo=False) cannot export a model with dynamic_img_size=True, whose relative '
            'bias is resized at every call. Pass dynamo=True to torch.onnx.export, or create the model '
            'with dynamic_img_size=False.')


@torch.fx.wrap
def resize_bias_table(table: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
    """Resize a bias table (heads, h, w) to (heads, 2H - 1, 2W - 1) for maps (H, W); bilinear, as in official code."""
    size = [2 * feat_size[0] - 1, 2 * feat_size[1] - 1]
    if size[0] == table.shape[1] and size[1] == table.shape[2]:
        return table
    return F.interpolate(table[None], size=size, mode='bilinear', align_corners=False)[0]


@register_notrace_module
class RelativeBias(nn.Module):
    """w_{i-j} for all pairs of positions of a map, from one learned table (heads, 2H - 1, 2W - 1).

    `table[:, a, b]` belongs to the offset (a - H + 1, b - W + 1) of the query from the key.

    Args:
        num_heads: Attention heads.
        feat_size: (H, W) of the map that the table is made for.
        dynamic: Accept maps of other sizes: resize the table at each call.
    """

    dynamic: Final[bool]

    def __init__(self, num_heads: int, feat_size: tuple[int, int], dynamic: bool = False, device=None, dtype=None):
        super().__init__()
        self.feat_size = feat_size
        self.dynamic = dynamic
        height, width = feat_size
        self.table = nn.Parameter(torch.empty(num_heads, 2 * height - 1, 2 * width - 1, device=device, dtype=dtype))
        nn.init.normal_(self.table, std=.02)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Bias (1, heads, N, N) with N = height * width, queries in rows, keys in columns, row-major positions."""
        table: torch.Tensor = self.table
        if self.dynamic:
            if not torch.jit.is_scripting():
                refuse_legacy_onnx()
            table = resize_bias_table(table, (height, width))
        else:
            height, width = self.feat_size  # the same values, but constant in traced graphs (legacy ONNX export)
        # windows[:, a, b, u, v] = table[:, H-1+a-u, W-1+b-v]: no index tensor to keep, move or go stale
        windows = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
        return windows.reshape(1, table.shape[0], height * width, height * width)

    @torch.no_grad()
    def set_feat_size(self, feat_size: tuple[int, int]) -> None:
        """Replace the learned table by one resized for maps (H, W)."""
        resized = resize_bias_table(self.table, feat_size).contiguous()
        self.table = nn.Parameter(resized, requires_grad=self.table.requires_grad)
        self.feat_size = feat_size

    def fuse(self) -> nn.Module:
        """Expand the bias once, as `FixedBias`, for maps of one size; a dynamic bias is returned as it is."""
        return self if self.dynamic else FixedBias(self(*self.feat_size).detach())

    def extra_repr(self) -> str:
        return f'num_heads={self.table.shape[0]}, feat_size={self.feat_size}, dynamic={self.dynamic}'


@register_notrace_module
class FixedBias(nn.Module):
    """Inference form of `RelativeBias`: the expanded bias (1, heads, N, N), for maps of one size."""

    bias: torch.Tensor

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        # three dimensions: model.to(memory_format=channels_last) would permute a buffer of four
        self.register_buffer('bias', bias[0].contiguous())

    def forward(self, height: int, width: int) -> torch.Tensor:
        return self.bias[None]


@torch.fx.wrap
def _widen(logits: torch.Tensor) -> torch.Tensor:
    """Half-precision logits in float32, others as they are; a node of its own where fx cannot know the dtype."""
    half = logits.dtype == torch.float16 or logits.dtype == torch.bfloat16
    return logits.float() if half else logits


class RelativeAttention2d(nn.Module):
    """Multi-head self-attention over the positions of a map: (B, H, W, dim) -> (B, H, W, dim_out).

    Args:
        dim: Input channels.
        dim_out: Output channels.
        feat_size: (H, W) of the map.
        head_dim: Channels of one head.
        rel_bias: 'pre', 'post' or 'none'; formulas at the top of this file.
        softmax_dtype: 'float32' computes the softmax of half-precision logits in float32, 'input' in their own dtype.
            (torch's fused attention, if in use, always computes it in float32.)
        dynamic: Accept maps of other sizes.
        inner_dim: Summed width of the heads, `dim_out` if None.

    Raises ValueError if `head_dim` does not divide `inner_dim`.
    """

    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            dim_out: int,
            feat_size: tuple[int, int],
            head_dim: int = 32,
            rel_bias: str = 'pre',
            softmax_dtype: str = 'float32',
            dynamic: bool = False,
            inner_dim: int | None = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        inner = dim_out if inner_dim is None else inner_dim
        if inner % head_dim:
            raise ValueError(f'head_dim must divide the width of its stage, got head_dim={head_dim}, width {inner}.')
        self.num_heads = inner // head_dim
        self.head_dim = head_dim
        self.scale = head_dim ** -0.5
        self.bias_after = rel_bias == 'post'
        self.upcast = softmax_dtype == 'float32'
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, 3 * inner, **dd)
        self.rel_bias = RelativeBias(self.num_heads, feat_size, dynamic, **dd) if rel_bias != 'none' else None
        self.attn_drop = nn.Identity()  # where timm.utils.AttentionExtract looks for the weights
        self.proj = nn.Linear(inner, dim_out, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, head_dim) each, views
        bias = self.rel_bias(H, W) if self.rel_bias is not None else None
        before = None if self.bias_after else bias
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=before, scale=self.scale)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            if before is not None:
                logits = logits + before
            weights = (_widen(logits) if self.upcast else logits).softmax(-1).to(v.dtype)
            x = self.attn_drop(weights) @ v
        if self.bias_after and bias is not None:
            x = x + bias.to(v.dtype) @ v
        x = x.transpose(1, 2)  # (B, N, heads, head_dim), contiguous as fused attention leaves it
        exporting = False
        if not torch.jit.is_scripting():
            exporting = torch.compiler.is_exporting()
        if exporting:
            x = x.clone(memory_format=torch.contiguous_format)  # decomposed for ONNX, attention has other strides
        return self.proj(x.reshape(B, H, W, self.num_heads * self.head_dim))


class TransformerBlock(nn.Module):
    """Relative attention and FFN: (B, dim, H, W) -> (B, dim_out, H / stride, W / stride), channels_last in memory.

    Args:
        dim: Input channels.
        dim_out: Output channels.
        stride: 1, or 2 in the first block of a stage.
        drop_path: Probability of dropping each of the two branches of a sample in training.
        feat_size: (H, W) of the *output* map.
        mlp_ratio: Hidden channels of the FFN as a multiple of `dim_out`.
        head_dim: Channels of an attention head.
        rel_bias: 'pre', 'post' or 'none'.
        softmax_dtype: 'float32' or 'input'.
        dynamic: Accept maps of other sizes.
        pool: Pooling of shortcut and input: 'avg' or 'max'.
        inner_width: Summed width of the heads: 'output' is `dim_out`, 'input' is `dim`.
        norm_layer: Makes a norm over the last dimension.
        act_layer: Makes an activation.
    """

    def __init__(
            self,
            dim: int,
            dim_out: int,
            stride: int = 1,
            drop_path: float = 0.,
            *,
            feat_size: tuple[int, int],
            mlp_ratio: float = 4.,
            head_dim: int = 32,
            rel_bias: str = 'pre',
            softmax_dtype: str = 'float32',
            dynamic: bool = False,
            pool: str = 'avg',
            inner_width: str = 'output',
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            act_layer: Callable[[], nn.Module] = GELU,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.pool = downsample(stride, pool)
        self.shortcut = nn.Linear(dim, dim_out, **dd) if dim != dim_out else nn.Identity()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = RelativeAttention2d(
            dim, dim_out, feat_size, head_dim, rel_bias, softmax_dtype, dynamic,
            inner_dim=dim if inner_width == 'input' else dim_out, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim_out, **dd)
        hidden = max(1, int(dim_out * mlp_ratio))
        self.mlp = Mlp(dim_out, hidden, act_layer=act_layer, **dd)  # type: ignore[arg-type]  # a partial serves too
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def set_feat_size(self, feat_size: tuple[int, int]) -> None:
        """Resize the bias table for an output map (H, W); RuntimeError once the model is folded."""
        if isinstance(self.attn.rel_bias, FixedBias):
            raise RuntimeError(
                'set_input_size cannot resize a folded model: its relative bias is laid out for one size. '
                'Resize first, then call reparameterize_model.')
        if self.attn.rel_bias is not None:
            self.attn.rel_bias.set_feat_size(feat_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(self.pool(x).permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C), a view
        x = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.pool(x).permute(0, 2, 3, 1)
        x = shortcut + self.drop_path1(self.attn(x))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)
