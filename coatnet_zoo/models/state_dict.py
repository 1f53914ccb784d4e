"""Conversion of state dicts: those of this package at any image size, and those of timm's coatnet_N_224.

Of the options of a timm model, its state dict shows the stem bias only. Stride, form of GELU and epsilons leave no
trace. A timm model with a stem bias and other options than the official ones needs the same options as keywords here.
"""
import logging
import math
import re
from typing import Any

import torch
from torch import nn

from ..blocks.transformer import resize_bias_table
from .backbone import Backbone

__all__ = ['checkpoint_filter_fn', 'convert_state_dict', 'explain_misfit', 'keep_other_stages']

_logger = logging.getLogger(__name__)
# end of a parameter name that only blocks of this type have
_BLOCK_TYPE_KEYS = {'C': '.depthwise.weight', 'T': '.attn.qkv.weight', 'D': '.conv.logits.weight', 'L': '.conv.weight'}

# parameter names of timm's maxxvit.py -> names here
_FROM_TIMM = tuple((re.compile(pattern), name) for pattern, name in (
    (r'\.conv1_1x1\.', '.expand.'),
    (r'\.conv2_kxk\.', '.depthwise.'),
    (r'\.conv3_1x1\.', '.project.'),
    (r'\.se\.fc1\.', '.se.reduce.'),
    (r'\.se\.fc2\.', '.se.expand.'),
    (r'\.norm1\.norm\.', '.norm1.'),
    (r'\.rel_pos\.relative_position_bias_table', '.rel_bias.table'),
))


# other models of timm's maxxvit.py: part of a parameter name that identifies them, description, one that has weights
_OTHER_TIMM = (
    ('.attn_grid.', 'a MaxViT or MaxxViT', 'maxvit_tiny_tf_224.in1k'),
    ('.conv_dw.', 'a CoAtNeXt', 'coatnext_nano_rw_224.sw_in1k'),
    ('.attn.rel_pos.mlp.', 'a coatnet_rmlp (relative position by an MLP)', 'coatnet_rmlp_1_rw_224.sw_in1k'),
    ('.norm2.running_var', 'a coatnet_bn (BatchNorm before attention)', 'coatnet_bn_0_rw_224.sw_in1k'),
    ('', 'a coatnet_rw (no hidden layer in the head, other blocks)', 'coatnet_0_rw_224.sw_in1k'),
)


def checkpoint_filter_fn(
        state_dict: dict[str, torch.Tensor], model: Backbone, fresh_stages: bool = False,
        features_only: bool = False) -> dict[str, torch.Tensor]:
    """Convert a state dict to the names, layouts and bias-table sizes of `model`, or raise.

    Args:
        state_dict: Tensors by name, of this package or of timm's `coatnet_N_224`, told apart by the names.
        model: The backbone to load into.
        fresh_stages: Keep the initialisation of stages whose block type differs in the state dict.
        features_only: The head is about to be removed, so that the number of classes does not matter.

    Raises:
        RuntimeError: Names or shapes do not fit; the message lists missing, unexpected and misshapen tensors. Those of
            classifier and first convolution are not checked: timm adapts them to num_classes and in_chans.
        ValueError: The state dict is of another architecture of timm.
    """
    state_dict = convert_state_dict(state_dict, model)
    if fresh_stages:
        state_dict = keep_other_stages(state_dict, model)
    if misfit := explain_misfit(state_dict, model, max_names=12, adapted=('head.fc.', 'stem.conv1.weight')):
        raise RuntimeError(f'The checkpoint does not fit the model: {misfit}')
    if not features_only:
        _check_classes(state_dict, model)
    return state_dict


def convert_state_dict(state_dict: dict[str, torch.Tensor], model: Backbone) -> dict[str, torch.Tensor]:
    """Convert a state dict to the names, layouts and bias-table sizes of `model`; whether it fits is not checked.

    Args:
        state_dict: Tensors by name, of this package or of timm's `coatnet_N_224`, told apart by the names.
        model: The backbone to load into.

    Raises:
        RuntimeError: A value is no tensor, or the timm model was built with other options than `model`.
        ValueError: The state dict is of another architecture of timm.
    """
    target = model.state_dict()
    if wrong := [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise RuntimeError(f'The checkpoint holds values that are no tensors: {", ".join(map(str, wrong[:12]))}.')
    is_timm = any('.conv1_1x1.' in key or '.attn.rel_pos.' in key for key in state_dict)
    if is_timm:
        _check_architecture(state_dict, model)
        _check_stem_bias(state_dict, target)
        state_dict = _from_timm(state_dict, model)
    else:
        state_dict = dict(state_dict)
    for key, table in state_dict.items():
        if (key.endswith('rel_bias.table') and key in target and table.ndim == 3 and len(table) == len(target[key])
                and all(side % 2 for side in table.shape[1:])):
            height, width = target[key].shape[1:]
            resized = resize_bias_table(table.float(), ((height + 1) // 2, (width + 1) // 2))
            state_dict[key] = resized.to(table.dtype)
    for key in ('head.pre_logits.fc.weight', 'head.fc.weight'):  # 1x1 convolutions where global_pool=''
        if key in state_dict and key in target and target[key].ndim != (weight := state_dict[key]).ndim:
            state_dict[key] = weight[..., None, None] if target[key].ndim == 4 else weight.flatten(1)
    return state_dict


def keep_other_stages(state_dict: dict[str, torch.Tensor], model: Backbone) -> dict[str, torch.Tensor]:
    """Replace the stages of a state dict that have another block type than in `model` by the model's own tensors.

    For the transfer of weights to another layout. One log message names the stages that keep their initialisation.
    """
    kept = []
    for stage, block_type in enumerate(model.cfg.layout):
        prefix = f'stages.{stage}.'
        found = next((known for known, part in _BLOCK_TYPE_KEYS.items() if any(
            key.startswith(prefix) and key.endswith(part) for key in state_dict)), None)
        if found and found != block_type:
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
            state_dict |= {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
            kept.append(f'stages.{stage} ({block_type} in place of {found})')
    if kept:
        _logger.warning(f'Not in the checkpoint and randomly initialised: {", ".join(kept)}.')
    return state_dict


def explain_misfit(state_dict: dict[str, torch.Tensor], model: nn.Module, max_names: int = 3,
                   adapted: tuple[str, ...] = ()) -> str:
    """Explain why a state dict does not load into a timm model, the likely reason first; '' if it loads.

    Args:
        state_dict: Names as in `model`.
        model: The model to load into, with timm's `pretrained_cfg`.
        max_names: Number of names listed as missing, unexpected and misshapen.
        adapted: Prefixes of names that timm adapts later: any shape will do, and the classifier's may be missing.
    """
    target = model.state_dict()
    cfg: Any = model.pretrained_cfg
    classifiers, first_convs = (
        tuple(f'{name}.' for name in ([value] if isinstance(value, str) else value or ()))
        for value in (cfg.get('classifier'), cfg.get('first_conv')))
    optional = tuple(name for name in adapted if name in classifiers)
    missing = [key for key in target if key not in state_dict and not key.startswith(optional)]
    unexpected = [key for key in state_dict if key not in target and not key.startswith(optional)]
    misshapen = {key: (tuple(value.shape), tuple(target[key].shape)) for key, value in state_dict.items()
                 if key in target and value.shape != target[key].shape and not key.startswith(adapted)}
    if not (missing or unexpected or misshapen):
        return ''
    reasons, shapes, names = [], dict(misshapen), len(missing) + len(unexpected)
    if len(missing) > len(target) / 2:
        reasons.append(f'it is of another architecture ({len(target) - len(missing)} of {len(target)} names agree)')
        shapes, names = {}, 0
    for key, (given, expected) in misshapen.items():
        if key.startswith(classifiers) and key in shapes and given[0] != expected[0]:
            reasons.append(f'it has {given[0]} classes and the model {expected[0]}')
            shapes = {name: value for name, value in shapes.items() if not name.startswith(classifiers)}
        elif key.startswith(first_convs) and key in shapes and len(given) == 4 and given[1] != expected[1]:
            reasons.append(f'it takes images of {given[1]} channels and the model of {expected[1]}')
            shapes.pop(key)
    if names > len(shapes):
        reasons.append('it has other layers or another depth')
    elif shapes:  # a width decides about some layers too, such as that of a shortcut
        what = 'image size' if all('pos_embed' in key or 'relative_position' in key for key in shapes) else 'width'
        key, (given, expected) = next(iter(shapes.items()))
        reasons.append(f'it has another {what} ({key} is {given} and must be {expected})')
    return f'{", ".join(reasons)}.' + ''.join(
        f' {label} ({len(names)}): {", ".join(names[:max_names])}{", ..." if len(names) > max_names else ""}.'
        for label, names in (('Missing', missing), ('Unexpected', unexpected), (
            'Wrong shape', [f'{key} {given} for {expected}' for key, (given, expected) in misshapen.items()])) if names)


def _check_architecture(state_dict: dict[str, torch.Tensor], model: Backbone) -> None:
    """Raise ValueError for timm's rw, rmlp, bn and cc CoAtNets, CoAtNeXt and MaxViT: all but coatnet_N_224."""
    if 'norm.weight' not in state_dict and not any('.attn_grid.' in key for key in state_dict):
        return  # only coatnet_N_224 keeps its last norm in the head, before a hidden layer
    kind, example = next((kind, example) for part, kind, example in _OTHER_TIMM if any(
        part in key and (part != '.norm2.running_var' or f'{key.partition(".norm2.")[0]}.attn.qkv.weight' in state_dict)
        for key in state_dict))
    raise ValueError(
        f'The checkpoint is of {kind} of timm, another architecture than {model.pretrained_cfg.get("architecture")}: '
        f'its weights have no place here. Use it through timm by its own name, such as '
        f'timm.create_model({example!r}, pretrained=True).')


def _check_stem_bias(state_dict: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    given, expected = 'stem.conv1.bias' in state_dict, 'stem.conv1.bias' in target
    if expected and not given:
        raise RuntimeError(
            "The checkpoint is timm's coatnet_N_224 in its default form (no stem bias: depthwise stride, exact GELU, "
            "norm epsilons 1e-5 and 1e-6), and this model would compute something else from it. "
            "Create the model with flavor='timm'.")
    if given and not expected:
        raise RuntimeError(
            "The checkpoint is a timm coatnet_N_224 with a stem bias, the model has none. If that bias is all that was "
            "set there, add stem_bias=True to flavor='timm'; if it has the official choices, leave out flavor.")


def _from_timm(state_dict: dict[str, torch.Tensor], model: Backbone) -> dict[str, torch.Tensor]:
    head_dim = model.cfg.head_dim
    out = {}
    for key, value in state_dict.items():
        attention_block = _attention_block(key, state_dict)
        for pattern, name in _FROM_TIMM:
            key = pattern.sub(name, key)
        if key.endswith('rel_bias.table'):
            value = _unflatten_table(key, value, model.state_dict().get(key))
        elif attention_block:
            key = key.replace('.shortcut.expand.', '.shortcut.')
            if value.ndim == 4 and value.shape[2:] == (1, 1):
                value = value.flatten(1)  # 1x1 convolutions there, linear layers here
            if '.attn.qkv.' in key and len(value) % (3 * head_dim) == 0:
                # output channels in timm: (head, qkv, channel); here: (qkv, head, channel)
                value = value.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
        else:
            key = key.replace('.shortcut.expand.', '.shortcut.proj.')
        out[key] = value.contiguous()
    return out


def _attention_block(key: str, state_dict: dict[str, torch.Tensor]) -> bool:
    match = re.match(r'stages\.\d+\.blocks\.\d+\.', key)
    return match is not None and f'{match.group()}attn.qkv.weight' in state_dict


def _unflatten_table(key: str, table: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """Reshape timm's flat bias table ((2H-1)(2W-1), heads) to (heads, 2H-1, 2W-1).

    A table that is not square takes the shape of `target`; RuntimeError if that has another size.
    """
    if table.ndim == 3:
        return table
    side = math.isqrt(len(table))
    if side * side == len(table):
        size: tuple[int, ...] = (side, side)
    elif target is not None and target.shape[1] * target.shape[2] == len(table):
        size = tuple(target.shape[1:])
    else:
        raise RuntimeError(
            f'{key}: a flat bias table of {len(table)} rows is not square, so the image size it was made for cannot '
            f'be told; create the model with the img_size of the checkpoint, then call set_input_size.')
    return table.T.unflatten(1, size)


def _check_classes(state_dict: dict[str, torch.Tensor], model: Backbone) -> None:
    """Set num_classes of the pretrained cfg so that timm keeps a classifier that fits.

    timm compares the cfg with the model. Raises RuntimeError if these agree but the checkpoint's classifier differs.
    """
    weight, stated = state_dict.get('head.fc.weight'), model.pretrained_cfg['num_classes']
    if weight is not None and len(weight) == model.num_classes:
        model.pretrained_cfg['num_classes'] = len(weight)  # read by timm after this
    elif weight is not None and model.num_classes == stated:
        raise RuntimeError(
            f'num_classes: the checkpoint has a classifier of {len(weight)} classes, the model one of {stated}. Pass '
            f'pretrained_cfg_overlay=dict(..., num_classes={len(weight)}); timm then fits the classifier to the model.')
