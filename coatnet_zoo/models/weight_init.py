"""The two initialisations: the official code's and timm's."""
import math

from timm.layers import LayerScale
from torch import nn

from ..blocks import LightConv2d
from ..blocks.transformer import RelativeBias

__all__ = ['init_weights']


def init_weights(model: nn.Module, scheme: str) -> None:
    """Initialise every convolution, linear layer and bias table of `model`, in place.

    'normal': N(0, 0.02) for all weights and tables, biases 0 (google-research/maxvit).
    'vit_eff': timm's for its coatnet_N_224. Convolutions N(0, sqrt(2 / fan_out)) with the fan-out of their group,
    linear layers of the stages Xavier-uniform, biases of the FFN N(0, 1e-6), others 0, tables truncated N(0, 0.02),
    the head by torch's default. In N(mean, std) the second number is the standard deviation.
    """
    for name, module in model.named_modules():
        if isinstance(module, RelativeBias):
            init = nn.init.normal_ if scheme == 'normal' else nn.init.trunc_normal_
            init(module.table, std=.02)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LayerScale, LightConv2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            if scheme == 'normal':
                nn.init.normal_(module.weight, std=.02)
            elif name.startswith('head'):
                module.reset_parameters()
                continue
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                if scheme == 'vit_eff' and '.mlp.' in name:
                    nn.init.normal_(module.bias, std=1e-6)
                else:
                    nn.init.zeros_(module.bias)
