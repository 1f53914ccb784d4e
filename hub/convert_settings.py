"""Settings of convert.py and their checks, without torch and timm."""
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, flag, tyro
from release_rules import check_license

__all__ = ['ConvertSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Source and destination of the conversion."""

    source: tyro.conf.Positional[str]  # File (.h5, .pth, .safetensors), or a name: coatnet_0_kecam.in1k.
    output: Path | None = None  # Run folder to make (output/MODEL if not given).
    check_chelsea: bool = False  # Compare kecam's weights at 224 pixels with the author's predictions for a photograph.


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model that the weights belong to."""

    model: str | None = None  # Name of the zoo (coatnet_0_kecam if not given and SOURCE is of kecam).
    model_kwargs: tuple[str, ...] = ()  # More arguments of the model, as key=value (export.py refuses another flavor).
    class_names: Path | None = None  # File of a class a line, in label order (ImageNet-1k's if SOURCE is of kecam).
    mean: tuple[float, ...] = ()  # Mean of each channel, in 0..1 (the model's own if not given).
    std: tuple[float, ...] = ()  # Standard deviation of each channel (the model's own if not given).
    interpolation: str = ''  # Resizing method, such as bicubic (the model's own if not given).
    crop_pct: float | None = None  # Fraction of the resized image kept in evaluation (the model's if not given).


@dataclass(frozen=True, kw_only=True)
class OriginSettings:
    """Metadata that the file does not contain."""

    origin: str | None = None  # Address that the file comes from (known for the files that kecam published).
    trained_on: str | None = None  # Name of the training data (known for the files that kecam published).
    license: str | None = None  # Identifier of the Hub (ImageNet's terms, non-commercial, if SOURCE is of kecam).
    license_name: str | None = None  # Its name, for --license other.
    license_link: str | None = None  # Its address, for --license other.


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(OriginSettings, ModelSettings, RunSettings):
    """All settings of convert.py."""

    @property
    def of_kecam(self) -> bool:
        return self.source.endswith('.h5') or (self.source.startswith('coatnet_0_kecam.') and not self.is_file)

    @property
    def is_file(self) -> bool:
        return self.source.endswith(('.h5', '.pth', '.pt', '.bin', '.tar', '.ckpt', '.safetensors'))


def check_values(settings: ConvertSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if settings.is_file and not Path(settings.source).is_file():
        raise ConfigError(f'SOURCE {settings.source} is not a file; give one, or coatnet_0_kecam.in1k, which is '
                          f'downloaded.')
    if not (settings.is_file or settings.of_kecam):
        raise ConfigError(f'SOURCE must be a file that ends in .h5, .pth or .safetensors, or a name such as '
                          f'coatnet_0_kecam.in1k, got {settings.source!r}.')
    if settings.model_kwargs and not settings.is_file:  # stages of another block type would start from random weights
        raise ConfigError(f'--model-kwargs must be left out for SOURCE {settings.source}, whose architecture its '
                          f'weights tell.')
    if not settings.of_kecam:
        if settings.check_chelsea:
            raise ConfigError(f'--check-chelsea knows what weights of kecam see, and SOURCE {settings.source} has '
                              f'others; leave it out.')
        for name in ('model', 'class_names', 'license'):
            if getattr(settings, name) is None:
                raise ConfigError(f'{flag(name)} must be given for SOURCE {settings.source}, which does not tell it.')
    if settings.license or settings.license_name or settings.license_link:
        check_license(settings.license or 'apache-2.0', settings.license_name, settings.license_link)
    for name in ('origin', 'trained_on', 'license_name', 'license_link'):
        value = getattr(settings, name)
        if value is not None and not (value.strip() and value.isprintable()):  # it goes into a table of the card
            raise ConfigError(f'{flag(name)} must be one line of text, got {value!r}; give that, or leave it out.')
    if settings.class_names and not settings.class_names.is_file():
        raise ConfigError(f'--class-names {settings.class_names} is not a file; give one with a class a line.')
