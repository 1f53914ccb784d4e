"""CoAtNet weights of keras_cv_attention_models (kecam), downloaded from their publisher and converted on this machine.

kecam (https://github.com/leondgarse/keras_cv_attention_models) published the only public weights for a variant of the
CoAtNet paper's table: CoAtNet0 on ImageNet-1k, as Keras .h5 files. They are not re-hosted: its author states that the
licence of the data set applies to the weights (ImageNet: non-commercial research).

A file of `save_weights` or `model.save` holds group LAYER with the attribute `weight_names` and the datasets
LAYER/LAYER/NAME:0, under `model_weights` in the second case. Convolutions are (Kh, Kw, in, out), depthwise ones
(Kh, Kw, channels, 1), dense layers (in, out). Biases that kecam leaves out are zeros here.
"""
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from .download import download, sha256_of

__all__ = [
    'CHOICES',
    'LICENSE',
    'WEIGHTS',
    'cached_path',
    'cached_weights',
    'check_choices',
    'convert_weights',
    'fetch_weights',
    'import_h5py',
    'is_cached',
    'read_h5',
    'weights_name',
]


@dataclass(frozen=True)
class KecamWeights:
    """One published file: its address, the MD5 that kecam's source records, and top-1 (%) as its author reports."""

    url: str
    md5: str
    top1: float | None = None


# in a data file, so that scripts can list the weights without importing torch
WEIGHTS = {name: KecamWeights(**entry) for name, entry in json.loads(
    Path(__file__).with_name('weights').joinpath('kecam.json').read_text(encoding='utf-8')).items()}
# terms of the weights as their author states them: those of the data set
LICENSE = {'license': 'other', 'license_name': 'imagenet-non-commercial',
           'license_link': 'https://www.image-net.org/download.php'}
# fields of BackboneCfg in which kecam interprets the paper differently, or sets what the paper leaves open
CHOICES: dict[str, Any] = dict(
    pool='max', se_act='act', inner_width='input', head_norm='none', head_hidden_size=0, conv_stride='depthwise',
    act='gelu', conv_norm='batch', conv_norm_eps=1e-5, conv_norm_momentum=0.1, norm_eps=1e-5, stem_bias=False)
_OFFLINE_HINT = "A file at hand loads by pretrained_cfg_overlay=dict(file='NAME.h5')."

_STEM_AND_HEAD = {
    'stem_1_conv': 'stem.conv1', 'stem_1_bn': 'stem.norm1', 'stem_2_conv': 'stem.conv2', 'predictions': 'head.fc'}
_MBCONV = {
    'shortcut_conv': 'shortcut.proj', 'preact_bn': 'pre_norm', 'expand_conv': 'expand', 'expand_bn': 'norm1',
    'MB_dw_conv': 'depthwise', 'MB_dw_bn': 'norm2', 'se_1_conv': 'se.reduce', 'se_2_conv': 'se.expand',
    'MB_pw_conv': 'project'}
_TRANSFORMER = {
    'shortcut_conv': 'shortcut', 'preact_ln': 'norm1', 'mhsa_qkv_conv': 'attn.qkv', 'mhsa_pos_emb': 'attn.rel_bias',
    'mhsa_output': 'attn.proj', 'ffn_preact_ln': 'norm2', 'ffn_1_conv': 'mlp.fc1', 'ffn_2_conv': 'mlp.fc2'}
# parameter names of Keras and of kecam's torch backend -> names here
_PARAMETERS = {
    'kernel': 'weight', 'depthwise_kernel': 'weight', 'weight': 'weight', 'gamma': 'weight', 'beta': 'bias',
    'bias': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var', 'running_mean': 'running_mean',
    'running_var': 'running_var', 'positional_embedding': 'table'}
_WITHOUT_BIAS = ('shortcut.proj', 'project', 'shortcut', 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')


def weights_name(cfg: dict[str, Any]) -> str | None:
    """NAME.TAG of the published file that a pretrained cfg loads; None for any other source.

    The file is recognised by its name, so that a mirror may serve it; its MD5 is verified in any case.
    """
    if any(cfg.get(key) for key in ('state_dict', 'file', 'hf_hub_id')) or not cfg.get('url'):
        return None
    file = Path(cfg['url']).name
    return next((name for name, weights in WEIGHTS.items() if Path(weights.url).name == file), None)


def fetch_weights(
        name: str, url: str, check: Callable[[dict[str, torch.Tensor]], None],
        cache_dir: str | Path | None = None) -> Path:
    """Path of the converted and verified weights; the first call downloads and converts them.

    Later calls need neither network nor h5py: the safetensors file stays in the cache, beside its sha256.

    Args:
        name: NAME.TAG out of `WEIGHTS`.
        url: Address of the .h5 file.
        check: Raises if the converted weights do not fit their architecture; they are then not cached.
        cache_dir: Cache folder, torch.hub's `checkpoints` if None.

    Raises:
        ModuleNotFoundError: h5py is needed and not installed.
        RuntimeError: The download fails, the file is not the published one, or the cached file is corrupted.
    """
    path = cached_path(name, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix('.lock')):  # several processes may start at once
        if not is_cached(name, cache_dir):
            import_h5py()  # before 94 MB are downloaded
            archive = path.with_suffix('.h5')
            try:
                download(url, archive, WEIGHTS[name].md5)
            except RuntimeError as error:
                raise RuntimeError(f'{name}: {error} {_OFFLINE_HINT}') from error
            try:
                state_dict = read_h5(archive)
                check(state_dict)
                _write(path, state_dict, WEIGHTS[name])
            finally:
                archive.unlink()
    return cached_weights(name, cache_dir)


def cached_weights(name: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the converted weights in the cache, verified against the sha256 recorded at conversion.

    Raises:
        FileNotFoundError: They are not in the cache.
        RuntimeError: The file has changed since conversion.
    """
    path = cached_path(name, cache_dir)
    if not is_cached(name, cache_dir):
        raise FileNotFoundError(
            f'{name}: {path} does not exist; timm.create_model({name!r}, pretrained=True) downloads and converts it.')
    expected = _checksum_file(path).read_text(encoding='utf-8').partition(' ')[0]
    if (found := sha256_of(path)) != expected:
        raise RuntimeError(
            f'{name}: {path} is damaged and was not loaded: its sha256 is {found}, at conversion it was {expected}; '
            f'delete {path} and load {name} again.')
    return path


def cached_path(name: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the converted weights in the cache, whether or not they exist."""
    folder = Path(torch.hub.get_dir(), 'checkpoints') if cache_dir is None else Path(cache_dir)
    return folder / f'{name.replace(".", "-")}-{WEIGHTS[name].md5[:8]}.safetensors'


def is_cached(name: str, cache_dir: str | Path | None = None) -> bool:
    """Whether the converted weights are in the cache, so that they load without network; does not verify them."""
    path = cached_path(name, cache_dir)
    return path.is_file() and _checksum_file(path).is_file()


def read_h5(path: Path) -> dict[str, torch.Tensor]:
    """Read a CoAtNet of kecam as a state dict of `Backbone`.

    Args:
        path: File of Keras' `save_weights` or `model.save`.

    Raises:
        ModuleNotFoundError: h5py is not installed.
        RuntimeError: The file is truncated, no Keras file or of another architecture, or has widths by rules of kecam
            that this package lacks.
    """
    h5py = import_h5py()
    try:
        with h5py.File(path) as file:
            root = file.get('model_weights', file)
            names = [(group, name.decode() if isinstance(name, bytes) else str(name))
                     for group in root.values() for name in group.attrs.get('weight_names', ())]
            weights = {name.removesuffix(':0'): torch.as_tensor(group[name][()]) for group, name in names}
    except Exception as error:  # h5py raises about six kinds of error on damaged files
        raise RuntimeError(
            f'{path} could not be read as a Keras .h5 file: it is truncated or something else '
            f'({type(error).__name__}: {error}).') from error
    if not weights:
        raise RuntimeError(f'{path} is an HDF5 file without weights of Keras: no group has weight_names.')
    try:
        state_dict = convert_weights(weights)
        _check_widths(state_dict)
    except (ValueError, IndexError, TypeError) as error:  # the last two: tensors with too few dimensions
        raise RuntimeError(f'{path} is no CoAtNet of kecam that can be converted: {error}') from error
    return state_dict


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors keyed by Keras' names, LAYER/NAME, to a state dict of `Backbone`.

    Raises:
        ValueError: Unknown layers, or a tensor whose shape its layer cannot have.
    """
    layers = {tuple(name.split('/')[-2:]): tensor for name, tensor in weights.items()}
    attention = {layer.removesuffix('mhsa_qkv_conv') for layer, _ in layers if layer.endswith('_mhsa_qkv_conv')}
    state_dict, unknown = {}, []
    for (layer, parameter), tensor in layers.items():
        block = re.fullmatch(r'(stack_(\d+)_block_(\d+)_)(\w+)', layer)
        is_attention = block is not None and block[1] in attention
        if block is None:
            prefix, module = '', _STEM_AND_HEAD.get(layer)
        else:
            prefix = f'stages.{int(block[2]) - 1}.blocks.{int(block[3]) - 1}.'
            module = (_TRANSFORMER if is_attention else _MBCONV).get(block[4])
        if module is None or parameter not in _PARAMETERS:
            unknown.append(f'{layer}/{parameter}')
            continue
        value = _convert_tensor(f'{layer}/{parameter}', tensor.float(), is_attention)
        state_dict[f'{prefix}{module}.{_PARAMETERS[parameter]}'] = value
        if module in _WITHOUT_BIAS:
            state_dict.setdefault(f'{prefix}{module}.bias', torch.zeros(len(value)))
        if _PARAMETERS[parameter] == 'running_var':
            state_dict[f'{prefix}{module}.num_batches_tracked'] = torch.tensor(0)
    if unknown:
        raise ValueError(f'it has {len(unknown)} tensors of other layers: {", ".join(unknown[:5])}.')
    return state_dict


def _convert_tensor(name: str, tensor: torch.Tensor, is_attention: bool) -> torch.Tensor:
    if name.endswith('positional_embedding'):
        side = math.isqrt(tensor.shape[-1])
        if tensor.ndim != 2 or side * side != tensor.shape[1] or side % 2 == 0:
            raise ValueError(f'{name} must be (heads, n * n) with n odd, a bias table of square maps, got '
                             f'{tuple(tensor.shape)}.')
        return tensor.unflatten(1, (side, side))
    if tensor.ndim == 4:
        tensor = tensor.permute((2, 3, 0, 1) if '_MB_dw_conv/' in name else (3, 2, 0, 1))
        if is_attention:  # 1x1 convolutions there, linear layers here
            if tensor.shape[2:] != (1, 1):
                raise ValueError(f'{name} must be a 1x1 convolution, got a kernel of {tuple(tensor.shape[2:])}.')
            tensor = tensor.flatten(1)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return tensor.contiguous()


def _check_widths(state_dict: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for widths by rules of kecam that this package lacks; a misfit would not show the reason."""
    ratios = {}
    for key, weight in state_dict.items():
        if key.endswith('.se.reduce.weight'):
            block = key.removesuffix('se.reduce.weight')
            if (expand := state_dict.get(f'{block}expand.weight')) is not None:
                ratios[block] = len(weight) / expand.shape[1]
        if key.endswith(('.shortcut.weight', '.shortcut.proj.weight')) and len(weight) == weight.shape[1]:
            raise ValueError(f'{key} projects {len(weight)} channels to as many; kecam always projects the shortcut '
                             f'where a stage begins, this package only where the width changes.')
    if len(set(ratios.values())) > 1:
        shown = ', '.join(f'{block}se {ratio:g}' for block, ratio in list(ratios.items())[:4])
        raise ValueError(f'its squeeze widths are no single fraction of the input widths ({shown}): kecam rounds them '
                         f'to multiples of 8, this package does not.')


def check_choices(cfg: Any, explicit: set[str]) -> None:
    """Raise RuntimeError if a model would compute something else from a file of kecam than kecam does.

    Args:
        cfg: BackboneCfg of the model.
        explicit: Fields that the caller has set by keyword; they are not checked.

    Raises:
        RuntimeError: A field that the caller has not set differs from `CHOICES`.
    """
    wrong = [f'{name}={value!r}' for name, value in CHOICES.items()
             if name not in explicit and getattr(cfg, name) != value]
    if wrong:
        raise RuntimeError(
            f'The checkpoint is a CoAtNet of kecam, and this model would compute something else from it. Create the '
            f'model as coatnet_0_kecam, or with {", ".join(wrong)}.')


def import_h5py() -> Any:
    """Import h5py; ModuleNotFoundError names the extra that installs it."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "h5py, which reads Keras' .h5 files, is not installed: pip install 'coatnet_zoo[kecam]'. Once converted, "
            "weights load without it.", name='h5py') from error
    return h5py


def _checksum_file(path: Path) -> Path:
    return path.with_name(f'{path.name}.sha256')


def _write(path: Path, state_dict: dict[str, torch.Tensor], weights: KecamWeights) -> None:
    """Write the weights, then their sha256; if the process dies in between, the conversion is repeated."""
    checksum = _checksum_file(path)
    checksum.unlink(missing_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        save_file(state_dict, temporary, metadata={'format': 'pt', 'source': weights.url, 'source_md5': weights.md5})
        digest = sha256_of(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    temporary.write_text(f'{digest}  {path.name}\n', encoding='utf-8')
    temporary.replace(checksum)
