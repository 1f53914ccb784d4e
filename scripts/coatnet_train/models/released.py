"""Names of the released weights, read without importing coatnet_zoo, which would take seconds for torch and timm."""
import json
import os
from importlib.util import find_spec
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['best_release', 'cached_kecam', 'released_models']


def released_models() -> tuple[str, ...]:
    """NAME.TAG of all released weights and of kecam's weights in the cache, best first.

    Packaged weights come first, then cached ones, then those to download. Within each group, more classes come before
    fewer (accuracies are comparable only on the same classes), then a higher recorded top-1. Raises ConfigError if
    releases.json is damaged.
    """
    path = weights_folder() / 'releases.json'
    try:
        releases = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}

        def score(name: str) -> tuple:
            entry = releases[name]
            top1 = entry['release']['metrics']['top1']
            return bool(entry['packaged']), entry['pretrained_cfg']['num_classes'], -1 if top1 is None else top1

        names = sorted(releases, key=score, reverse=True)
        packaged = [name for name in names if releases[name]['packaged']]
        return tuple(dict.fromkeys((*packaged, *cached_kecam(), *names)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{path} is damaged ({type(error).__name__}: {one_line(error)}); reinstall coatnet_zoo, or '
                          f'take back what was changed in it.') from error


def cached_kecam() -> tuple[str, ...]:
    """NAME.TAG of kecam's weights that `coatnet_zoo.kecam` has converted and cached, the most accurate first."""
    path = weights_folder() / 'kecam.json'
    published = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    cache = os.environ.get('XDG_CACHE_HOME', '~/.cache')  # as torch.hub.get_dir() finds its folder
    folder = Path(os.environ.get('TORCH_HOME', Path(cache, 'torch')), 'hub/checkpoints').expanduser()

    def is_cached(name: str) -> bool:
        file = folder / f'{name.replace(".", "-")}-{published[name]["md5"][:8]}.safetensors'
        return file.is_file() and file.with_name(f'{file.name}.sha256').is_file()

    return tuple(sorted(filter(is_cached, published), key=lambda name: published[name]['top1'], reverse=True))


def best_release() -> str:
    """First of `released_models`, the default of predict.py, the demo and the Space; raises ConfigError without any."""
    if not (names := released_models()):
        raise ConfigError('--model must be given where no weights are released; name one.')
    return names[0]


def weights_folder() -> Path:
    """Folder `weights` of the package, found without importing it."""
    package = find_spec('coatnet_zoo')
    if package is None:
        raise ModuleNotFoundError("No module named 'coatnet_zoo'", name='coatnet_zoo')
    return Path(package.origin).with_name('weights')
