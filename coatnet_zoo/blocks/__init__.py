"""The token mixers, one file a letter, and what they share."""
from .activation import GELU
from .mbconv import MBConv
from .stem import ConvStem, PatchStem
from .transformer import TransformerBlock

__all__ = ['GELU', 'ConvStem', 'MBConv', 'PatchStem', 'TransformerBlock']
