"""What a released folder holds, file by file: what export.py writes and verify.py holds it to."""
import re
from pathlib import Path

import timm
import torch
from settings import SettingsError, did_you_mean
from timm.models import get_arch_pretrained_cfgs, model_entrypoint
from torch import nn

import coatnet_zoo

__all__ = [
    'DTYPES', 'FILES', 'ONNX_FILES', 'RELEASE_FIELDS', 'TOLERANCE', 'bare_model', 'check_license', 'largest_gap',
    'list_files', 'own_cfg',
    'split_name', 'stored_dtypes']

FILES = ('README.md', 'config.json', 'model.safetensors', 'golden.safetensors', 'curves.png')
ONNX_FILES = ('model.onnx', 'model.pt2')  # both or neither
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
TOLERANCE = 1e-5  # of logits, as a share of the largest golden one: float32 sums in another order differ by about 1e-6
# The key 'release' of config.json; null is what is not known, and the card then says so.
RELEASE_FIELDS = (
    'metrics', 'evaluated_on', 'trained_on', 'recipe', 'command', 'hardware', 'hours', 'seed', 'commit', 'epochs',
    'data_license', 'dtype',
    'best_epoch', 'picked_best_epoch', 'started_from', 'teacher', 'date', 'torch', 'timm', 'dataset_id', 'repo',
    'license_name', 'license_link')


def split_name(name: str, option: str = '--name') -> tuple[str, str]:
    """('coatnet_pico_64', 'tin200') of 'coatnet_pico_64.tin200'; refuses what timm or this zoo could not register."""
    architecture, _, tag = name.partition('.')
    mine = [known for known in timm.list_models()
            if model_entrypoint(known).__module__.startswith(f'{coatnet_zoo.__name__}.')]
    if architecture not in mine:
        raise SettingsError(f'{option} must be a name of the zoo, a dot and a tag, such as coatnet_pico_64.tin200, got '
                            f'{name!r}{did_you_mean(architecture, mine) or "."}')
    if not re.fullmatch(r'[a-z0-9]+(_[a-z0-9]+)*', tag) or tag == 'untrained':
        raise SettingsError(f'{option} must end in a tag of small letters, digits and single underscores that says '
                            f'data and recipe, such as {architecture}.tin200, got {name!r}.')
    return architecture, tag


def check_license(license: str, license_name: str | None, license_link: str | None, place: str = '') -> None:
    """Refuse a licence that the Hub could not show: an id of its list, or 'other' with a name and a link."""
    if not re.fullmatch(r'[a-z0-9]+([.-][a-z0-9]+)*', license):
        raise SettingsError(f'{place}--license must be an identifier of the Hub, such as apache-2.0, cc-by-nc-4.0 or '
                            f'other, got {license!r}.')
    if (license == 'other') != bool(license_name and license_link) or bool(license_name) != bool(license_link):
        raise SettingsError(f'{place}--license other needs --license-name and --license-link, and no other licence has '
                            f'them, got {license}, {license_name!r} and {license_link!r}.')


def bare_model(config: dict, device: str | None = None) -> nn.Module:
    """The registered name of a config.json with its classes, channels and image size, and nothing else changed.

    Args:
        config: As in config.json.
        device: Where parameters are created.
    """
    channels, *size = config['pretrained_cfg']['input_size']
    return timm.create_model(
        config['architecture'], num_classes=config['num_classes'], in_chans=channels, img_size=tuple(size),
        device=device).eval()


def stored_dtypes(model: nn.Module, dtype: str) -> dict[str, torch.dtype]:
    """How each tensor of a state dict is stored: 16 bits are for the weights of convolutions and linear layers alone.

    Norms with their statistics, biases, bias tables, layer scales and the kernels of LightConv keep what the model has.
    """
    rounded = {f'{name}.weight' for name, module in model.named_modules()
               if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))}
    return {name: DTYPES[dtype] if name in rounded else value.dtype for name, value in model.state_dict().items()}


def largest_gap(logits: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest difference from the golden logits, as a share of the largest of these; NaN counts as infinite."""
    gap = ((logits - golden).abs().max() / golden.abs().max()).item()
    return gap if gap == gap else float('inf')


def own_cfg(architecture: str) -> dict:
    """What the zoo registers for an architecture itself, such as its paper."""
    return next(iter(get_arch_pretrained_cfgs(architecture).values())).to_dict()


def list_files(folder: Path) -> list[Path]:
    """The files of a folder, once it holds those of the list and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        raise SettingsError(f'FOLDER {folder} must be a folder that export.py made, and is none; give one.')
    found = sorted(folder.iterdir())
    for path in found:
        if path.name not in (*FILES, *ONNX_FILES):
            raise SettingsError(f'FOLDER {folder} must hold the files of a release alone, but {path.name!r} is none of '
                                f'{", ".join((*FILES, *ONNX_FILES))}; remove it, or export anew.')
        if path.is_symlink() or not path.is_file():
            raise SettingsError(f'FOLDER {folder}: {path.name} must be a file, not a link or a folder; export anew.')
    names = {path.name for path in found}
    wanted = {*FILES, *(ONNX_FILES if names & set(ONNX_FILES) else ())}
    if missing := sorted(wanted - names):
        raise SettingsError(f'FOLDER {folder} lacks {", ".join(missing)}; export anew.')
    return found
