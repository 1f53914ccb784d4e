"""Backbone: a stem, four stages and a head; the `layout` names the block type of each stage.

CoAtNet: Marrying Convolution and Attention for All Data Sizes, https://arxiv.org/abs/2106.04803
Pay Less Attention with Lightweight and Dynamic Convolutions, https://arxiv.org/abs/1901.10430

    block type  block                                                                paper
    C           MBConv with squeeze-excite                                           CoAtNet
    T           Transformer block with relative attention                            CoAtNet
    L           LightConv: a softmax-normalised kernel shared by a head's channels   Pay Less Attention
    D           DynamicConv: such a kernel, predicted at each position               Pay Less Attention

`coatnet_0` has layout CCTT, `lightconvnet_tiny` LLLL. Tensors between stages are (B, C, H, W), channels_last in memory.
"""
from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices  # these two are what timm's own models use; neither has
from timm.models._input import update_model_input_size  # a public alias
from torch import nn

from ..blocks import BLOCKS, GELU, ConvStem, PatchStem, TransformerBlock
from ..blocks.stem import InputCheck, check_size
from .config import BackboneCfg
from .weight_init import init_weights

__all__ = ['Backbone']

POOLS = ('avg', 'max', 'avgmax', '')  # timm's, less 'catavgmax', which would change the width under the head's norm


class Backbone(nn.Module):
    """Image classifier: (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        cfg: The variant.
        img_size: Image size in pixels, int or (H, W). A layout with `T` accepts this size only (see dynamic_img_size),
            others any size of at least the total stride; `cfg.stem` 'vit' requires multiples of it.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the classifier out (the tanh layer before it stays, as in timm's CoAtNet).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled (B, num_classes, h, w).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate, which grows from block to block by `cfg.drop_path_schedule`.
        dynamic_img_size: Accept any multiple of the total stride; relative-bias tables are resized at each call.
        device: Device of the parameters.
        dtype: Parameter dtype.

    Raises:
        ValueError: An image size that the layout cannot take, or another invalid argument.
    """

    if TYPE_CHECKING:  # TorchScript would read the annotation too
        pretrained_cfg: dict[str, Any]  # timm's builder sets it

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
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        _check_count('in_chans', in_chans, 1)
        _check_head(num_classes, global_pool)
        _check_rate('drop_rate', drop_rate)
        _check_rate('drop_path_rate', drop_path_rate)
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
        self._traits = dict(fixed_input_size=rule == 'fixed')  # timm reads here whether to pass on img_size
        self.img_size = self._checked_size(img_size)

        check = InputCheck(in_chans, self.img_size, cfg.reductions[-1], rule)
        if cfg.stem == 'vit':
            width = cfg.embed_dim[0]
            stem: nn.Module = PatchStem(check, width, cfg.strides[0], cfg.stem_bias, **dd)
        else:
            width = cfg.stem_width
            stem = ConvStem(
                check, width, cfg.stem_stride, cfg.stem_bias, _conv_norm(cfg), partial(GELU, cfg.act), **dd)
        self.stem = stem

        rates = iter(cfg.drop_path_rates(drop_path_rate))
        dims = (width, *cfg.embed_dim)
        feat_sizes = self._feat_sizes(self.img_size)
        self.stages = nn.Sequential(*(
            Stage(_block_factory(cfg, i, feat_sizes[i + 1], dynamic_img_size, **dd), dims[i], dims[i + 1],
                  cfg.strides[i + 1], [next(rates) for _ in range(depth)])
            for i, depth in enumerate(cfg.depths)))
        names = ('stem', *(f'stages.{i}' for i in range(4)))
        feature_info: list[dict[str, Any]] = [
            dict(num_chs=dim, reduction=reduction, module=name)
            for dim, reduction, name in zip(dims, cfg.reductions, names, strict=True)]
        self.feature_info = feature_info

        hidden = self.num_features if cfg.head_hidden_size == -1 else cfg.head_hidden_size
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, hidden_size=hidden or None, pool_type=global_pool, drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=cfg.norm_eps) if cfg.head_norm == 'layer' else nn.Identity, **dd)
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
        """Adapt the model to images of another size (H, W), resizing its bias tables; None keeps the size."""
        img_size = self.img_size if img_size is None else self._checked_size(img_size)
        for stage, feat_size in zip(self.stages, self._feat_sizes(img_size)[1:], strict=False):  # fewer once pruned
            for module in stage.modules():
                if isinstance(module, TransformerBlock):
                    module.set_feat_size(feat_size)
        self.img_size = img_size
        next(m for m in self.stem.modules() if isinstance(m, InputCheck)).img_size = img_size
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the relative-bias tables (official: none named bias decays)."""
        return {name for name, _ in self.named_parameters() if name.endswith('rel_bias.table')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning-rate decay: one a stage if coarse, else one a block."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.blocks\.(\d+)', None)])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.stages.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Give the head a new, randomly initialised classifier; `reset_other` also drops its norm and tanh layer."""
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
            stop_early: Leave out the stages after the last requested index.
            output_fmt: 'NCHW'; ValueError for any other.
            intermediates_only: Return the list of features only, else (final features, list).
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
        """Drop the stages after the last index, and the head if any stage goes or `prune_head`; return the indices."""
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
        """(B, num_features, h, w) -> logits, or with `pre_logits` the input of the classifier (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """Blocks of one type; the first applies the stride and changes the width.

    (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Args:
        block: Constructor of a block, called with dim, dim_out, stride and drop_path.
        dim: Input channels.
        dim_out: Output channels.
        stride: Stride of the first block.
        drop_path: Stochastic depth rate of each block; the length of the list is the stage's depth.
    """

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


def _block_factory(
        cfg: BackboneCfg, stage: int, feat_size: tuple[int, int], dynamic: bool, **dd: Any) -> Callable[..., nn.Module]:
    """Constructor of the blocks of a stage, with the options of `cfg` bound; takes widths, stride and drop path.

    Args:
        cfg: The variant.
        stage: Index of the stage, 0 to 3.
        feat_size: (H, W) of its maps.
        dynamic: Accept maps of other sizes too.
        **dd: Device and dtype.
    """
    block_type = cfg.layout[stage]
    block = partial(BLOCKS[block_type], act_layer=partial(GELU, cfg.act), pool=cfg.pool, **dd)
    if block_type == 'C':
        return partial(block, expand_ratio=cfg.expand_ratio, se_ratio=cfg.se_ratio, se_act=cfg.se_act,
                       inner_width=cfg.inner_width, conv_stride=cfg.conv_stride, norm_layer=_conv_norm(cfg))
    block = partial(block, mlp_ratio=cfg.mlp_ratio, norm_layer=partial(nn.LayerNorm, eps=cfg.norm_eps))
    if block_type == 'T':
        return partial(block, feat_size=feat_size, head_dim=cfg.head_dim, rel_bias=cfg.rel_bias,
                       softmax_dtype=cfg.attn_softmax_dtype, inner_width=cfg.inner_width, dynamic=dynamic)
    if block_type == 'D':
        block = partial(block, static_branch=cfg.static_branch)
    return partial(block, kernel_size=cfg.kernel_size[stage], head_dim=cfg.conv_head_dim, glu=cfg.glu,
                   normalize=cfg.normalize, dropconnect=cfg.dropconnect, layer_scale=cfg.layer_scale)


def _conv_norm(cfg: BackboneCfg) -> Callable[..., nn.Module]:
    """Constructor of the norms of stem and MBConv; takes the number of channels."""
    if cfg.conv_norm == 'layer':
        return partial(LayerNorm2d, eps=cfg.norm_eps)
    return partial(nn.BatchNorm2d, eps=cfg.conv_norm_eps, momentum=cfg.conv_norm_momentum)


def _check_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not hasattr(value, '__index__') or value < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f'{name} must be a probability from 0 to below 1, got {value!r}.')


def _check_head(num_classes: Any, global_pool: Any) -> None:
    _check_count('num_classes', num_classes, 0)
    if not isinstance(global_pool, str) or global_pool not in POOLS:
        raise ValueError(f'global_pool must be one of {", ".join(map(repr, POOLS))}, got {global_pool!r}.')
