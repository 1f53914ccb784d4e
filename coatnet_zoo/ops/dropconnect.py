"""DropConnect on normalised weights, with the same mask in every backend.

A weight is kept if hash(seed, index) >= p * 2^32. Kept weights are divided by 1 - p and not normalised again, as by
fairseq's F.dropout. `index` is the row-major index of the weight: in (G, Kh, Kw) for LightConv, which draws one mask a
call, and in (B, H, W, G, Kh, Kw) for DynamicConv. torch draws the seed outside the operator, so that all backends, and
a recomputation under gradient checkpointing, use the same mask.
"""
import torch

__all__ = ['draw_seed', 'dropconnect_scale', 'threshold']


def draw_seed(device: torch.device) -> torch.Tensor:
    """Draw a seed, (1,) int64, from torch's generator of that device."""
    return torch.randint(0, 0x7fffffffffffffff, (1,), dtype=torch.int64, device=device)


def threshold(dropconnect: float) -> int:
    """Smallest 32-bit hash that keeps a weight: floor(p * 2^32)."""
    return int(dropconnect * 2.0**32)


def _mix(h: torch.Tensor) -> torch.Tensor:
    """Bijective 32-bit hash in int64 (skeeto's hash-prospector); its factors are below 2^31, so nothing overflows."""
    h = (h ^ (h >> 16)) * 0x21f0aaad & 0xffffffff
    h = (h ^ (h >> 15)) * 0x735a2d97 & 0xffffffff
    return h ^ (h >> 15)


def dropconnect_scale(seed: torch.Tensor, count: int, dropconnect: float, dtype: torch.dtype) -> torch.Tensor:
    """(count,) factors of the weights 0 to count - 1: 0 where dropped, 1 / (1 - p) where kept."""
    index = torch.arange(count, device=seed.device)
    h = _mix((index ^ seed) & 0xffffffff)
    h = _mix(h ^ (index >> 32) ^ (seed >> 32))
    return (h >= threshold(dropconnect)).to(dtype) / (1 - dropconnect)
