"""Settings of transfer.py and their checks, without torch and timm."""
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, flag, one_line

__all__ = ['METHODS', 'TransferSettings', 'check_values']

METHODS = ('fine-tuned', 'linear probe', 'random start')


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    data_dir: str  # Folder with train/ and val/, a sub-folder a class in each.
    model: str  # With weights: NAME.TAG of a release, hf-hub:OWNER/NAME or local-dir:FOLDER.
    img_size: int | None = None  # Height and width in pixels (the model's own if not given).
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)  # Fractions of the training split.
    subsets: tuple[int, ...] = (5, 5, 1)  # Draws of each fraction.
    methods: tuple[str, ...] = METHODS  # Rows to make, of these.
    updates: tuple[int, ...] = (300, 1000, 3000)  # Of the weights, for each fraction; rounded up to whole epochs.
    batch_size: int = 32  # Images per update.
    lr: float = 5e-4  # Highest learning rate of AdamW; cosine decay after a tenth of warm-up.
    scale: tuple[float, float] = (0.35, 1.0)  # Area of the random crop, as a fraction of the image.
    hflip: float = 0.5  # Probability of a horizontal flip.
    amp: bool = False  # bfloat16 autocast.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    workers: int = 1  # Processes that read images.
    threads: int = 1  # CPU threads.
    output: str = 'output/transfer'  # Folder of runs and features.
    results_file: str = ''  # JSON to write after every row; the plot takes its name.


def check_values(settings: TransferSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    for name in ('batch_size', 'threads'):
        if getattr(settings, name) < 1:
            raise ConfigError(f'{flag(name)} must be at least 1, got {getattr(settings, name)}.')
    if not settings.fractions or not all(0 < fraction <= 1 for fraction in settings.fractions):
        raise ConfigError(f'--fractions must be above 0 and at most 1, got {settings.fractions}.')
    for name in ('subsets', 'updates'):
        values = getattr(settings, name)
        if len(values) != len(settings.fractions) or min(values) < 1:
            raise ConfigError(f'{flag(name)} must give a number of at least 1 for each of --fractions, got {values} '
                              f'for {settings.fractions}.')
    if not settings.methods:
        raise ConfigError(f'--methods must name at least one of {", ".join(METHODS)}, got none.')
    if unknown := sorted(set(settings.methods) - set(METHODS)):
        raise ConfigError(f'--methods must be of {", ".join(METHODS)}, got {unknown[0]!r}.')
    try:
        Path(settings.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'--output {settings.output} cannot be made: {one_line(error)}; choose another.') from error
