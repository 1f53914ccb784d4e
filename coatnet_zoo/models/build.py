"""From a registered name and keywords to a model, with pretrained sources checked before timm reads them."""
import dataclasses
import difflib
import inspect
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, model_entrypoint
from torch import nn

from ..releases import fetch, find_release
from .backbone import Backbone, BackboneCfg
from .checkpoint import checkpoint_filter_fn

__all__ = ['build_backbone']

_CFG_FIELDS = ('flavor', *(field.name for field in dataclasses.fields(BackboneCfg)))
_MODEL_ARGS = tuple(inspect.signature(Backbone).parameters)[1:]
_BUILDER_ARGS = (  # what timm's factory and builder take out before the class is called
    'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'cache_dir',
    'features_only', 'out_indices', 'feature_cls')
_SOURCES = ('state_dict', 'file', 'url', 'hf_hub_id')


def build_backbone(variant: str, cfg: BackboneCfg, pretrained: bool = False, /, **kwargs: Any) -> nn.Module:
    """Build a registered variant through timm, with any field of `BackboneCfg` or `flavor` as a keyword.

    Args:
        variant: Name in timm's registry.
        cfg: Its configuration.
        pretrained: Load weights; refused for a name that has none.
        **kwargs: Fields of `BackboneCfg`, `flavor`, arguments of `Backbone`, and what timm's factory passes.

    Returns:
        A `Backbone`, or timm's feature wrapper around one with `features_only=True`.

    Raises:
        ValueError: A value that no model can have, an unknown tag, or `output_stride`.
        TypeError: An unknown keyword.
        FileNotFoundError: The checkpoint file named in `pretrained_cfg_overlay` does not exist.
        RuntimeError: No weights exist, the Hub does not give them, or the checkpoint is damaged or does not fit.
    """
    _check_keywords(variant, cfg, kwargs)
    overlay = kwargs.get('pretrained_cfg_overlay')
    if overlay and (overlay.get('hf_hub_id') or overlay.get('url')):
        # or timm might prefer a release's own file or repository to what the user names
        kwargs['pretrained_cfg_overlay'] = overlay = {
            'file': None, 'hf_hub_id': None, 'hf_hub_filename': None, **overlay}
    source = _check_source(variant, kwargs.get('pretrained_cfg'), overlay, pretrained, kwargs.get('cache_dir'))
    options = {key: kwargs.pop(key) for key in tuple(kwargs) if key in _CFG_FIELDS}
    usual = next(iter(get_arch_pretrained_cfgs(variant).values()))
    if not usual.fixed_input_size:  # timm fills it in for the others
        kwargs.setdefault('img_size', usual.input_size[1:])
    reading = False

    def construct(**model_args: Any) -> Backbone:
        nonlocal reading
        model = Backbone(**model_args)
        reading = True
        return model

    def convert(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        nonlocal reading
        reading = False
        return checkpoint_filter_fn(state_dict, model)

    try:
        return build_model_with_cfg(
            construct,
            variant,
            pretrained,
            model_cfg=cfg.with_options(**options),
            pretrained_filter_fn=convert,
            feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
            **kwargs)
    except Exception as error:
        if pretrained and reading and source:  # torch's readers raise about ten kinds of error on damaged files
            raise RuntimeError(
                f'{source} could not be read as weights of {variant}: it is truncated or no checkpoint at all '
                f'({type(error).__name__}: {error}).') from error
        raise


def _check_keywords(variant: str, cfg: BackboneCfg, kwargs: dict[str, Any]) -> None:
    if 'output_stride' in kwargs:
        raise ValueError(
            f'output_stride is not supported, got {kwargs["output_stride"]!r}: the strides of {variant} are '
            f'{list(cfg.reductions)} by its word. Take an earlier level through out_indices instead.')
    levels, wanted = len(cfg.reductions), kwargs.get('out_indices')
    if isinstance(wanted, (list, tuple)) and not all(-levels <= level < levels for level in wanted):
        hint = ' segmentation_models_pytorch asks for these with its encoder_depth of 5: pass encoder_depth=4.'
        raise ValueError(
            f'out_indices must be from 0 to {levels - 1}, the levels of {variant} with strides {list(cfg.reductions)}, '
            f'got {tuple(wanted)}.{hint if tuple(wanted) == tuple(range(levels + 1)) else ""}')
    known = (*_MODEL_ARGS, *_CFG_FIELDS, *_BUILDER_ARGS)
    for key in kwargs:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise TypeError(
                f'{variant} has no keyword {key!r}{f"; did you mean {close[0]!r}?" if close else "."} '
                f'Known: {", ".join((*_MODEL_ARGS, *_CFG_FIELDS))}.')


def _check_source(
        variant: str, cfg: Any, overlay: dict[str, Any] | None, pretrained: bool, cache_dir: str | Path | None) -> str:
    """The file or folder that timm will read, '' if that is not known; refuses unknown tags, missing files and names.

    Released weights are downloaded and checked here; timm then finds them in the cache.
    """
    tags, asked = get_arch_pretrained_cfgs(variant), variant
    if isinstance(cfg, str):
        asked = f'{variant}.{cfg}'
        if asked not in tags:
            raise ValueError(
                f'{variant} has no pretrained tag {cfg!r}; known tags: '
                f'{", ".join(name.partition(".")[2] for name in tags)}.')
        cfg = tags[asked]
    if not pretrained:
        return ''
    cfg = cfg or next(iter(tags.values()))
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    cfg = {**cfg, **(overlay or {})}
    if not any(cfg.get(key) for key in _SOURCES):
        zoo = __package__.partition('.')[0]
        released = [name for name in timm.list_pretrained() if model_entrypoint(name).__module__.startswith(zoo)]
        raise RuntimeError(
            f'pretrained=True: {asked} has no released weights. Names of this zoo that have some: '
            f'{", ".join(released) or "none yet"}. Pass pretrained=False, or weights of your own by '
            f'pretrained_cfg_overlay=dict(file=...).')
    file, folder = cfg.get('file'), cfg.get('source') == 'local-dir'
    if cfg.get('state_dict') and cfg.get('source') not in ('hf-hub', 'local-dir'):
        return ''
    if name := find_release(cfg):
        return str(fetch(name, cache_dir))
    if not file:
        return ''
    if not (Path(file).is_dir() if folder else Path(file).is_file()):
        raise FileNotFoundError(
            f'pretrained=True: there is no checkpoint {"folder" if folder else "file"} {str(file)!r}.')
    return str(file)
