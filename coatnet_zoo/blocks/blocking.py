"""Cache blocking for the inference form: the wide maps of a convolution block stay in cache on a CPU."""
import torch
from timm.models import register_notrace_module
from torch import nn

__all__ = ['CacheBlocked']

_CACHE = 6 << 20  # bytes of the widest map that one pass may hold, a share of a usual last-level cache


@register_notrace_module
class CacheBlocked(nn.Module):
    """A block run on a few images at a time, on a CPU in eager inference; elsewhere the block as it is.

    The hidden map of an MBConv is four times as wide as what goes in and out. For a whole batch it is written to and
    read from memory at every step, and past 32 MiB the allocator also maps fresh pages for it at every call.

    Args:
        block: A folded block, which treats the images of a batch independently.
        widest: Elements of its widest map per pixel of its input.
    """

    def __init__(self, block: nn.Module, widest: float):
        super().__init__()
        self.block = block
        self.widest = widest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.is_free(x):
            image = self.widest * x.shape[-2] * x.shape[-1] * x.element_size()
            parts = x.split(max(1, int(_CACHE // image)))
            if len(parts) > 1:
                return torch.cat([self.block(part) for part in parts])
        return self.block(x)

    @torch.jit.unused
    def is_free(self, x: torch.Tensor) -> bool:
        """Neither a graph nor a gradient is being recorded, and the caches are a CPU's."""
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
        return not captured and not torch.is_grad_enabled() and x.device.type == 'cpu' and len(x) > 1
