"""Parts of the inference (reparameterised) form of a model, which `timm.utils.reparameterize_model` makes.

- Exact folding of BatchNorm and LayerScale, affine in evaluation, into the convolution or linear layer next to them,
  unless that layer is pruned, parametrized, wrapped (LoRA) or hooked: then they stay, which is as exact.
- `InplaceGELU` and `inplace_mul`, which overwrite their input; nothing else may use it.
"""
import math

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import nn

__all__ = ['InplaceGELU', 'fold_norm_into_next', 'fold_norm_into_previous', 'fold_scale_into_previous', 'inplace_gelu',
           'inplace_mul', 'is_plain']

_CHUNK = 1 << 16  # elements that stay in a core's cache over the four passes of the tanh GELU


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `layer` computes what its class computes from its own weight: no subclass, no hooks, no other forward."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is kind and 'forward' not in layer.__dict__ and not hooked


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm in evaluation as `scale * x + shift`, in float64: (C,), (C,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()


@torch.no_grad()
def _replace(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    memory_format = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else (
        torch.contiguous_format)
    weight = weight.to(conv.weight.dtype).contiguous(memory_format=memory_format)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


@torch.no_grad()
def fold_norm_into_previous(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Fold `norm` into `conv` before it, in place, as norm(conv(x)); return the replacement of `norm`.

    This is an identity, or `norm` itself, not folded, if it is no BatchNorm2d or `conv` is not plain.
    """
    if not (isinstance(norm, nn.BatchNorm2d) and is_plain(conv, nn.Conv2d)):
        return norm
    scale, shift = _scale_shift(norm)
    bias = 0 if conv.bias is None else conv.bias.double()
    _replace(conv, conv.weight.double() * scale[:, None, None, None], scale * bias + shift)
    return nn.Identity()


@torch.no_grad()
def fold_norm_into_next(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Fold `norm` into the 1x1 `conv` after it, in place, as conv(norm(x)); return the replacement of `norm`.

    This is an identity, or `norm` itself, as in `fold_norm_into_previous`. Exact since a 1x1 convolution has no
    padding: the zeros of a padding are not shifted by the norm.
    """
    if not (isinstance(norm, nn.BatchNorm2d) and is_plain(conv, nn.Conv2d)):
        return norm
    assert conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    scale, shift = _scale_shift(norm)
    weight = conv.weight.double()
    bias = weight.flatten(1) @ shift + (0 if conv.bias is None else conv.bias.double())
    _replace(conv, weight * scale[:, None, None], bias)
    return nn.Identity()


@torch.no_grad()
def fold_scale_into_previous(linear: nn.Module, scale: nn.Module) -> nn.Module:
    """Fold a LayerScale into `linear` before it, in place; return an identity, or `scale` if `linear` is not plain."""
    if not (isinstance(scale, LayerScale) and is_plain(linear, nn.Linear)):
        return scale
    assert isinstance(linear, nn.Linear)  # for the type checker
    gamma = scale.gamma.double()
    linear.weight.copy_(linear.weight.double() * gamma[:, None])
    linear.bias.copy_(linear.bias.double() * gamma)
    return nn.Identity()


class InplaceGELU(nn.Module):
    """GELU that overwrites its input unless autograd or graph capture needs it."""

    def __init__(self, approximate: str):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return inplace_gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f'approximate={self.approximate!r}'


@torch.fx.wrap
def inplace_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """GELU of `x` (any shape, floating point), in the memory of `x` if no gradient or graph needs the input.

    The tanh form is computed as x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is the same function:
    torch's CPU tanh takes several times as long as its sigmoid.
    """
    if torch.jit.is_scripting():
        return F.gelu(x, approximate=approximate)
    else:
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing() or x.requires_grad
        if captured or not x.is_floating_point():
            return F.gelu(x, approximate=approximate)
        if approximate == 'none' or x.device.type != 'cpu' or x.dtype not in (torch.float32, torch.float64):
            return torch.ops.aten.gelu_(x, approximate=approximate)
        return _gelu_tanh_(x)


def _gelu_tanh_(x: torch.Tensor) -> torch.Tensor:
    linear = x.new_tensor(2 * math.sqrt(2 / math.pi))
    flat = x.as_strided((x.numel(),), (1,)) if _is_dense(x) else None
    for part in (x,) if flat is None else flat.split(_CHUNK):
        gate = torch.addcmul(linear, part, part, value=0.044715 * linear.item())
        part.mul_(gate.mul_(part).sigmoid_())
    return x


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def inplace_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x * gate`, in the memory of `x` unless a gradient or a captured graph needs `x`."""
    captured = False
    if not torch.jit.is_scripting():
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x * gate if captured or x.requires_grad else x.mul_(gate)
