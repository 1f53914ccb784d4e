"""GELU: the tanh approximation and the exact form."""
import torch
import torch.nn.functional as F
from torch import nn

from .inference import InplaceGELU

__all__ = ['GELU']

ACTIVATIONS = {'gelu_tanh': 'tanh', 'gelu': 'none'}


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

    def fuse(self) -> InplaceGELU:
        return InplaceGELU(self.approximate)

    def extra_repr(self) -> str:
        return f'approximate={self.approximate!r}'
