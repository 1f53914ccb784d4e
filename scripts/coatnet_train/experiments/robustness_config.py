"""Settings of robustness.py and their checks, without torch and timm."""
from dataclasses import dataclass

from coatnet_train.runtime.cli import ConfigError, check_range, flag

__all__ = ['RobustnessSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    data_dir: str  # Folder with val/, a sub-folder a class.
    model: tuple[str, ...]  # With weights: names of releases, hf-hub:OWNER/NAME or local-dir:FOLDER.
    sizes: tuple[int, ...] = (48, 64, 96, 128)  # Heights and widths in pixels.
    val_split: str = 'validation'  # Name of the split.
    batch_size: int = 64  # Images per step.
    max_bad_images: float = 0.001  # Fraction of unreadable images to report and leave out before the run stops.
    amp: bool = False  # bfloat16 autocast.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    workers: int = 1  # Processes that read images.
    results_file: str = ''  # JSON to write after every model; the plot takes its name.


def check_values(settings: RobustnessSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    check_range(settings, 'max_bad_images', 0, 1)
    if not settings.model or min(settings.sizes, default=0) < 1:
        raise ConfigError(f'--model and --sizes must name at least one each, sizes above 0, got {settings.model} and '
                          f'{settings.sizes}.')
    for name, minimum in (('batch_size', 1), ('workers', 0)):
        if getattr(settings, name) < minimum:
            raise ConfigError(f'{flag(name)} must be at least {minimum}, got {getattr(settings, name)}.')
