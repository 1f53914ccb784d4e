"""Building of a model from its registered name and keywords; pretrained sources are checked before timm reads them."""
import dataclasses
import difflib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    load_state_dict,
    model_entrypoint,
)
from timm.models._hub import load_state_dict_from_path  # how timm chooses among the files of a folder; no public alias
from torch import nn

from .. import kecam
from ..releases import fetch, find_release
from .backbone import Backbone
from .config import BackboneCfg
from .state_dict import checkpoint_filter_fn, explain_misfit

__all__ = ['build_backbone', 'list_models']

_CFG_FIELDS = ('flavor', *(field.name for field in dataclasses.fields(BackboneCfg)))
_MODEL_ARGS = tuple(inspect.signature(Backbone).parameters)[1:]
_BUILDER_ARGS = (  # consumed by timm's factory and builder, not passed to the class
    'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'cache_dir',
    'features_only', 'out_indices', 'feature_cls')
_SOURCES = ('state_dict', 'file', 'url', 'hf_hub_id')
_RENAMED = {  # keywords that older config.json files may hold, and their replacements
    'drop_path_ramp': "'drop_path_schedule', with 'exclusive' for 'open' and 'inclusive' for 'closed'",
    'softmax': "'attn_softmax_dtype', with the same values"}


def list_models(pretrained: bool = False) -> list[str]:
    """Names that this package registers with timm, sorted as timm sorts.

    Args:
        pretrained: List NAME.TAG of the models with weights instead.
    """
    package = __package__.partition('.')[0]
    return [name for name in timm.list_models(pretrained=pretrained)
            if model_entrypoint(name).__module__.startswith(f'{package}.')]


def build_backbone(variant: str, cfg: BackboneCfg, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    """Build a registered variant through timm, with any field of `BackboneCfg` or `flavor` as a keyword.

    Args:
        variant: Name in timm's registry.
        cfg: Its configuration.
        pretrained: Load weights; RuntimeError for a name that has none.
        **kwargs: Fields of `BackboneCfg`, `flavor`, arguments of `Backbone`, and what timm's factory passes.

    Returns:
        A `Backbone`, or timm's feature wrapper around one with `features_only=True`.

    Raises:
        ValueError: An invalid value, an unknown tag, or `output_stride`.
        TypeError: An unknown keyword.
        ModuleNotFoundError: h5py, needed for a Keras file, is not installed.
        FileNotFoundError: The checkpoint file named in `pretrained_cfg_overlay` does not exist.
        RuntimeError: No weights exist, their download fails, or the checkpoint is corrupted or does not fit.
    """
    _check_keywords(variant, cfg, kwargs)
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    if overlay.get('hf_hub_id') or overlay.get('url'):
        # otherwise timm might prefer the release's own file or repository to the user's source
        overlay = {'file': None, 'hf_hub_id': None, 'hf_hub_filename': None, **overlay}
    pretrained_cfg = kwargs.get('pretrained_cfg')
    source_cfg = _source_cfg(variant, pretrained_cfg, overlay)
    options = {key: kwargs.pop(key) for key in tuple(kwargs) if key in _CFG_FIELDS}
    model_cfg = cfg.with_options(**options)
    checkpoint = None
    if pretrained:
        name = f'{variant}.{pretrained_cfg}' if isinstance(pretrained_cfg, str) else variant
        if kecam.weights_name(source_cfg):
            overlay = {**_imagenet_labels(), **overlay}
        checkpoint = _find_checkpoint(name, cfg, source_cfg, kwargs.get('cache_dir'))
        if checkpoint and checkpoint.suffix == '.h5':
            kecam.check_choices(model_cfg, set(options))
    if checkpoint:  # timm passes this to `adapt`, which reads the file and reports read errors
        overlay |= {'state_dict': {'file': checkpoint}, 'source': None}

    def adapt(state_dict: dict[str, Any], model: Backbone) -> dict[str, torch.Tensor]:
        if checkpoint:
            state_dict = _read_checkpoint(checkpoint, variant)
            del model.pretrained_cfg['state_dict']
            if source_cfg.get('source'):
                model.pretrained_cfg['source'] = source_cfg['source']
        return checkpoint_filter_fn(state_dict, model, 'layout' in options, kwargs.get('features_only', False))

    default_cfg = next(iter(get_arch_pretrained_cfgs(variant).values()))
    if not default_cfg.fixed_input_size:  # timm fills it in for the others
        kwargs.setdefault('img_size', default_cfg.input_size[1:])
    return build_model_with_cfg(
        Backbone,
        variant,
        pretrained,
        model_cfg=model_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=adapt,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **kwargs)


def _check_keywords(variant: str, cfg: BackboneCfg, kwargs: dict[str, Any]) -> None:
    if 'output_stride' in kwargs:
        raise ValueError(
            f'output_stride is not supported, got {kwargs["output_stride"]!r}: the strides of {variant} are '
            f'{list(cfg.reductions)} by its architecture. Take an earlier level through out_indices instead.')
    levels, requested = len(cfg.reductions), kwargs.get('out_indices')
    if isinstance(requested, (list, tuple)) and not all(-levels <= level < levels for level in requested):
        hint = ' segmentation_models_pytorch asks for these with its encoder_depth of 5: pass encoder_depth=4.'
        raise ValueError(
            f'out_indices must be from 0 to {levels - 1}, the levels of {variant} with strides {list(cfg.reductions)}, '
            f'got {tuple(requested)}.{hint if tuple(requested) == tuple(range(levels + 1)) else ""}')
    known = (*_MODEL_ARGS, *_CFG_FIELDS, *_BUILDER_ARGS)
    for key in kwargs:
        if key in _RENAMED:
            raise TypeError(
                f'{variant} has no keyword {key!r} any more: write {_RENAMED[key]}; in a saved model, that is '
                f'model_args in its config.json.')
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise TypeError(
                f'{variant} has no keyword {key!r}{f"; did you mean {close[0]!r}?" if close else "."} '
                f'Known: {", ".join((*_MODEL_ARGS, *_CFG_FIELDS))}.')


def _source_cfg(variant: str, cfg: PretrainedCfg | dict[str, Any] | str | None, overlay: dict[str, Any]) -> dict:
    """Pretrained cfg that timm will resolve, as a dict; ValueError for an unknown tag."""
    tags = get_arch_pretrained_cfgs(variant)
    if isinstance(cfg, str):
        if f'{variant}.{cfg}' not in tags:
            raise ValueError(
                f'{variant} has no pretrained tag {cfg!r}; known tags: '
                f'{", ".join(name.partition(".")[2] for name in tags)}.')
        cfg = tags[f'{variant}.{cfg}']
    cfg = cfg or next(iter(tags.values()))
    return {**(cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg), **overlay}


def _find_checkpoint(
        name: str, model_cfg: BackboneCfg, cfg: dict[str, Any], cache_dir: str | Path | None) -> Path | None:
    """File or folder of the weights; None if timm fetches them itself or has them in memory.

    Downloads and verifies released weights. Raises RuntimeError for a name without weights, FileNotFoundError for a
    missing file.

    Args:
        name: NAME or NAME.TAG, for messages.
        model_cfg: Architecture of the name.
        cfg: Pretrained cfg.
        cache_dir: Cache folder of downloads, None for the default.
    """
    if not any(cfg.get(key) for key in _SOURCES):
        raise RuntimeError(
            f'pretrained=True: {name} has no released weights. Names of this zoo that have some: '
            f'{", ".join(list_models(pretrained=True)) or "none yet"}. Pass pretrained=False, or weights of your own '
            f'by pretrained_cfg_overlay=dict(file=...).')
    if cfg.get('state_dict') and cfg.get('source') not in ('hf-hub', 'local-dir'):
        return None
    if release := find_release(cfg):
        return fetch(release, cache_dir)
    if weights := kecam.weights_name(cfg):
        return kecam.fetch_weights(weights, cfg['url'], partial(_check_fit, model_cfg, cfg), cache_dir)
    if not cfg.get('file'):
        return None
    path, is_folder = Path(cfg['file']), cfg.get('source') == 'local-dir'
    if not (path.is_dir() if is_folder else path.is_file()):
        raise FileNotFoundError(
            f'pretrained=True: there is no checkpoint {"folder" if is_folder else "file"} {str(path)!r}.')
    return path


def _check_fit(model_cfg: BackboneCfg, cfg: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    """Raise RuntimeError unless a state dict fits the architecture, image size and number of classes of `cfg`."""
    model = Backbone(model_cfg, cfg['input_size'][1:], num_classes=cfg['num_classes'], device='meta')
    model.pretrained_cfg = cfg
    if misfit := explain_misfit(state_dict, model):
        raise RuntimeError(f'The converted weights do not fit {cfg.get("architecture")}: {misfit}')


def _imagenet_labels() -> dict[str, Any]:
    """Names of the 1,000 classes of ImageNet-1k, as fields of a pretrained cfg."""
    info = ImageNetInfo('imagenet-1k')
    return dict(label_names=tuple(info.label_names()), label_descriptions=info.label_descriptions(as_dict=True))


def _read_checkpoint(path: Path, variant: str) -> dict[str, Any]:
    if path.suffix == '.h5':
        return kecam.read_h5(path)
    try:
        return load_state_dict_from_path(path) if path.is_dir() else load_state_dict(str(path))
    except Exception as error:  # torch's readers raise about ten kinds of error on damaged files
        raise RuntimeError(
            f'{path} could not be read as weights of {variant}: it is truncated or no checkpoint at all '
            f'({type(error).__name__}: {error}).') from error
