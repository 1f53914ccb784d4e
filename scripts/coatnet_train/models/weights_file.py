"""Load weights from a file into any model of timm or the zoo: unwrap, convert by the architecture's filter, check."""
import hashlib
import re
import sys
from pathlib import Path

import torch
from timm.models import clean_state_dict, load_checkpoint, load_state_dict, model_entrypoint
from torch import nn

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_zoo import kecam
from coatnet_zoo.models.backbone import Backbone
from coatnet_zoo.models.state_dict import convert_state_dict, explain_misfit

__all__ = ['load_weights', 'read_weights', 'to_flags', 'weights_digest']

# Keys under which training scripts keep a state dict, most likely first; timm handles state_dict and model itself.
WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'module', 'net', 'network', 'weights', 'params', 'backbone')
# Prefixes that wrappers insert into parameter names: torch.compile, FSDP, activation checkpointing.
INSIDE = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# Model keywords that have flags of their own in the scripts.
FLAGS = {
    **{name: f'--{name.replace("_", "-")}' for name in (
        'num_classes', 'in_chans', 'img_size', 'mean', 'std', 'dropconnect')},
    'drop_rate': '--drop', 'drop_path_rate': '--drop-path', 'checkpoint_path': '--checkpoint'}


def load_weights(
        model: nn.Module, name: str, file: str, option: str = '--checkpoint', use_ema: bool = True,
        explicit: frozenset[str] = frozenset()) -> None:
    """Load a file into a model, strictly: every tensor must match.

    Args:
        model: Model to load into.
        name: As --model names it, for messages.
        file: State dict, alone or in a checkpoint of training, in the format of torch or safetensors; .h5 of
            keras_cv_attention_models for coatnet_0_kecam; .npz where timm reads that for this model.
        option: The option that named the file, for messages.
        use_ema: Take averaged weights where the file has some.
        explicit: Model keywords that the user has set (--model-kwargs).

    Raises ConfigError for a file without weights, or weights that do not fit.
    """
    if Path(file).suffix.lower() in ('.npz', '.npy'):
        try:
            load_checkpoint(model, file)
        except Exception as error:  # each model has its own reader
            raise ConfigError(f'{option} {file} cannot be read as NumPy weights of --model {name}: '
                              f'{one_line(error)}.') from error
        return
    state, model_state = read_weights(file, option, use_ema), model.state_dict()
    try:
        if Path(file).suffix == '.h5' and isinstance(model, Backbone):
            kecam.check_choices(model.cfg, explicit)
        state = convert(strip_prefix(state, model_state), model)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f'{option} {file} does not fit --model {name}: {to_flags(one_line(error))}') from error
    if not model.num_classes:  # as timm does it for pretrained weights
        state = {key: value for key, value in state.items()
                 if key in model_state or not key.startswith(classifiers_of(model))}
    if misfit := explain_misfit(state, model):
        raise ConfigError(f'{option} {file} does not fit --model {name}: {misfit} {way_out(state, model, option)}')
    model.load_state_dict(state)


def read_weights(file: str, option: str = '--checkpoint', use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read the state dict in a file, without wrapper keys and prefixes; raises ConfigError if there is none."""
    if Path(file).suffix == '.h5':
        try:
            return kecam.read_h5(Path(file))
        except RuntimeError as error:
            raise ConfigError(f'{option}: {one_line(error)}') from error
    try:
        try:
            found = load_state_dict(file, use_ema=use_ema)
        except AttributeError:  # such as a checkpoint whose 'model' is a name, with the weights under another key
            found = dict(torch.load(file, map_location='cpu', weights_only=True))
    except Exception as error:  # torch.load may raise anything for a file of another format
        text = f'{error} {error.__cause__}'
        pickled = re.findall(r'(?:Unsupported globals: |GLOBAL )([^\s,]+)', text)
        if 'TorchScript' in text or pickled:
            what = 'a TorchScript model' if 'TorchScript' in text else f'pickled objects ({pickled[0].rstrip(".")})'
            raise ConfigError(
                f'{option} {file} holds {what}, not weights alone, and is not opened, since that can run code; where '
                f'you trust it, open it in Python and torch.save(model.state_dict(), ...), then give that '
                f'file.') from error
        raise ConfigError(f'{option} {file} holds no weights that torch or safetensors can read; give another file '
                          f'or leave it.') from error
    dicts = find_state_dicts(found)
    known = [key for key in ('', *WRAPPERS) if key in dicts]
    if not dicts:
        no_tensors = [str(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
        raise ConfigError(f'{option} {file} holds no weights that torch or safetensors can read: {no_tensors[:3]} '
                          f'are no tensors; save a state dict alone.')
    if not known and len(dicts) > 1:
        raise ConfigError(f'{option} {file} holds several state dicts ({", ".join(sorted(dicts)[:5])}); save the one '
                          f'that is meant in a file of its own.')
    state = dicts[known[0] if known else next(iter(dicts))]
    state.pop('n_averaged', None)  # a counter of torch.optim.swa_utils.AveragedModel
    return {INSIDE.sub('', key): value for key, value in state.items()}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the state dict: names, dtypes, shapes and bytes in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_state_dicts(found: dict, depth: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts (dicts of tensors only) in a checkpoint by their innermost key; '' for the checkpoint itself."""
    if found and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()):
        return {'': clean_state_dict(found)}
    dicts = {}
    for key, value in found.items():
        if isinstance(value, dict) and depth and not str(key).startswith(('optim', 'sched', 'scaler')):
            for inner, state in find_state_dicts(value, depth - 1).items():
                dicts.setdefault(inner or str(key), state)
    return dicts


def strip_prefix(state: dict[str, torch.Tensor], model_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strip the prefix, such as 'model.', that makes most names match the model's; other tensors are dropped.

    Raises ValueError where several prefixes match equally well.
    """
    counts = {'': 0}
    for key in state:
        parts = key.split('.')
        for place in range(min(4, len(parts))):
            if '.'.join(parts[place:]) in model_state:
                prefix = ''.join(f'{part}.' for part in parts[:place])
                counts[prefix] = counts.get(prefix, 0) + 1
    best = max(counts, key=counts.get)
    if counts[best] <= max(counts[''], len(model_state) / 2):
        return state
    if len(equal := [prefix for prefix in counts if counts[prefix] == counts[best]]) > 1:
        raise ValueError(f'it holds several models, under {", ".join(equal[:5])}; save the one that is meant in a file '
                         f'of its own.')
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def convert(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert a state dict by the architecture's filter, as timm does for pretrained weights."""
    if isinstance(model, Backbone):
        return convert_state_dict(state, model)
    module = sys.modules[model_entrypoint(model.pretrained_cfg['architecture']).__module__]
    filter_fn = getattr(module, 'checkpoint_filter_fn', None)
    if filter_fn is None:
        return state
    try:
        try:
            return filter_fn(dict(state), model)
        except TypeError:  # some of timm's filters take one argument
            return filter_fn(dict(state))
    except Exception:  # weights of another architecture: explain_misfit has a better message than the filter
        return state


def classifiers_of(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get('classifier') or ()
    return tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))


def way_out(state: dict[str, torch.Tensor], model: nn.Module, option: str) -> str:
    """Advice for the error message about a state dict that does not fit."""
    classes = next((len(value) for key, value in state.items() if key.startswith(classifiers_of(model))), None)
    if classes not in (None, model.num_classes) and option == '--checkpoint':
        return f'Give --num-classes {classes}, and --img-size and --model-kwargs as in training.'
    if classes not in (None, model.num_classes):
        return ('Its classes must be the data\'s. A new classifier on the trunk of other weights is made by --model '
                'local-dir:FOLDER --pretrained, FOLDER having the config.json of those weights beside them.')
    return 'Give the --model it was made by, with --in-chans, --img-size and --model-kwargs as in training.'


def to_flags(text: str) -> str:
    """Replace Python keywords in the text of an exception by the flags of the scripts."""
    text = text.replace('`', '')
    text = re.sub(r"timm\.create_model\('([^']+)', pretrained=True\)", r'--model \1 --pretrained', text)
    text = re.sub(r'Pass pretrained=False, or weights .*', (
        'Where the command has these flags, --no-pretrained leaves weights out, and --checkpoint or '
        '--initial-checkpoint gives others.'), text)
    text = re.sub(r'\bpretrained=(True|False)', lambda found: f'--{"no-" * (found[1] == "False")}pretrained', text)
    text = re.sub(r'call set_input_size\(\(.*?\)\) or ', '', text)  # a method without a flag
    text = re.sub(r'\b(\w+)=\((\d+), \2\)', r'\1=\2', text)  # flags take one size for both sides
    text = re.sub(rf'\b({"|".join(FLAGS)})(?= must\b)', lambda found: FLAGS[found[1]], text)
    text = re.sub(rf'\b({"|".join(FLAGS)})=', lambda found: f'{FLAGS[found[1]]} ', text)
    text = re.sub(r"unexpected keyword argument '(\w+)'", lambda found: (
        f'unexpected argument {FLAGS.get(found[1], f"--model-kwargs {found[1]}")}'), text)
    fields = '|'.join(('flavor', 'dynamic_img_size', *kecam.CHOICES))
    return re.sub(rf"\b({fields})='?([\w.-]*\w)'?", r'--model-kwargs \1=\2', text)
