"""Initialisation schemes: the official code's, the same with the width taken into account, LeCun's, and timm's."""
import math

from timm.layers import LayerScale
from torch import nn

from ..blocks import LightConv2d
from ..blocks.transformer import RelativeBias

__all__ = ['init_weights']

# Widths of stem and stages for which the official standard deviation of 0.02 was made.
COATNET_0_WIDTHS = (64, 96, 192, 384, 768)


def init_weights(model: nn.Module, scheme: str) -> None:
    """Initialise every convolution, linear layer and bias table of `model`, in place.

    'normal': N(0, 0.02) for all weights and tables, biases 0 (google-research/maxvit).
    'scaled': the same with the standard deviation times sqrt(w / width), at least 1, where w is the width that
    CoAtNet-0 has in that stage: the scale of its outputs is the same for narrower models.
    'fan_in': N(0, 1 / fan_in) with the fan-in of the group (LeCun), biases 0, tables truncated N(0, 0.02).
    'vit_eff': timm's for its coatnet_N_224. Convolutions N(0, sqrt(2 / fan_out)) with the fan-out of their group,
    linear layers of the stages Xavier-uniform, biases of the FFN N(0, 1e-6), others 0, tables truncated N(0, 0.02),
    the head as torch makes it.
    """
    widths = [info['num_chs'] for info in model.feature_info]
    scales = [max(1., math.sqrt(wide / width)) for wide, width in zip(COATNET_0_WIDTHS, widths, strict=True)]

    def std_of(name: str, fan_in: int) -> float:
        if scheme == 'fan_in':
            return 1 / math.sqrt(fan_in)
        place = name.split('.')
        stage = 0 if place[0] == 'stem' else int(place[1]) + 1 if place[0] == 'stages' else 4
        return .02 * (scales[stage] if scheme == 'scaled' else 1)

    for name, module in model.named_modules():
        if isinstance(module, RelativeBias):
            init = nn.init.normal_ if scheme in ('normal', 'scaled') else nn.init.trunc_normal_
            init(module.table, std=.02)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LayerScale, LightConv2d)):
            module.reset_parameters()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            if scheme != 'vit_eff':
                nn.init.normal_(module.weight, std=std_of(name, module.weight[0].numel()))
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
