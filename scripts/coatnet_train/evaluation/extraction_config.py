"""Settings of extract_features.py and their checks, without torch and timm."""
from dataclasses import dataclass

from coatnet_train.data.config import DataSettings, is_stream
from coatnet_train.models.config import ModelSettings
from coatnet_train.runtime.cli import ConfigError, check_range, flag

__all__ = ['ExtractionSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class SplitDataSettings(DataSettings):
    """Images to extract features from."""

    split: str = 'train'  # Split to extract; '' takes the images of --data-dir itself, in class folders or not.
    val_split: str = 'validation'  # Split that --knn and --linear-probe test on; extracted only for them.
    max_bad_images: float = 0.001  # Fraction of unreadable images to report and leave out before the run stops.


@dataclass(frozen=True, kw_only=True)
class CheckpointModelSettings(ModelSettings):
    """Model that extracts the features."""

    checkpoint: str = ''  # Load this file of weights.


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Features, their file format, and their evaluation."""

    features: str = 'pooled'  # pooled (a vector an image) or pyramid (maps).
    out_indices: tuple[int, ...] = ()  # Levels of the pyramid, as in timm (the last five if not given).
    dtype: str = 'float32'  # float32 or float16, of what is written.
    format: str = 'safetensors'  # safetensors or parquet.
    shard_size: int = 1024  # Images in a shard; their features have to fit into memory.
    knn: bool = False  # Print the accuracy of the nearest neighbours in --split on --val-split.
    knn_k: int = 20  # Neighbours that vote.
    knn_temperature: float = 0.07  # A neighbour's vote weighs exp(cosine similarity / temperature).
    linear_probe: bool = False  # Print the accuracy of a logistic regression fitted to --split on --val-split.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Computation and output."""

    output: str = 'output/features'  # Folder for the shards.
    batch_size: int = 64  # Images per step of each process.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    amp: bool = False  # Mixed precision.
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.
    seed: int = 42  # Of weights that are not loaded, and of the images held out by --linear-probe.


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings(RunSettings, FeatureSettings, CheckpointModelSettings, SplitDataSettings):
    """All settings of extract_features.py."""


CHOICES = {
    'features': ('pooled', 'pyramid'), 'dtype': ('float32', 'float16'), 'format': ('safetensors', 'parquet')}


def check_values(settings: ExtractionSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    for name, known in CHOICES.items():
        if getattr(settings, name) not in known:
            raise ConfigError(f'{flag(name)} must be {" or ".join(known)}, got {getattr(settings, name)!r}.')
    for name in ('shard_size', 'batch_size', 'knn_k', 'knn_temperature'):
        if not getattr(settings, name) > 0:
            raise ConfigError(f'{flag(name)} must be greater than 0, got {getattr(settings, name)}.')
    check_range(settings, 'workers', 0, 2**10)
    check_range(settings, 'max_bad_images', 0, 1)
    check_range(settings, 'seed', 0, 2**32 - 1)
    if settings.out_indices and settings.features != 'pyramid':
        raise ConfigError(f'--out-indices {settings.out_indices} needs --features pyramid, got {settings.features}.')
    if is_stream(settings):
        raise ConfigError(f'--dataset {settings.dataset} is a stream, whose images have no index to resume at; '
                          f'use a folder, torch/ or hfds/.')
    if settings.knn or settings.linear_probe:
        name = '--knn' if settings.knn else '--linear-probe'
        if settings.features != 'pooled':
            raise ConfigError(f'{name} needs --features pooled, got {settings.features}.')
        if settings.val_split == settings.split:
            raise ConfigError(f'{name} needs a --val-split other than --split, got {settings.split!r} for both.')
    for requested, package, name in (
            (settings.format == 'parquet', 'pyarrow', '--format parquet'),
            (settings.linear_probe, 'sklearn', '--linear-probe')):
        if requested:
            try:
                __import__(package)
            except ImportError as error:
                raise ConfigError(f'{name} needs {package.replace("sklearn", "scikit-learn")}, which is not '
                                  f'installed; install it with pip, or leave the option.') from error
