"""Time the reading of pictures by itself, as finetune.py reads them, and training on them: which of the two waits?

    python scripts/benchmark.py loader --data-dir imagenette --model coatnet_pico_64
    python scripts/benchmark.py loader --data-dir imagenette --model coatnet_pico_64 --workers 0 1 2 --device cuda --amp

Decoding, augmentation and collation run alone for each number of --workers; then the model trains on one batch that is
already there. The windows of all take turns, and the median one counts. Recipes that decode once are timed as if they
did not.
"""
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import benchmark
import finetune
import torch
from loaders import open_data, training_transform
from open_model import open_model
from pictures import EpochSampler, Pictures, batches
from provenance import provenance
from recipes import settings_of
from run_folder import write_json
from settings import SettingsError
from torch.utils.data import DataLoader
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    data_dir: str  # Folder with train/ and val/.
    model: str = 'coatnet_pico_64'  # What trains.
    recipe: str = 'imagenette_64'  # Whose augmentation and size, see scripts/recipes.py.
    workers: tuple[int, ...] = (0, 1, 2)  # Processes that read.
    batch_size: int = 64  # Pictures a step.
    rounds: int = 3  # Windows of each; the median counts.
    window: float = 5.0  # Least seconds a window lasts.
    threads: int = 1  # CPU threads that train.
    amp: bool = True  # bfloat16 autocast in training.
    device: str = 'cpu'  # cpu or cuda.
    results_file: str = ''  # JSON to write, with hardware and versions.


def read(loader: DataLoader, sampler: EpochSampler, window: float) -> float:
    """Pictures a second of one window, after a first batch has come."""
    sampler.epoch += 1
    batches_, count = iter(loader), 0
    next(batches_)
    begun = perf_counter()
    for images, _, _ in batches_:
        count += len(images)
        if perf_counter() - begun >= window:
            break
    return count / (perf_counter() - begun)


def main(settings: Settings) -> dict:
    """Pictures a second of the loader, by number of workers, and of training."""
    benchmark.refuse(settings, ('batch_size', 'rounds', 'window', 'threads'), (settings.model,), 'benchmark.py loader')
    torch.set_num_threads(settings.threads)
    try:
        return measure(settings)
    except SettingsError as error:
        sys.exit(f'benchmark.py loader: {error}')


def measure(settings: Settings) -> dict:
    """Let everything take turns."""
    recipe = finetune.Settings(
        **settings_of(settings.recipe, settings.model) | dict(
            data_dir=settings.data_dir, model=settings.model, batch_size=settings.batch_size, decode_once=False))
    train_set, _, class_names = open_data(recipe)
    _, data_config = open_model(recipe, use_train_size=True, num_classes=len(class_names))
    pictures = Pictures(train_set, training_transform(recipe, data_config), substitute=True)
    sampler = EpochSampler(len(pictures), shuffle=True)
    timing = benchmark.Settings(
        model='', against='', batch_size=settings.batch_size, img_size=data_config['input_size'][-1],
        threads=settings.threads, window=settings.window, amp=settings.amp, device=settings.device)
    step = benchmark.build(timing, settings.model, recipe.model_kwargs, 'training')
    turns = {f'{workers} workers': partial(
        read, batches(pictures, sampler, settings.batch_size, workers), sampler, settings.window)
        for workers in settings.workers}
    turns['training'] = partial(benchmark.measure_window, step, timing)
    windows: dict[str, list[float]] = {name: [] for name in turns}
    for _ in tqdm(range(settings.rounds), unit='round', desc='benchmark loader'):
        for name, turn in turns.items():
            windows[name].append(turn())
    rates = {name: statistics.median(values) for name, values in windows.items()}
    for name, rate in rates.items():
        print(f'{name:12} {rate:8.1f} images/s')
    report = dict(images_per_second=rates, windows=windows, settings=asdict(settings), **provenance(settings.device))
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
