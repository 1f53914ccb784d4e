"""The four block types, one file each, the stems, and the modules that they share."""
from torch import nn

from .activation import GELU
from .dynamicconv import DynamicConv2d, DynamicConvBlock
from .lightconv import LightConv2d, LightConvBlock
from .mbconv import MBConv
from .stem import ConvStem, PatchStem
from .transformer import TransformerBlock

__all__ = ['BLOCKS', 'GELU', 'ConvStem', 'DynamicConv2d', 'DynamicConvBlock', 'LightConv2d', 'LightConvBlock', 'MBConv',
           'PatchStem', 'TransformerBlock']

# block type in a layout -> block class
BLOCKS: dict[str, type[nn.Module]] = {'C': MBConv, 'T': TransformerBlock, 'L': LightConvBlock, 'D': DynamicConvBlock}
