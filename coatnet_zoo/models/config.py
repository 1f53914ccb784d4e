"""BackboneCfg: options of published variants and ablations. FLAVORS: two presets for what the paper leaves open.

Each field of BackboneCfg is also a keyword of `timm.create_model`.
"""
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ..blocks import BLOCKS

__all__ = ['FLAVORS', 'BackboneCfg']

# Fields in which the authors' shared code (google-research/maxvit) and timm's coatnet_N_224 differ; the comments on the
# fields of BackboneCfg explain them. Padding is symmetric and bias tables resize bilinearly in both: no
# official checkpoint exists that would need TensorFlow's asymmetric SAME.
FLAVORS: dict[str, dict[str, Any]] = {
    'official': dict(
        conv_stride='expand', act='gelu_tanh', conv_norm_eps=1e-3, conv_norm_momentum=0.01, norm_eps=1e-5,
        stem_bias=True, weight_init='normal', attn_softmax_dtype='float32', drop_path_schedule='exclusive'),
    'timm': dict(
        conv_stride='depthwise', act='gelu', conv_norm_eps=1e-5, conv_norm_momentum=0.1, norm_eps=1e-6,
        stem_bias=False, weight_init='vit_eff', attn_softmax_dtype='input', drop_path_schedule='inclusive'),
}


@dataclass(frozen=True)
class BackboneCfg:
    """Architecture of a `Backbone`, independent of image size, image channels and number of classes.

    Raises:
        ValueError: An invalid value; the message names the field, the rule and the value found.
    """

    # Stages S1 to S4
    layout: str = 'CCTT'                                    # block type of each stage, out of blocks.BLOCKS
    depths: tuple[int, ...] = (2, 2, 6, 2)                  # blocks
    embed_dim: tuple[int, ...] = (96, 192, 384, 768)        # channels
    act: Literal['gelu_tanh', 'gelu'] = 'gelu_tanh'         # the official GELU is the tanh approximation
    pool: Literal['avg', 'max'] = 'avg'                     # in a stage's first block; avg in the authors' later code
    # block i of N drops its branches at rate * i / N (exclusive, official) or rate * i / (N - 1) (inclusive, timm)
    drop_path_schedule: Literal['exclusive', 'inclusive'] = 'exclusive'

    # Stem S0
    stem: Literal['conv', 'vit'] = 'conv'                   # 'vit': the paper's ViT_REL, patch 16, no further stride
    stem_width: int = 64                                    # channels; with stem='vit' it is embed_dim[0]
    stem_stride: Literal[2, 1] = 2                          # 1 in the models for small images
    stem_bias: bool = True                                  # official stem convolutions carry a bias

    # C: MBConv
    conv_stride: Literal['expand', 'depthwise'] = 'expand'  # the paper's default; 'depthwise': better but costlier
    expand_ratio: float = 4.                                # hidden channels as a multiple of the output width
    se_ratio: float = 0.25                                  # squeeze channels as a fraction of the output width
    se_act: Literal['silu', 'act'] = 'silu'                 # in squeeze-excite: EfficientNet's, or the block's own
    # C and T: width that sets those of expansion, squeeze and q, k, v: the output's (official) or the input's (kecam)
    inner_width: Literal['output', 'input'] = 'output'

    # T: relative attention
    head_dim: int = 32                                      # channels of an attention head
    rel_bias: Literal['pre', 'post', 'none'] = 'pre'        # relative bias before or after the softmax, or not at all
    attn_softmax_dtype: Literal['float32', 'input'] = 'float32'  # official attention casts its logits to float32

    # L and D: LightConv and DynamicConv
    kernel_size: tuple[int, ...] = (7, 7, 7, 7)             # side of the kernel in each stage, odd
    conv_head_dim: int = 32                                 # channels that share a kernel
    glu: bool = True                                        # gate the input of the convolution (paper)
    normalize: Literal['softmax', 'none'] = 'softmax'       # of the kernels; without it D diverged (paper)
    dropconnect: float = 0.                                 # rate at which normalised kernel weights are dropped
    static_branch: bool = False                             # add a depthwise convolution in parallel in D
    layer_scale: float = 0.1                                # initial value (CaiT, shallow models); 0 for none

    # T, L and D: feed-forward network
    mlp_ratio: float = 4.                                   # hidden channels as a multiple of the width

    # Head
    head_norm: Literal['layer', 'none'] = 'layer'           # LayerNorm between pooling and classifier (official)
    head_hidden_size: int = -1                              # tanh layer before the classifier: -1 as wide as S4, 0 none

    # Norms
    conv_norm: Literal['batch', 'layer'] = 'batch'          # of stem and C; BatchNorm: faster, as accurate (paper)
    conv_norm_eps: float = 1e-3                             # official BatchNorm follows EfficientNet on TPU
    conv_norm_momentum: float = 0.01                        # TensorFlow's 0.99; use about 0.1 for short runs
    norm_eps: float = 1e-5                                  # official LayerNorm; timm has 1e-6

    # Initialisation
    weight_init: Literal['normal', 'vit_eff'] = 'normal'    # official: N(0, 0.02) throughout, biases 0

    def __post_init__(self) -> None:
        if not isinstance(self.layout, str) or len(self.layout) != 4 or not set(self.layout) <= set(BLOCKS):
            raise ValueError(
                f'layout must be four block types, one a stage, out of {", ".join(BLOCKS)}, got {self.layout!r}.')
        self._check_stages('depths', 'embed_dim', 'kernel_size')
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f'kernel_size must be odd in every stage, got {self.kernel_size!r}.')
        self._check_choices(
            'act', 'pool', 'drop_path_schedule', 'stem', 'stem_stride', 'conv_stride', 'se_act', 'inner_width',
            'rel_bias', 'attn_softmax_dtype', 'normalize', 'head_norm', 'conv_norm', 'weight_init')
        self._check_switches('stem_bias', 'glu', 'static_branch')
        self._check_positive(int, 'stem_width', 'head_dim', 'conv_head_dim')
        self._check_positive(
            float, 'expand_ratio', 'se_ratio', 'mlp_ratio', 'conv_norm_eps', 'conv_norm_momentum', 'norm_eps')
        self._check_range('dropconnect', 1)
        self._check_range('layer_scale', math.inf)
        if type(self.head_hidden_size) is not int or self.head_hidden_size < -1:
            raise ValueError(
                f'head_hidden_size must be a width, 0 for none or -1 for that of S4, got {self.head_hidden_size!r}.')

    def with_options(self, flavor: str = '', **options: Any) -> 'BackboneCfg':
        """Copy with the fields of a preset of FLAVORS and then those of `options` replaced; ValueError if invalid."""
        if flavor not in ('', *FLAVORS):
            raise ValueError(f'flavor must be one of {", ".join(map(repr, FLAVORS))}, got {flavor!r}.')
        return dataclasses.replace(self, **{**FLAVORS.get(flavor, {}), **options})

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of the stem and of each stage."""
        return (16, 1, 1, 1, 1) if self.stem == 'vit' else (self.stem_stride, 2, 2, 2, 2)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Total stride of the features after the stem and after each stage."""
        products = [1]
        for stride in self.strides:
            products.append(products[-1] * stride)
        return tuple(products[1:])

    def drop_path_rates(self, rate: float) -> list[float]:
        """Stochastic depth rate of every block, growing linearly from 0 by `drop_path_schedule`."""
        blocks = sum(self.depths)
        steps = blocks if self.drop_path_schedule == 'exclusive' else max(blocks - 1, 1)
        return [rate * i / steps for i in range(blocks)]

    def _check_stages(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 4 or not all(
                    type(v) is int and v > 0 for v in value):
                raise ValueError(f'{name} must be four positive integers, one a stage, got {value!r}.')
            object.__setattr__(self, name, tuple(value))  # lists come from config.json

    def _check_choices(self, *names: str) -> None:
        hints = get_type_hints(type(self))
        for name in names:
            value, choices = getattr(self, name), get_args(hints[name])
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.')

    def _check_switches(self, *names: str) -> None:
        for name in names:
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f'{name} must be True or False, got {value!r}.')

    def _check_positive(self, kind: type[int] | type[float], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
                raise ValueError(f'{name} must be a positive {kind.__name__}, got {value!r}.')

    def _check_range(self, name: str, below: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
            raise ValueError(f'{name} must be a number from 0 to below {below}, got {value!r}.')
