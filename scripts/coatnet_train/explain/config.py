"""Settings of predict.py and their checks, without torch and timm."""
from dataclasses import dataclass, field
from pathlib import Path

from coatnet_train.models.config import ModelSettings, check_model_settings
from coatnet_train.models.released import best_release
from coatnet_train.runtime.cli import ConfigError, tyro

__all__ = ['PredictionSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class CheckpointModelSettings(ModelSettings):
    """Model that predicts."""

    model: str = field(default_factory=best_release)  # NAME.TAG with its weights, another name, hf-hub: or local-dir:.
    checkpoint: str = ''  # File of weights to load.


@dataclass(frozen=True, kw_only=True)
class ExplanationSettings:
    """Explanation to draw for each image."""

    explain: str = 'auto'  # auto (by the model's last T or D stage), attention, kernels or gradcam.
    stage: int | None = None  # Stage to explain, 1 to 4 (the last one that can be, if not given).
    at: tuple[float, float] | None = None  # X Y of one query or kernel: fractions of the crop's width and height.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Input, device and output."""

    images: tyro.conf.Positional[tuple[Path, ...]]  # Images, or folders of them.
    output: Path = Path('output/predict')  # Folder for the overlays.
    device: str = 'auto'  # auto (a GPU where there is one), cpu or cuda.


@dataclass(frozen=True, kw_only=True)
class PredictionSettings(RunSettings, ExplanationSettings, CheckpointModelSettings):
    """All settings of predict.py."""


def check_values(settings: PredictionSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if not settings.images:
        raise ConfigError('IMAGES must name at least one image or folder of images, and names none; give one.')
    if settings.at is not None and not all(0 <= fraction <= 1 for fraction in settings.at):
        raise ConfigError(f'--at must be two fractions of the image from 0 to 1, X from the left and Y from the top, '
                          f'got {settings.at}.')
    check_model_settings(settings)
