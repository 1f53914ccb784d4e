"""Names of the released weights, read without coatnet_zoo, whose import takes the seconds of torch and timm."""
import json
from importlib.util import find_spec
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['best_release', 'released_models']


def released_models() -> tuple[str, ...]:
    """NAME.TAG of everything released, best first.

    What ships with the package comes before what is downloaded, more classes before fewer (accuracies compare on the
    same classes alone), and then the higher recorded top-1.
    """
    package = find_spec('coatnet_zoo')
    if package is None:
        raise ModuleNotFoundError("No module named 'coatnet_zoo'", name='coatnet_zoo')
    path = Path(package.origin).with_name('weights') / 'releases.json'
    try:
        releases = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}

        def score(name: str) -> tuple:
            entry = releases[name]
            top1 = entry['release']['metrics']['top1']
            return bool(entry['packaged']), entry['pretrained_cfg']['num_classes'], -1 if top1 is None else top1

        return tuple(sorted(releases, key=score, reverse=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{path} is damaged ({type(error).__name__}: {one_line(error)}); reinstall coatnet_zoo, or '
                          f'take back what was changed in it.') from error


def best_release() -> str:
    """The release that ships and is the most accurate; predict.py, the demo and the Space open with it."""
    if not (names := released_models()):
        raise ConfigError('--model must be given where no weights are released; name one.')
    return names[0]
