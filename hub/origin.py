"""origin.json of a converted run folder: the source of third-party weights, and its description in a release."""
import json
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line
from release_rules import RELEASE_FIELDS

__all__ = ['ORIGIN', 'describe_converted', 'read_origin']

ORIGIN = 'origin.json'
# fields of origin.json; a release repeats the first five under 'origin'
RELEASED = ('file', 'md5', 'url', 'top1', 'chelsea')
FIELDS = (*RELEASED, 'trained_on', 'data_license', 'license', 'license_name', 'license_link', 'command', 'date',
          'torch', 'timm', 'commit')


def read_origin(folder: Path) -> dict | None:
    """Read origin.json in a folder; None if there is none, because a run made the weights. Raises ConfigError."""
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        origin = json.loads(path.read_text(encoding='utf-8'))
        if missing := [name for name in FIELDS if name not in origin]:
            raise ValueError(f'it lacks {", ".join(missing)}')
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f'RUN_DIR: {path} is not as convert.py writes it: {one_line(error)}; convert '
                          f'again.') from error
    return origin


def describe_converted(origin: dict, **said: object) -> dict:
    """Content of config.json under 'release' for converted weights; unknown fields are None.

    Args:
        origin: What `read_origin` returned.
        said: Fields of the release that are known from other files or the settings.
    """
    known = ('trained_on', 'data_license', 'command', 'date', 'torch', 'timm', 'commit')
    release = {name: origin[name] for name in known}
    release |= {name: value for name, value in said.items() if value is not None}
    release |= {'origin': {name: origin[name] for name in RELEASED}, 'picked_best_epoch': False}
    return {name: release.get(name) for name in RELEASE_FIELDS}
