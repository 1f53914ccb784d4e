"""The token mixers, one file a letter, and what they share."""
from .activation import GELU
from .dynamicconv import DynamicConv2d, DynamicConvBlock
from .lightconv import LightConv2d, LightConvBlock
from .mbconv import MBConv
from .stem import ConvStem, PatchStem
from .transformer import TransformerBlock

__all__ = ['GELU', 'ConvStem', 'DynamicConv2d', 'DynamicConvBlock', 'LightConv2d', 'LightConvBlock', 'MBConv',
           'PatchStem', 'TransformerBlock']
