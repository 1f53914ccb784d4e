"""Settings of compare_recipes.py and their checks, without torch and timm."""
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, check_range, flag
from coatnet_train.training.recipes import RECIPES

__all__ = ['DEFAULTS', 'SETS', 'CompareRecipesSettings', 'check_values']

DEFAULTS = 'defaults'  # no recipe
SETS = ('digits', 'imagenette_60', 'imagenet_groups', 'imagenette_2000')


@dataclass(frozen=True, kw_only=True)
class CompareRecipesSettings:
    imagenette: str = ''  # Training split of Imagenette: a sub-folder a class.
    samples: str = ''  # Training images of ImageNet: a sub-folder a class, of which one image each is taken.
    sets: tuple[str, ...] = SETS[:3]  # Of these and imagenette_2000.
    models: tuple[str, ...] = ('lightconvnet_pico_64.dist_tin200', 'coatnet_pico_64.dist_tin200')
    recipes: tuple[str, ...] = (DEFAULTS, 'small_data')  # defaults, or of coatnet_train/training/recipes.py.
    seeds: tuple[int, ...] = (0, 1, 2)  # Each draws images, and fixes a run.
    device: str = 'cpu'  # cpu or cuda.
    workers: int = 0  # Processes that read images.
    threads: int = 1  # CPU threads.
    output: str = 'output/recipes'  # Folder of the images and the runs.
    results_file: str = ''  # JSON to write after every row; the plot takes its name.


def check_values(settings: CompareRecipesSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    for name, known in (('sets', SETS), ('recipes', (DEFAULTS, *RECIPES))):
        if unknown := sorted(set(getattr(settings, name)) - set(known)):
            raise ConfigError(f'{flag(name)} must be of {", ".join(known)}, got {unknown[0]!r}.')
    for name in ('sets', 'models', 'recipes', 'seeds'):
        if not getattr(settings, name):
            raise ConfigError(f'{flag(name)} must name at least one, got none.')
    check_range(settings, 'threads', 1, 2**10)
    for name, used in (('imagenette', 'imagenette_'), ('samples', 'imagenet_groups')):
        needing = [known for known in settings.sets if known.startswith(used)]
        if needing and not (getattr(settings, name) and Path(getattr(settings, name)).is_dir()):
            raise ConfigError(f'{flag(name)} must be a folder for --sets {needing[0]}, got '
                              f'{getattr(settings, name)!r}; give it, or leave the set out.')
