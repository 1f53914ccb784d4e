"""Explanations of a prediction: attention of T stages, predicted kernels of D stages, Grad-CAM of any timm model.

Attention and kernels are recomputed from the input and the weights of the block that uses them; they do not depend on a
class. Grad-CAM explains one class.
"""
from dataclasses import dataclass

import torch
from torch import nn

from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.blocks.dynamicconv import DynamicConv2d
from coatnet_zoo.blocks.transformer import RelativeAttention2d
from coatnet_zoo.models.backbone import Backbone

__all__ = [
    'KINDS',
    'ExplainTarget',
    'attention_weights',
    'choose_target',
    'dynamic_kernels',
    'expected_distance',
    'fraction_on_padding',
    'gradcam',
    'run_with_input',
    'tap_distances',
]

KINDS = ('attention', 'kernels', 'gradcam')
BLOCK_TYPES = {'attention': 'T', 'kernels': 'D'}


@dataclass(frozen=True)
class ExplainTarget:
    """An explanation: one of KINDS and, for attention and kernels, the module that computes it."""

    kind: str
    module: RelativeAttention2d | DynamicConv2d | None = None
    stage: int = 0  # 1 to 4


def choose_target(model: nn.Module, name: str, explain: str = 'auto', stage: int | None = None) -> ExplainTarget:
    """Choose the block to explain: the last of `stage`, or of the last stage of the block type that `explain` needs.

    Args:
        model: Any model; only those of the zoo have the block types T and D.
        name: Name of the model, for messages.
        explain: 'auto' or one of KINDS; 'auto' is the last T or D stage, or Grad-CAM for models without T and D.
        stage: 1 to 4, or None.

    Raises ConfigError for a stage or explanation that the model does not have.
    """
    if explain not in ('auto', *KINDS):
        raise ConfigError(f'--explain must be auto, {", ".join(KINDS)}, got {explain!r}.')
    layout = model.cfg.layout if isinstance(model, Backbone) else ''
    has = f'{name} has the layout {layout}' if layout else f'{name} is not a model of this zoo'
    if stage is not None and (explain == 'gradcam' or not set(layout) & {'T', 'D'}):
        raise ConfigError(f'--stage chooses a stage of block type T or D, but Grad-CAM is shown ({has}); leave it '
                          f'out.')
    if stage is not None and not 1 <= stage <= len(layout):
        raise ConfigError(f'--stage must be from 1 to {len(layout)}, got {stage}.')
    wanted = 'TD' if explain == 'auto' else BLOCK_TYPES.get(explain, '')
    stages = [i for i, block_type in enumerate(layout, 1) if block_type in wanted and stage in (None, i)]
    if not stages and (stage is not None or explain in BLOCK_TYPES):
        where = 'a stage' if stage is None else f'--stage {stage} to be one'
        raise ConfigError(f'--explain {explain} needs {where} of block type {" or ".join(wanted)}, but {has}; '
                          f'choose another or leave it out.')
    if not stages:
        return ExplainTarget('gradcam')
    block = model.stages[stages[-1] - 1].blocks[-1]
    if layout[stages[-1] - 1] == 'T':
        return ExplainTarget('attention', block.attn, stages[-1])
    return ExplainTarget('kernels', block.conv, stages[-1])


@torch.no_grad()
def run_with_input(model: nn.Module, module: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the model for `images`, and the input of its submodule `module`."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        return model(images), seen[-1]
    finally:
        hook.remove()


@torch.no_grad()
def attention_weights(attention: RelativeAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The matrix A of y = Proj(A V): input (B, H, W, dim) -> (B, heads, N, N) float32, queries in rows, N = H * W.

    Rows sum to 1, except under rel_bias='post', where the bias is added after the softmax and A may be negative.
    """
    B, H, W, _ = x.shape
    qkv = attention.qkv(x).float().reshape(B, H * W, 3, attention.num_heads, attention.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * attention.scale
    if attention.rel_bias is None:
        return logits.softmax(-1)
    bias = attention.rel_bias(H, W).float()
    return logits.softmax(-1) + bias if attention.bias_after else (logits + bias).softmax(-1)


@torch.no_grad()
def dynamic_kernels(conv: DynamicConv2d, x: torch.Tensor) -> torch.Tensor:
    """Kernels of y = DynamicConv(x): input (B, C, H, W) -> (B, heads, Kh, Kw, H, W) float32.

    Taps sum to 1 under normalize='softmax'. A static branch is not included.
    """
    B, _, H, W = x.shape
    logits = conv.logits(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).float()
    taps = logits.reshape(B, -1, conv.kernel_size[0] * conv.kernel_size[1], H, W)
    if conv.normalize == 'softmax':
        taps = taps.softmax(2)
    return taps.reshape(B, -1, *conv.kernel_size, H, W)


def _offsets(size: int) -> torch.Tensor:
    return torch.arange(size) - size // 2


def tap_distances(size: tuple[int, int], step: tuple[float, float]) -> torch.Tensor:
    """Distance of each tap from the centre, (Kh, Kw), in the unit of `step`, the spacing of (rows, columns)."""
    rows, columns = _offsets(size[0]) * step[0], _offsets(size[1]) * step[1]
    return (rows[:, None] ** 2 + columns ** 2).sqrt()


def expected_distance(kernels: torch.Tensor, step: tuple[float, float]) -> torch.Tensor:
    """Mean distance of kernel weight from the centre, averaged over heads: (B, heads, Kh, Kw, H, W) -> (B, H, W).

    sum_{u,v} |k[u, v]| d[u, v] / sum_{u,v} |k[u, v]| with d from `tap_distances`, taps on the padding included.
    """
    distance = tap_distances(kernels.shape[2:4], step)[..., None, None].to(kernels)
    weight = kernels.abs()
    return ((weight * distance).sum((2, 3)) / weight.sum((2, 3))).mean(1)


def fraction_on_padding(kernels: torch.Tensor) -> torch.Tensor:
    """Fraction of |weight| on the zero padding, averaged over heads: (B, heads, Kh, Kw, H, W) -> (B, H, W)."""
    height, width = kernels.shape[-2:]
    rows = _offsets(kernels.shape[2])[:, None] + torch.arange(height)
    columns = _offsets(kernels.shape[3])[:, None] + torch.arange(width)
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None]
    weight = kernels.abs()
    return 1 - ((weight * inside.to(kernels)).sum((2, 3)) / weight.sum((2, 3))).mean(1)


def gradcam(model: nn.Module, images: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Grad-CAM of the predicted class: images (B, C, H, W) -> logits (B, classes), maps (B, h, w) >= 0.

    L = ReLU(sum_c a_c F_c), a_c = mean over the positions of d logit / d F_c. Selvaraju et al. 2017, equations 1 and 2
    (https://arxiv.org/abs/1610.02391). F is the last feature map that the logit depends on: the output of
    `forward_features`, or, where the head reads a class token alone, the input of the last block.

    Raises ConfigError for a model without such a map.
    """
    tokens, modules = [], dict(model.named_modules())
    blocks = [info['module'] for info in getattr(model, 'feature_info', ()) if isinstance(info, dict)]
    hooks = [modules[block].register_forward_hook(lambda *seen: tokens.insert(0, seen[-1]))
             for block in blocks if block in modules]
    try:
        with torch.enable_grad():
            features = model.forward_features(images.detach().requires_grad_())
            if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
                raise ConfigError(f'--explain gradcam needs one map of features, and {name} has none; '
                                  f'choose another model.')
            # a copy, because a head may work in place and change the features
            logits = model.forward_head(features.clone())
    finally:
        for hook in hooks:
            hook.remove()
    earlier = [seen for seen in tokens if isinstance(seen, torch.Tensor) and seen.ndim == features.ndim == 3]
    candidates = [features, *earlier]
    gradients = torch.autograd.grad(logits.max(-1).values.sum(), candidates, materialize_grads=True)
    positions = features.shape[1] - getattr(model, 'num_prefix_tokens', 0)  # grid tokens, after the class tokens
    for pair in zip(candidates, gradients, strict=True):
        seen, gradient = (_as_map(tensor.detach().float(), positions, model, images, name) for tensor in pair)
        if gradient.any() or not gradients[0].any():  # or no gradient at all, as with a head of zeros
            return logits.detach(), (gradient.mean((2, 3), keepdim=True) * seen).sum(1).relu()
    raise ConfigError(f'--explain gradcam needs a map of features that the prediction depends on, and {name} has '
                      f'none; choose another model.')


def _as_map(
        features: torch.Tensor, positions: int, model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    """Features (B, C, h, w), (B, h, w, C) or tokens (B, prefix + positions, C) as (B, C, h, w)."""
    if features.ndim == 4:
        channels = model.num_features
        last = getattr(model, 'output_fmt', '') == 'NHWC' or features.shape[3] == channels != features.shape[1]
        return features.permute(0, 3, 1, 2) if last else features
    height = round((positions * images.shape[2] / images.shape[3]) ** 0.5)
    width = positions // max(height, 1)
    if height * width != positions or features.shape[1] < positions:
        raise ConfigError(f'--explain gradcam needs tokens that form a grid, and {name} has {positions} '
                          f'for {images.shape[2]} x {images.shape[3]} pixels; choose another model.')
    return features[:, -positions:].transpose(1, 2).unflatten(2, (height, width))
