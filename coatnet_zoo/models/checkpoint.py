"""What comes in: state dicts of this zoo at any image size, and those of timm's coatnet_N_224.

Of how a timm model was built a state dict shows the stem bias alone: stride, form of GELU and epsilons leave no trace,
so a timm model with a stem bias and other choices than the official ones needs the same choices as keywords here.
"""
import math
import re

import torch
from torch import nn

from ..blocks.transformer import resize_bias_table

__all__ = ['checkpoint_filter_fn']

# timm's maxxvit.py on the left; the same tensors, named here as in the paper
_FROM_TIMM = tuple((re.compile(pattern), name) for pattern, name in (
    (r'\.conv1_1x1\.', '.expand.'),
    (r'\.conv2_kxk\.', '.depthwise.'),
    (r'\.conv3_1x1\.', '.project.'),
    (r'\.se\.fc1\.', '.se.reduce.'),
    (r'\.se\.fc2\.', '.se.expand.'),
    (r'\.norm1\.norm\.', '.norm1.'),
    (r'\.rel_pos\.relative_position_bias_table', '.rel_bias.table'),
))


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Bring a state dict to the names, layouts and bias-table sizes of `model`, or refuse it.

    Args:
        state_dict: Of this zoo, or of timm's `coatnet_N_224`, known by its names.
        model: The backbone to load into.

    Raises:
        RuntimeError: The names or shapes do not fit; what is missing, unexpected and misshapen is listed. Classifier
            and first convolution are left to timm, which adapts them to num_classes and in_chans.
    """
    own = model.state_dict()
    if wrong := [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise RuntimeError(f'The checkpoint holds values that are no tensors: {", ".join(map(str, wrong[:12]))}.')
    is_timm = any('.conv1_1x1.' in key or '.attn.rel_pos.' in key for key in state_dict)
    if is_timm:
        _check_stem_bias(state_dict, own)
        state_dict = _from_timm(state_dict, model)
    else:
        state_dict = dict(state_dict)
    for key, table in state_dict.items():
        if key.endswith('rel_bias.table') and key in own and table.ndim == 3 and len(table) == len(own[key]) and all(
                s % 2 for s in table.shape[1:]):
            resized = resize_bias_table(table.float(), tuple((s + 1) // 2 for s in own[key].shape[1:]))
            state_dict[key] = resized.to(table.dtype)
    for key in ('head.pre_logits.fc.weight', 'head.fc.weight'):  # 1x1 convolutions where global_pool=''
        if key in state_dict and key in own and own[key].ndim != (weight := state_dict[key]).ndim:
            state_dict[key] = weight[..., None, None] if own[key].ndim == 4 else weight.flatten(1)
    _check_fit(state_dict, own)
    _check_classes(state_dict, model)
    return state_dict


def _check_stem_bias(state_dict: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    given, expected = 'stem.conv1.bias' in state_dict, 'stem.conv1.bias' in own
    if expected and not given:
        raise RuntimeError(
            "The checkpoint is timm's coatnet_N_224 in its default form (no stem bias: depthwise stride, exact GELU, "
            "norm epsilons 1e-5 and 1e-6), and this model would compute something else from it. "
            "Create the model with flavor='timm'.")
    if given and not expected:
        raise RuntimeError(
            "The checkpoint is a timm coatnet_N_224 with a stem bias, the model has none. If that bias is all that was "
            "set there, add stem_bias=True to flavor='timm'; if it has the official choices, leave out flavor.")


def _from_timm(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
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
                # timm keeps q, k, v of a head together, here heads come together within q, k and v
                value = value.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
        else:
            key = key.replace('.shortcut.expand.', '.shortcut.proj.')
        out[key] = value.contiguous()
    return out


def _attention_block(key: str, state_dict: dict[str, torch.Tensor]) -> bool:
    match = re.match(r'stages\.\d+\.blocks\.\d+\.', key)
    return bool(match) and f'{match.group()}attn.qkv.weight' in state_dict


def _unflatten_table(key: str, table: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """timm's flat ((2H-1)(2W-1), heads) to (heads, 2H-1, 2W-1); a flat table says its shape only if it is square."""
    if table.ndim == 3:
        return table
    side = math.isqrt(len(table))
    if side * side == len(table):
        size = (side, side)
    elif own is not None and own.shape[1] * own.shape[2] == len(table):
        size = tuple(own.shape[1:])
    else:
        raise RuntimeError(
            f'{key}: a flat bias table of {len(table)} rows is not square, so the image size it was made for cannot '
            f'be told; create the model with the img_size of the checkpoint, then call set_input_size.')
    return table.T.unflatten(1, size)


def _check_fit(state_dict: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    adapted = ('head.fc.', 'stem.conv1.weight')
    missing = [k for k in own if k not in state_dict and not k.startswith('head.fc.')]
    unexpected = [k for k in state_dict if k not in own and not k.startswith('head.fc.')]
    misshapen = [
        f'{k} {tuple(v.shape)} for {tuple(own[k].shape)}' for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape and not k.startswith(adapted)]
    if missing or unexpected or misshapen:
        raise RuntimeError('The checkpoint does not fit the model.' + ''.join(
            f' {label} ({len(names)}): {", ".join(names[:12])}{", ..." if len(names) > 12 else ""}.'
            for label, names in (('Missing', missing), ('Unexpected', unexpected), ('Wrong shape', misshapen))
            if names))


def _check_classes(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """timm drops the classifier if the source is said to have another number of classes than the model."""
    weight, said = state_dict.get('head.fc.weight'), model.pretrained_cfg['num_classes']
    if weight is not None and len(weight) == model.num_classes:
        model.pretrained_cfg['num_classes'] = len(weight)  # timm reads it after this: weights that fit are kept
    elif weight is not None and model.num_classes == said:
        raise RuntimeError(
            f'num_classes: the checkpoint has a classifier of {len(weight)} classes, the model one of {said}. Pass '
            f'pretrained_cfg_overlay=dict(..., num_classes={len(weight)}); timm then fits the classifier to the model.')
