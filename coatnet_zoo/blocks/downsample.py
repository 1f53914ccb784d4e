"""Pooling in the first block of a stage: of the shortcut in every block type, and of the branch input in T, L and D."""
from torch import nn

__all__ = ['downsample']


def downsample(stride: int, pool: str = 'avg') -> nn.Module:
    """Pool(x): stride x stride pooling. Ceil mode gives odd sizes the output size of a strided convolution.

    Args:
        stride: 2, or 1 for the identity.
        pool: 'avg' or 'max'.
    """
    if stride == 1:
        return nn.Identity()
    if pool == 'max':
        return nn.MaxPool2d(stride, stride, ceil_mode=True)
    # nothing is padded here, but by default ONNX Runtime 1.20 counts the positions that ceil mode adds
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
