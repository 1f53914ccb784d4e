"""Backbone: a stem, four stages spelled by four letters, and a head; and the whole timm contract, once.

CoAtNet: Marrying Convolution and Attention for All Data Sizes, https://arxiv.org/abs/2106.04803
Pay Less Attention with Lightweight and Dynamic Convolutions, https://arxiv.org/abs/1901.10430

    letter  block                                                                paper
    C       MBConv with squeeze-excite                                           CoAtNet
    T       Transformer block with relative attention                            CoAtNet
    L       LightConv: a softmax-normalised kernel shared by a head's channels   Pay Less Attention
    D       DynamicConv: the same kernel, predicted afresh at each position      Pay Less Attention

`coatnet_0` is the word CCTT, `lightconvnet_tiny` LLLL. Tensors between stages are (B, C, H, W), channels_last in
memory.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices  # these two are what timm's own models use; neither has
from timm.models._input import update_model_input_size  # a public alias
from torch import nn

from ..blocks import GELU, ConvStem, DynamicConvBlock, LightConvBlock, MBConv, PatchStem, TransformerBlock
from ..blocks.stem import ImageCheck, check_size
from .weight_init import init_weights

__all__ = ['FLAVORS', 'LETTERS', 'Backbone', 'BackboneCfg']

LETTERS = {'C': MBConv, 'T': TransformerBlock, 'L': LightConvBlock, 'D': DynamicConvBlock}
POOLS = ('avg', 'max', 'avgmax', '')  # timm's, less 'catavgmax', which would change the width under the head's norm

# What the authors' shared code (google-research/maxvit) and timm's coatnet_N_224 do differently, field by field; the
# reasons stand with the fields of BackboneCfg. Padding is symmetric and bias tables resize bilinearly in both: no
# official checkpoint exists that would need TensorFlow's asymmetric SAME.
FLAVORS: dict[str, dict[str, Any]] = {
    'official': dict(
        conv_stride='expand', act='gelu_tanh', conv_norm_eps=1e-3, conv_norm_momentum=0.01, norm_eps=1e-5,
        stem_bias=True, weight_init='normal', softmax='float32', drop_path_ramp='open'),
    'timm': dict(
        conv_stride='depthwise', act='gelu', conv_norm_eps=1e-5, conv_norm_momentum=0.1, norm_eps=1e-6,
        stem_bias=False, weight_init='vit_eff', softmax='input', drop_path_ramp='closed'),
}


@dataclass(frozen=True)
class BackboneCfg:
    """What a published variant or an ablation sets; each field is also a keyword of `timm.create_model`.

    Raises ValueError for a value that no model can have, naming the field, the known values and the one found.
    """

    layout: str = 'CCTT'                                    # one letter a stage, see LETTERS
    depths: tuple[int, ...] = (2, 2, 6, 2)                  # blocks of each stage, S1 to S4
    embed_dim: tuple[int, ...] = (96, 192, 384, 768)        # channels of each stage
    stem: Literal['conv', 'vit'] = 'conv'                   # 'vit': the paper's ViT_REL, patch 16, no further stride
    stem_width: int = 64                                    # channels of S0; with stem='vit' it is embed_dim[0]
    stem_stride: Literal[2, 1] = 2                          # 1 in the models for small images
    expand_ratio: float = 4.                                # of MBConv, from its output width
    se_ratio: float = 0.25                                  # of squeeze-excite, from the same
    mlp_ratio: float = 4.                                   # of the FFN
    head_dim: int = 32                                      # channels of an attention head
    head_hidden_size: int = -1                              # tanh layer before the classifier: -1 as wide as S4, 0 none
    kernel_size: tuple[int, ...] = (7, 7, 7, 7)             # of L and D in each stage, odd
    conv_head_dim: int = 32                                 # channels that share a kernel in L and D
    glu: bool = True                                        # gate the input of L and D (paper)
    normalize: Literal['softmax', 'none'] = 'softmax'       # of the kernels of L and D; D diverged without (paper)
    dropconnect: float = 0.                                 # rate at which L and D drop normalised kernel weights
    static_branch: bool = False                             # a depthwise convolution beside that of D
    layer_scale: float = 0.1                                # of L and D at the start (CaiT, shallow models); 0 none
    rel_bias: Literal['pre', 'post', 'none'] = 'pre'        # relative bias before or after the softmax, or not at all
    conv_norm: Literal['batch', 'layer'] = 'batch'          # BatchNorm is faster, quality is the same (paper)
    conv_stride: Literal['expand', 'depthwise'] = 'expand'  # the paper's default; 'depthwise' is its better, dearer row
    act: Literal['gelu_tanh', 'gelu'] = 'gelu_tanh'         # the official GELU is the tanh approximation
    conv_norm_eps: float = 1e-3                             # official BatchNorm follows EfficientNet on TPU
    conv_norm_momentum: float = 0.01                        # TensorFlow's 0.99; short runs want more, say 0.1
    norm_eps: float = 1e-5                                  # official LayerNorm; timm has 1e-6
    stem_bias: bool = True                                  # official stem convolutions carry a bias
    weight_init: Literal['normal', 'scaled', 'fan_in', 'vit_eff'] = 'normal'  # official: N(0, 0.02), biases 0
    softmax: Literal['float32', 'input'] = 'float32'        # official attention casts its logits to float32
    drop_path_ramp: Literal['open', 'closed'] = 'open'      # block i of N: rate * i / N (official), or i / (N - 1)

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                known = get_args(hint)
                if type(value) is not type(known[0]) or value not in known:
                    raise ValueError(f'{name} must be one of {", ".join(map(repr, known))}, got {value!r}.')
            elif get_origin(hint) is tuple:
                if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 4 or not all(
                        type(v) is int and v > 0 for v in value):
                    raise ValueError(f'{name} must be four positive integers, one a stage, got {value!r}.')
                object.__setattr__(self, name, tuple(value))  # lists come from config.json
            elif hint is bool and type(value) is not bool:
                raise ValueError(f'{name} must be True or False, got {value!r}.')
            elif name == 'head_hidden_size':
                if type(value) is not int or value < -1:
                    raise ValueError(f'{name} must be a width, 0 for none or -1 for that of S4, got {value!r}.')
            elif name in ('dropconnect', 'layer_scale'):
                below = 1 if name == 'dropconnect' else math.inf
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
                    raise ValueError(f'{name} must be a number from 0 to below {below}, got {value!r}.')
            elif hint in (int, float) and (
                    isinstance(value, bool) or not isinstance(value, (int, hint)) or not 0 < value < math.inf):
                raise ValueError(f'{name} must be a positive {hint.__name__}, got {value!r}.')
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f'kernel_size must be odd in every stage, got {self.kernel_size!r}.')
        if not isinstance(self.layout, str) or len(self.layout) != 4 or not set(self.layout) <= set(LETTERS):
            raise ValueError(
                f'layout must be four letters, one a stage, out of {", ".join(LETTERS)}, got {self.layout!r}.')

    def with_options(self, flavor: str = '', **options: Any) -> 'BackboneCfg':
        """This configuration with a preset of FLAVORS and then single fields put over it."""
        if flavor not in ('', *FLAVORS):
            raise ValueError(f'flavor must be one of {", ".join(map(repr, FLAVORS))}, got {flavor!r}.')
        return dataclasses.replace(self, **{**FLAVORS.get(flavor, {}), **options})

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of the stem and of each stage."""
        return (16, 1, 1, 1, 1) if self.stem == 'vit' else (self.stem_stride, 2, 2, 2, 2)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Stride of the features after the stem and after each stage, against the image."""
        products = [1]
        for stride in self.strides:
            products.append(products[-1] * stride)
        return tuple(products[1:])

    def drop_path_rates(self, rate: float) -> list[float]:
        """Stochastic depth of every block, growing linearly."""
        blocks = sum(self.depths)
        return [rate * i / (blocks if self.drop_path_ramp == 'open' else max(blocks - 1, 1)) for i in range(blocks)]


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, '__index__') or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')


def _check_head(num_classes: Any, global_pool: Any) -> None:
    _check_count('num_classes', num_classes, 0)
    if not isinstance(global_pool, str) or global_pool not in POOLS:
        raise ValueError(f'global_pool must be one of {", ".join(map(repr, POOLS))}, got {global_pool!r}.')


class Stage(nn.Module):
    """Blocks of one letter at one resolution, the first of which takes the stride and the new width."""

    def __init__(self, block: Callable[..., nn.Module], dim: int, dim_out: int, stride: int, drop_path: list[float]):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*(
            block(dim if i == 0 else dim_out, dim_out, stride=stride if i == 0 else 1, drop_path=rate)
            for i, rate in enumerate(drop_path)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Backbone(nn.Module):
    """(B, in_chans, H, W) images to (B, num_classes) logits.

    Args:
        cfg: The variant.
        img_size: Image size in pixels, int or (H, W). Words with attention are made for it; others take any size.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the classifier out (the tanh layer before it stays, as in timm's CoAtNet).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled (B, num_classes, h, w).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth; `cfg.drop_path_ramp` says how it grows from block to block.
        dynamic_img_size: Take another image size at every call, resizing the relative-bias tables for it.
        device: Where parameters are created.
        dtype: Of the parameters.

    Raises ValueError for an image size that the word cannot take.
    """

    def __init__(
            self,
            cfg: BackboneCfg,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            dynamic_img_size: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        _check_count('in_chans', in_chans, 1)
        _check_head(num_classes, global_pool)
        for name, value in (('drop_rate', drop_rate), ('drop_path_rate', drop_path_rate)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f'{name} must be a probability from 0 to below 1, got {value!r}.')
        if type(dynamic_img_size) is not bool:
            raise ValueError(f'dynamic_img_size must be True or False, got {dynamic_img_size!r}.')
        self.cfg = cfg
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.embed_dim = cfg.embed_dim[-1]
        self.dynamic_img_size = dynamic_img_size
        if 'T' in cfg.layout:
            rule = 'multiple' if dynamic_img_size else 'fixed'
        else:
            rule = 'multiple' if cfg.stem == 'vit' else 'free'
        self._traits = dict(fixed_input_size=rule == 'fixed')  # timm asks here whether img_size must be passed on
        self.img_size = self._checked_size(img_size)
        feat_sizes = self._feat_sizes(self.img_size)

        act_layer = partial(GELU, cfg.act)
        layer_norm, layer_norm_2d = partial(nn.LayerNorm, eps=cfg.norm_eps), partial(LayerNorm2d, eps=cfg.norm_eps)
        conv_norm = layer_norm_2d if cfg.conv_norm == 'layer' else partial(
            nn.BatchNorm2d, eps=cfg.conv_norm_eps, momentum=cfg.conv_norm_momentum)
        light = dict(
            head_dim=cfg.conv_head_dim, glu=cfg.glu, normalize=cfg.normalize, dropconnect=cfg.dropconnect,
            mlp_ratio=cfg.mlp_ratio, layer_scale=cfg.layer_scale, norm_layer=layer_norm, act_layer=act_layer, **dd)
        blocks = {
            'C': lambda stage: partial(
                MBConv, expand_ratio=cfg.expand_ratio, se_ratio=cfg.se_ratio, conv_stride=cfg.conv_stride,
                norm_layer=conv_norm, act_layer=act_layer, **dd),
            'T': lambda stage: partial(
                TransformerBlock, feat_size=feat_sizes[stage + 1], mlp_ratio=cfg.mlp_ratio, head_dim=cfg.head_dim,
                rel_bias=cfg.rel_bias, softmax=cfg.softmax, dynamic=dynamic_img_size, norm_layer=layer_norm,
                act_layer=act_layer, **dd),
            'L': lambda stage: partial(LightConvBlock, kernel_size=cfg.kernel_size[stage], **light),
            'D': lambda stage: partial(
                DynamicConvBlock, kernel_size=cfg.kernel_size[stage], static_branch=cfg.static_branch, **light),
        }

        check = ImageCheck(in_chans, self.img_size, cfg.reductions[-1], rule)
        if cfg.stem == 'vit':
            width = cfg.embed_dim[0]
            self.stem = PatchStem(check, width, cfg.strides[0], cfg.stem_bias, **dd)
        else:
            width = cfg.stem_width
            self.stem = ConvStem(check, width, cfg.stem_stride, cfg.stem_bias, conv_norm, act_layer, **dd)

        rates = iter(cfg.drop_path_rates(drop_path_rate))
        dims = (width, *cfg.embed_dim)
        self.stages = nn.Sequential(*(
            Stage(blocks[letter](i), dims[i], dims[i + 1], cfg.strides[i + 1],
                  [next(rates) for _ in range(cfg.depths[i])])
            for i, letter in enumerate(cfg.layout)))
        names = ('stem', *(f'stages.{i}' for i in range(4)))
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction, module=name)
            for dim, reduction, name in zip(dims, cfg.reductions, names, strict=True)]

        hidden = self.num_features if cfg.head_hidden_size == -1 else cfg.head_hidden_size
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, hidden_size=hidden or None, pool_type=global_pool, drop_rate=drop_rate,
            norm_layer=layer_norm_2d, **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def init_weights(self) -> None:
        """(Re)initialise every parameter by `cfg.weight_init`."""
        init_weights(self, self.cfg.weight_init)

    def _checked_size(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        try:
            size = tuple(map(index, img_size if isinstance(img_size, Sequence) else (img_size, img_size)))
        except TypeError:
            size = ()
        if len(size) != 2:
            raise ValueError(f'img_size must be one integer or two (height, width), got {img_size!r}.')
        divisible = 'T' in self.cfg.layout or self.cfg.stem == 'vit'
        check_size(*size, total_stride=self.cfg.reductions[-1], divisible=divisible)
        return size

    def _feat_sizes(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        return [(-(-img_size[0] // r), -(-img_size[1] // r)) for r in self.cfg.reductions]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Make the model one for images of another size (H, W), resizing its bias tables; None keeps the size."""
        img_size = self.img_size if img_size is None else self._checked_size(img_size)
        for stage, feat_size in zip(self.stages, self._feat_sizes(img_size)[1:], strict=False):  # fewer once pruned
            for block in stage.blocks:
                if hasattr(block, 'set_feat_size'):
                    block.set_feat_size(feat_size)
        self.img_size = img_size
        next(m for m in self.stem.modules() if isinstance(m, ImageCheck)).img_size = img_size
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative-bias tables (official recipe: nothing named bias decays)."""
        return {name for name, _ in self.named_parameters() if name.endswith('rel_bias.table')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning-rate decay: a stage each if coarse, else a block each."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.blocks\.(\d+)', None)])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new, randomly initialised classifier; `reset_other` also drops the norm and tanh layer before it."""
        _check_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of the stem (index 0) and of the stages (1 to 4).

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n if int, all if None, else those listed.
            norm: Accepted as in timm; the only norm of the model comes after pooling, so nothing changes.
            stop_early: Leave out the stages after the last index asked for.
            output_fmt: 'NCHW' alone.
            intermediates_only: Return only the list, not the final features before it.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        intermediates = [x] if 0 in take_indices else []
        stages = self.stages[:max_index] if stop_early else self.stages
        for i, stage in enumerate(stages, 1):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last index, and the head with them; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        cut = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or cut:
            self.reset_classifier(0, '', reset_other=True)
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, h, w)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> logits, or what the classifier takes (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
