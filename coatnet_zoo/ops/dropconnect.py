"""DropConnect on normalised weights: one mask, whoever computes it.

A weight is kept if hash(seed, index) >= p * 2^32, and what is kept is divided by 1 - p, not normalised again (as
fairseq's F.dropout on them). `index` counts the weights row by row: (G, Kh, Kw) for LightConv, which draws one mask a
call, and (B, H, W, G, Kh, Kw) for DynamicConv. The seed is drawn by torch outside the operator, so that naive, eager
and kernel see the same mask, and so does a recomputation under gradient checkpointing.
"""
import torch

__all__ = ['draw_seed', 'dropconnect_scale', 'threshold']


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed (1,) int64 from torch's generator of that device."""
    return torch.randint(0, 0x7fffffffffffffff, (1,), dtype=torch.int64, device=device)


def threshold(dropconnect: float) -> int:
    """The least hash, of 32 bits, that keeps a weight."""
    return int(dropconnect * 2.0**32)


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits in int64 (skeeto's hash-prospector); its factors are below 2^31, so nothing overflows."""
    h = (h ^ (h >> 16)) * 0x21f0aaad & 0xffffffff
    h = (h ^ (h >> 15)) * 0x735a2d97 & 0xffffffff
    return h ^ (h >> 15)


def dropconnect_scale(seed: torch.Tensor, count: int, dropconnect: float, dtype: torch.dtype) -> torch.Tensor:
    """(count,) factors of the weights 0 to count - 1: 0 where dropped, 1 / (1 - p) where kept."""
    index = torch.arange(count, device=seed.device)
    h = _mix((index ^ seed) & 0xffffffff)
    h = _mix(h ^ (index >> 32) ^ (seed >> 32))
    return (h >= threshold(dropconnect)).to(dtype) / (1 - dropconnect)
