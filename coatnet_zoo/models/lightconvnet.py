"""LightConvNet and DynamicConvNet: the two convolutions of Pay Less Attention as backbones for images.

Pay Less Attention with Lightweight and Dynamic Convolutions
    Felix Wu, Angela Fan, Alexei Baevski, Yann N. Dauphin, Michael Auli, https://arxiv.org/abs/1901.10430

@inproceedings{wu2018pay,
  author    = {Felix Wu and Angela Fan and Alexei Baevski and Yann Dauphin and Michael Auli},
  title     = {Pay Less Attention with Lightweight and Dynamic Convolutions},
  booktitle = {International Conference on Learning Representations},
  year      = {2019},
  url       = {https://arxiv.org/abs/1901.10430}
}

The paper's models are for sequences; the four stages, the widths and the 7 x 7 kernels are this zoo's, in sizes close
to those of ConvNeXt and Swin.
"""
from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..releases import add_released_tags
from .build import build_backbone
from .config import BackboneCfg

__all__ = []  # register_model appends the names

# Xavier-uniform linear layers as in fairseq; CoAtNet's N(0, 0.02) gives narrow stages far smaller initial weights.
_plain = BackboneCfg('LLLL', act='gelu', stem_width=32, weight_init='vit_eff')
# From tiny on, S1 has one block: a block costs as much there as in S3 and has a sixteenth of the parameters.
model_cfgs = {
    'lightconvnet_pico': replace(_plain, depths=(2, 2, 3, 2), embed_dim=(32, 64, 192, 320)),
    'lightconvnet_nano': replace(_plain, depths=(2, 3, 6, 3), embed_dim=(64, 128, 256, 512)),
    'lightconvnet_tiny': replace(_plain, depths=(1, 2, 8, 2), embed_dim=(96, 192, 384, 768)),
    'lightconvnet_small': replace(_plain, depths=(1, 2, 18, 3), embed_dim=(96, 192, 384, 768), stem_width=48),
    'lightconvnet_base': replace(_plain, depths=(1, 2, 18, 3), embed_dim=(128, 256, 512, 1024), stem_width=64),
    'lightconvnet_pico_64': replace(_plain, depths=(2, 2, 3, 2), embed_dim=(32, 64, 192, 320), stem_stride=1),
}
# The same widths, DynamicConv in S3 and S4, and from nano on fewer blocks: predicting the kernels takes parameters.
model_cfgs |= {
    'dynamicconvnet_pico': replace(model_cfgs['lightconvnet_pico'], layout='LLDD'),
    'dynamicconvnet_nano': replace(model_cfgs['lightconvnet_nano'], layout='LLDD', depths=(2, 3, 5, 3)),
    'dynamicconvnet_tiny': replace(model_cfgs['lightconvnet_tiny'], layout='LLDD', depths=(1, 2, 6, 2)),
    'dynamicconvnet_small': replace(model_cfgs['lightconvnet_small'], layout='LLDD', depths=(1, 2, 14, 3)),
    'dynamicconvnet_base': replace(model_cfgs['lightconvnet_base'], layout='LLDD', depths=(1, 2, 14, 3)),
    'dynamicconvnet_pico_64': replace(model_cfgs['lightconvnet_pico_64'], layout='LLDD'),
}


def _cfg(size: int = 224, pool: int = 7, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': (pool, pool), 'fixed_input_size': False,
        'crop_pct': 0.95, 'interpolation': 'bicubic', 'mean': IMAGENET_INCEPTION_MEAN, 'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'stem.conv1', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1901.10430', **kwargs}


default_cfgs = generate_default_cfgs(add_released_tags({
    'lightconvnet_pico.untrained': _cfg(),
    'lightconvnet_nano.untrained': _cfg(),
    'lightconvnet_tiny.untrained': _cfg(),
    'lightconvnet_small.untrained': _cfg(),
    'lightconvnet_base.untrained': _cfg(),
    'lightconvnet_pico_64.untrained': _cfg(size=64, pool=4, crop_pct=1.0),
    'dynamicconvnet_pico.untrained': _cfg(),
    'dynamicconvnet_nano.untrained': _cfg(),
    'dynamicconvnet_tiny.untrained': _cfg(),
    'dynamicconvnet_small.untrained': _cfg(),
    'dynamicconvnet_base.untrained': _cfg(),
    'dynamicconvnet_pico_64.untrained': _cfg(size=64, pool=4, crop_pct=1.0),
}))


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> nn.Module:
    return build_backbone(variant, model_cfgs[variant], pretrained, **kwargs)


@register_model
def lightconvnet_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLLL, about 4 M parameters."""
    return _create('lightconvnet_pico', pretrained, **kwargs)


@register_model
def lightconvnet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLLL, about 15 M parameters."""
    return _create('lightconvnet_nano', pretrained, **kwargs)


@register_model
def lightconvnet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLLL, about 28 M parameters."""
    return _create('lightconvnet_tiny', pretrained, **kwargs)


@register_model
def lightconvnet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLLL, about 50 M parameters."""
    return _create('lightconvnet_small', pretrained, **kwargs)


@register_model
def lightconvnet_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLLL, about 89 M parameters."""
    return _create('lightconvnet_base', pretrained, **kwargs)


@register_model
def lightconvnet_pico_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """lightconvnet_pico for small images: stem stride 1, total stride 16."""
    return _create('lightconvnet_pico_64', pretrained, **kwargs)


@register_model
def dynamicconvnet_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLDD, about 4 M parameters."""
    return _create('dynamicconvnet_pico', pretrained, **kwargs)


@register_model
def dynamicconvnet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLDD, about 15 M parameters."""
    return _create('dynamicconvnet_nano', pretrained, **kwargs)


@register_model
def dynamicconvnet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLDD, about 28 M parameters."""
    return _create('dynamicconvnet_tiny', pretrained, **kwargs)


@register_model
def dynamicconvnet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLDD, about 50 M parameters."""
    return _create('dynamicconvnet_small', pretrained, **kwargs)


@register_model
def dynamicconvnet_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LLDD, about 89 M parameters."""
    return _create('dynamicconvnet_base', pretrained, **kwargs)


@register_model
def dynamicconvnet_pico_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """dynamicconvnet_pico for small images: stem stride 1, total stride 16."""
    return _create('dynamicconvnet_pico_64', pretrained, **kwargs)
