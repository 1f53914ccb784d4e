"""CoAtNet-0 to CoAtNet-5, smaller variants, and variants with DynamicConv in place of attention.

CoAtNet: Marrying Convolution and Attention for All Data Sizes
    Zihang Dai, Hanxiao Liu, Quoc V. Le, Mingxing Tan, https://arxiv.org/abs/2106.04803

@article{DBLP:journals/corr/abs-2106-04803,
  author  = {Zihang Dai and Hanxiao Liu and Quoc V. Le and Mingxing Tan},
  title   = {CoAtNet: Marrying Convolution and Attention for All Data Sizes},
  journal = {CoRR},
  volume  = {abs/2106.04803},
  year    = {2021}
}

The authors published no CoAtNet code or weights; what the paper leaves open follows their MaxViT code, which has
the same blocks (google-research/maxvit). timm's maxxvit.py differs in the place of the stride (here the first 1x1, the
paper's default) and in the other fields of `config.FLAVORS`; `flavor='timm'` sets timm's choices.
"""
from dataclasses import replace
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .. import kecam
from ..releases import add_released_tags
from .build import build_backbone
from .config import BackboneCfg

__all__ = []  # register_model appends the names

# Narrow models use timm's initialisation: N(0, 0.02) is meant for widths of 96 and more (results/weight_init_*.json).
_narrow = BackboneCfg(weight_init='vit_eff')
# The paper's table of the family, S0 to S4. pico and nano are this zoo's; head_dim divides their widths in every stage.
model_cfgs = {
    'coatnet_pico': replace(_narrow, depths=(2, 2, 4, 2), embed_dim=(32, 64, 160, 320), stem_width=32),
    'coatnet_nano': replace(_narrow, depths=(2, 3, 6, 3), embed_dim=(64, 128, 256, 512), stem_width=48),
    'coatnet_0': BackboneCfg(depths=(2, 3, 5, 2), embed_dim=(96, 192, 384, 768), stem_width=64),
    'coatnet_1': BackboneCfg(depths=(2, 6, 14, 2), embed_dim=(96, 192, 384, 768), stem_width=64),
    'coatnet_2': BackboneCfg(depths=(2, 6, 14, 2), embed_dim=(128, 256, 512, 1024), stem_width=128),
    'coatnet_3': BackboneCfg(depths=(2, 6, 14, 2), embed_dim=(192, 384, 768, 1536), stem_width=192),
    'coatnet_4': BackboneCfg(depths=(2, 12, 28, 2), embed_dim=(192, 384, 768, 1536), stem_width=192),
    'coatnet_5': BackboneCfg(depths=(2, 12, 28, 2), embed_dim=(256, 512, 1280, 2048), stem_width=192, head_dim=64),
    'coatnet_pico_64': replace(
        _narrow, depths=(2, 2, 4, 2), embed_dim=(32, 64, 160, 320), stem_width=32, stem_stride=1),  # for 64 px images
}
# CoAtNet-0 as keras_cv_attention_models implements it, for its weights; depths and widths are those of the paper.
model_cfgs['coatnet_0_kecam'] = replace(model_cfgs['coatnet_0'], weight_init='vit_eff', **kecam.CHOICES)
# DynamicConv, linear in the number of positions, in place of attention.
model_cfgs |= {
    'coatnet_0_ccdd': replace(model_cfgs['coatnet_0'], layout='CCDD'),
    'coatnet_1_ccdd': replace(model_cfgs['coatnet_1'], layout='CCDD'),
    'coatnet_2_ccdd': replace(model_cfgs['coatnet_2'], layout='CCDD'),
    'coatnet_pico_ccdd_64': replace(model_cfgs['coatnet_pico_64'], layout='CCDD'),
}


def _cfg(size: int = 224, pool: int = 7, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': (pool, pool), 'fixed_input_size': True,
        'crop_pct': 0.95, 'interpolation': 'bicubic', 'mean': IMAGENET_INCEPTION_MEAN, 'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'stem.conv1', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:2106.04803', **kwargs}


def _kecam_cfg(tag: str, size: int, pool: int) -> dict[str, Any]:
    weights = kecam.WEIGHTS[f'coatnet_0_kecam.{tag}']
    return _cfg(
        size, pool, url=weights.url, mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD, license=kecam.LICENSE['license'],
        origin_url='https://github.com/leondgarse/keras_cv_attention_models',
        description=f'CoAtNet-0 trained on ImageNet-1k at {size} pixels by keras_cv_attention_models, converted from '
                    f'its .h5 file. Top-1 as its author reports: {weights.top1} %.')


default_cfgs = generate_default_cfgs(add_released_tags({
    'coatnet_pico.untrained': _cfg(),
    'coatnet_nano.untrained': _cfg(),
    'coatnet_0.untrained': _cfg(),
    'coatnet_1.untrained': _cfg(),
    'coatnet_2.untrained': _cfg(),
    'coatnet_3.untrained': _cfg(),
    'coatnet_4.untrained': _cfg(),
    'coatnet_5.untrained': _cfg(),
    'coatnet_0_kecam.untrained': _cfg(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    'coatnet_0_kecam.in1k': _kecam_cfg('in1k', 224, 7),
    'coatnet_0_kecam.in1k_160': _kecam_cfg('in1k_160', 160, 5),
    'coatnet_0_ccdd.untrained': _cfg(fixed_input_size=False),
    'coatnet_1_ccdd.untrained': _cfg(fixed_input_size=False),
    'coatnet_2_ccdd.untrained': _cfg(fixed_input_size=False),
    'coatnet_pico_64.untrained': _cfg(size=64, pool=4, crop_pct=1.0),
    'coatnet_pico_ccdd_64.untrained': _cfg(size=64, pool=4, crop_pct=1.0, fixed_input_size=False),
}))


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> nn.Module:
    return build_backbone(variant, model_cfgs[variant], pretrained, **kwargs)


@register_model
def coatnet_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CCTT, 4 M parameters."""
    return _create('coatnet_pico', pretrained, **kwargs)


@register_model
def coatnet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CCTT, 15 M parameters."""
    return _create('coatnet_nano', pretrained, **kwargs)


@register_model
def coatnet_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-0 of the paper."""
    return _create('coatnet_0', pretrained, **kwargs)


@register_model
def coatnet_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-1 of the paper."""
    return _create('coatnet_1', pretrained, **kwargs)


@register_model
def coatnet_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-2 of the paper."""
    return _create('coatnet_2', pretrained, **kwargs)


@register_model
def coatnet_3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-3 of the paper."""
    return _create('coatnet_3', pretrained, **kwargs)


@register_model
def coatnet_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-4 of the paper."""
    return _create('coatnet_4', pretrained, **kwargs)


@register_model
def coatnet_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-5 of the paper."""
    return _create('coatnet_5', pretrained, **kwargs)


@register_model
def coatnet_pico_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """coatnet_pico for small images: stem stride 1, total stride 16."""
    return _create('coatnet_pico_64', pretrained, **kwargs)


@register_model
def coatnet_0_kecam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-0 as keras_cv_attention_models implements it, with its ImageNet-1k weights."""
    return _create('coatnet_0_kecam', pretrained, **kwargs)


@register_model
def coatnet_0_ccdd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-0 with DynamicConv in place of attention."""
    return _create('coatnet_0_ccdd', pretrained, **kwargs)


@register_model
def coatnet_1_ccdd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-1 with DynamicConv in place of attention."""
    return _create('coatnet_1_ccdd', pretrained, **kwargs)


@register_model
def coatnet_2_ccdd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoAtNet-2 with DynamicConv in place of attention."""
    return _create('coatnet_2_ccdd', pretrained, **kwargs)


@register_model
def coatnet_pico_ccdd_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """coatnet_pico_64 with DynamicConv in place of attention."""
    return _create('coatnet_pico_ccdd_64', pretrained, **kwargs)
