"""Settings of eval_imagenet.py and their checks, without torch and timm."""
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.data.config import DataSettings
from coatnet_train.models.config import ModelSettings, check_model_settings
from coatnet_train.runtime.cli import ConfigError, check_range

__all__ = ['EvaluationSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class EvaluationDataSettings(DataSettings):
    """Images to evaluate on."""

    split: str = 'validation'  # Name of the split; a folder with neither this nor train/ is taken itself.
    num_samples: int | None = None  # Images of a stream that does not say it.
    valid_labels: str = 'auto'  # Logits that compete: all, folder, imagenet_a, imagenet_r, a file; auto knows -A, -R.
    real_labels: str = ''  # Score against ReaL labels: timm for those bundled with it, or a file such as real.json.
    max_bad_images: float = 0.0  # Fraction of unreadable images to report and leave out before the run stops.


@dataclass(frozen=True, kw_only=True)
class EvaluationModelSettings(ModelSettings):
    """Models to evaluate, a row each."""

    model: tuple[str, ...]  # Names of timm.list_models(), hf-hub:OWNER/NAME or local-dir:FOLDER: a row each.
    pretrained: bool = True  # Load the model's own weights where no --checkpoint takes their place.
    checkpoint: tuple[str, ...] = ()  # Files of weights: one for each --model, or any number for one.
    use_ema: bool = False  # Take the averaged weights of a checkpoint of training.
    use_train_size: bool = False  # Take the model's size and crop of training, not those its weights are tested at.
    reparam: bool = False  # Evaluate the inference form, which is faster on a CPU and rounds differently.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Computation and output."""

    output: str = ''  # Folder for classes.csv, reliability.png and corruptions.csv of each row (none if not given).
    results_file: str = ''  # File for the table, .json or .csv, with the columns of timm's validate.py first.
    batch_size: int = 256  # Images per step and process.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    amp: bool = False  # Mixed precision.
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.
    channels_last: bool = True  # Memory format of images and weights.


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(RunSettings, EvaluationModelSettings, EvaluationDataSettings):
    """All settings of eval_imagenet.py."""


def check_values(settings: EvaluationSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    for name, minimum, maximum in (('batch_size', 1, 2**31), ('workers', 0, 2**10), ('max_bad_images', 0, 1)):
        check_range(settings, name, minimum, maximum)
    if not settings.model:
        raise ConfigError('--model needs at least one name.')
    if settings.checkpoint and len(settings.model) not in (1, len(settings.checkpoint)):
        raise ConfigError(f'--checkpoint must be as many files as --model has names, or any number for one name, got '
                          f'{len(settings.checkpoint)} for {len(settings.model)}; leave some out.')
    if missing := [path for path in settings.checkpoint if not Path(path).is_file()]:
        raise ConfigError(f'--checkpoint {missing[0]} is not a file; give one or leave it.')
    if settings.use_ema and not settings.checkpoint:
        raise ConfigError('--use-ema is about a --checkpoint; give one or leave it.')
    if settings.results_file and Path(settings.results_file).suffix not in ('.json', '.csv'):
        raise ConfigError(f'--results-file must end in .json or .csv, got {settings.results_file!r}.')
    if settings.real_labels and settings.valid_labels not in ('auto', 'all'):
        raise ConfigError(f'--real-labels is scored over all logits, got --valid-labels {settings.valid_labels}; '
                          f'leave one of them.')
    check_model_settings(settings)
