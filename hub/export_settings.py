"""Settings of export.py and their checks, without torch and timm."""
import re
from dataclasses import dataclass, field
from pathlib import Path

from coatnet_train.data.config import default_workers
from coatnet_train.runtime.cli import ConfigError, flag, tyro
from release_rules import DTYPES, check_license, check_tag

__all__ = ['ExportSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Run to release, its name and its destination."""

    run_dir: tyro.conf.Positional[Path]  # Run folder of finetune.py.
    name: str  # NAME.TAG: a name of the zoo, and a tag for data and recipe, such as coatnet_pico_64.tin200.
    output: Path | None = None  # Folder to make (output/hub/NAME.TAG if not given).


@dataclass(frozen=True, kw_only=True)
class WeightsSettings:
    """Storage format of the weights."""

    dtype: str = 'float32'  # float16 or bfloat16 round the weights of convolutions and linear layers.
    data_dir: str = ''  # Held-out images, as in eval_imagenet.py, to measure the accuracy after rounding.
    workers: int = field(default_factory=default_workers)  # Processes that read them.
    with_onnx: bool = False  # Also write model.onnx and model.pt2.


@dataclass(frozen=True, kw_only=True)
class CardTextSettings:
    """Metadata that the run does not record."""

    license: str | None = None  # Identifier of the Hub (if not given: of the weights it started from, else apache-2.0).
    license_name: str | None = None  # Its name, for --license other.
    license_link: str | None = None  # Its address, for --license other.
    trained_on: str | None = None  # Name of the training data (that of --dataset in the run if not given).
    data_license: str | None = None  # Licence or terms of the training data.
    dataset_id: str | None = None  # The training data's OWNER/NAME on the Hub (that of hfds/ in the run if not given).
    teacher: str | None = None  # The teacher of a distilled run in words: model, weights, what it has seen.
    evaluated_on: str | None = None  # Name of the images that the figures are of (their folder if not given).
    repo: str | None = None  # OWNER/NAME that the card's example loads (publish.py writes it if not given).
    source: str | None = None  # Where pip gets coatnet_zoo for the card's example: a git address, or a name on PyPI.


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CardTextSettings, WeightsSettings, RunSettings):
    """All settings of export.py."""


def check_values(settings: ExportSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if settings.dtype not in DTYPES:
        raise ConfigError(f'--dtype must be one of {", ".join(DTYPES)}, got {settings.dtype!r}.')
    if settings.data_dir and settings.dtype == 'float32':
        raise ConfigError('--data-dir measures what --dtype costs, which is float32 here; give --dtype, or put '
                          'figures into the card by eval_imagenet.py --results-file RUN_DIR/evaluation.json.')
    check_tag(settings.name)
    check_license(settings.license or 'apache-2.0', settings.license_name, settings.license_link)
    for name in ('trained_on', 'data_license', 'teacher', 'evaluated_on', 'license_name', 'license_link', 'source'):
        value = getattr(settings, name)
        if value is not None and not (value.strip() and value.isprintable()):  # it goes into a table of the card
            raise ConfigError(f'{flag(name)} must be one line of text, got {value!r}; give that, or leave it out.')
    if settings.source and not re.fullmatch(r"[^\s'\"]+", settings.source):
        raise ConfigError(f'--source must be what pip installs coatnet_zoo from, without blanks and quotes, got '
                          f'{settings.source!r}.')
    for name in ('repo', 'dataset_id'):
        value = getattr(settings, name)
        if value is not None and not re.fullmatch(r'[\w.-]+/[\w.-]+', value):
            raise ConfigError(f'{flag(name)} must be OWNER/NAME on the Hub, got {value!r}.')
