"""GELU in the two forms in use, and its inference form, which overwrites its input."""
import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {'gelu_tanh': 'tanh', 'gelu': 'none'}
_CHUNK = 1 << 16  # elements that stay in a core's cache over the four passes below


class GELU(nn.Module):
    """'gelu_tanh': x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, the official code's form. 'gelu': x * Phi(x).

    `timm.utils.reparameterize_model` replaces it with `InplaceGELU`: in a folded block its input is always the
    fresh output of a convolution or linear layer.
    """

    def __init__(self, act: str = 'gelu_tanh'):
        super().__init__()
        self.approximate = ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)

    def fuse(self) -> 'InplaceGELU':
        return InplaceGELU(self.approximate)

    def extra_repr(self) -> str:
        return f'approximate={self.approximate!r}'


class InplaceGELU(nn.Module):
    """GELU that overwrites its input where autograd and graph capture leave it free to."""

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
