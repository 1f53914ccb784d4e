"""Pooling where a stage begins: of the shortcut in every block type, and of the input of T, L and D."""
from torch import nn

__all__ = ['downsample']


def downsample(stride: int, pool: str = 'avg') -> nn.Module:
    """Pool(x): 2x2 pooling; ceil mode keeps its odd sizes those of a stride-2 convolution.

    Args:
        stride: 1 leaves the map as it is.
        pool: 'avg' or 'max'.
    """
    if stride == 1:
        return nn.Identity()
    if pool == 'max':
        return nn.MaxPool2d(stride, stride, ceil_mode=True)
    # count_include_pad: no padding here, but ONNX Runtime 1.20 counts what ceil mode adds unless told so
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
