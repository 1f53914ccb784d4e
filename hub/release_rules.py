"""Files, fields and naming rules of a release folder, without torch and timm."""
import re
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError

__all__ = ['DTYPES', 'FILES', 'ONNX_FILES', 'RELEASE_FIELDS', 'TOLERANCE', 'check_license', 'check_tag', 'list_files']

FILES = ('README.md', 'config.json', 'model.safetensors', 'golden.safetensors', 'curves.png')
ONNX_FILES = ('model.onnx', 'model.pt2')  # both or neither
DTYPES = ('float32', 'float16', 'bfloat16')
TOLERANCE = 1e-5  # of logits, relative to the largest golden one: reordered float32 sums differ by 1e-6
# Fields of the key 'release' of config.json; null means unknown, which the card states.
RELEASE_FIELDS = (
    'metrics', 'evaluated_on', 'trained_on', 'recipe', 'command', 'hardware', 'hours', 'seed', 'commit', 'epochs',
    'data_license', 'dtype', 'source',
    'best_epoch', 'picked_best_epoch', 'started_from', 'teacher', 'date', 'torch', 'timm', 'dataset_id', 'repo',
    'license_name', 'license_link',
    'origin')  # for weights that convert.py made: file, md5, url, top1 reported by the author, chelsea; else null


def check_tag(name: str, option: str = '--name') -> None:
    """Raise ConfigError for a NAME.TAG whose tag timm could not register."""
    architecture, _, tag = name.partition('.')
    if not re.fullmatch(r'[a-z0-9]+(_[a-z0-9]+)*', tag) or tag == 'untrained':
        raise ConfigError(f'{option} must end in a tag of small letters, digits and single underscores that says '
                          f'data and recipe, such as {architecture}.tin200, got {name!r}.')


def check_license(license: str, license_name: str | None, license_link: str | None, place: str = '') -> None:
    """Raise ConfigError unless the licence is an id of the Hub's list, or 'other' with a name and a link."""
    if not re.fullmatch(r'[a-z0-9]+([.-][a-z0-9]+)*', license):
        raise ConfigError(f'{place}--license must be an identifier of the Hub, such as apache-2.0, cc-by-nc-4.0 or '
                          f'other, got {license!r}.')
    if (license == 'other') != bool(license_name and license_link) or bool(license_name) != bool(license_link):
        raise ConfigError(f'{place}--license other needs --license-name and --license-link, and no other licence has '
                          f'them, got {license}, {license_name!r} and {license_link!r}.')


def list_files(folder: Path) -> list[Path]:
    """List the files of a release folder; raises ConfigError if files are missing or others are present."""
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f'FOLDER {folder} must be a folder that export.py made, and is none; give one.')
    found = sorted(folder.iterdir())
    for path in found:
        if path.name not in (*FILES, *ONNX_FILES):
            raise ConfigError(f'FOLDER {folder} must hold the files of a release alone, but {path.name!r} is none of '
                              f'{", ".join((*FILES, *ONNX_FILES))}; remove it, or export anew.')
        if path.is_symlink() or not path.is_file():
            raise ConfigError(f'FOLDER {folder}: {path.name} must be a file, not a link or a folder; export anew.')
    names = {path.name for path in found}
    wanted = {*FILES, *(ONNX_FILES if names & set(ONNX_FILES) else ())} - {'curves.png'}  # only runs have curves
    if missing := sorted(wanted - names):
        raise ConfigError(f'FOLDER {folder} lacks {", ".join(missing)}; export anew.')
    return found
