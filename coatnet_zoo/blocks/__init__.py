"""The blocks of the four block types, one file each, and what they share."""
from torch import nn

from .activation import GELU
from .dynamicconv import DynamicConv2d, DynamicConvBlock
from .lightconv import LightConv2d, LightConvBlock
from .mbconv import MBConv
from .stem import ConvStem, PatchStem
from .transformer import TransformerBlock

__all__ = ['BLOCKS', 'GELU', 'ConvStem', 'DynamicConv2d', 'DynamicConvBlock', 'LightConv2d', 'LightConvBlock', 'MBConv',
           'PatchStem', 'TransformerBlock']

# block type, as a layout names it, and its block
BLOCKS: dict[str, type[nn.Module]] = {'C': MBConv, 'T': TransformerBlock, 'L': LightConvBlock, 'D': DynamicConvBlock}
