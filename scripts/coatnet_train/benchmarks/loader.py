"""Throughput of image loading alone, as in finetune.py, and of training alone."""
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch.utils.data import DataLoader

from coatnet_train.benchmarks.config import LoaderSettings, ModelPairSettings, check_benchmark
from coatnet_train.benchmarks.models import build, check_machine, images_per_second
from coatnet_train.data.dataset import IndexedImageDataset
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.models.open_model import image_mode, open_model
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.loaders import create_datasets, training_transform
from coatnet_train.training.recipes import recipe_settings


def read(loader: DataLoader, sampler: EpochSampler, window: float) -> float:
    """Images per second over one window of at least `window` seconds, or one epoch, after the first batch."""
    sampler.epoch += 1
    batches_, count = iter(loader), 0
    next(batches_)
    begun = perf_counter()
    for images, _, _ in batches_:
        count += len(images)
        if perf_counter() - begun >= window:
            break
    return count / (perf_counter() - begun)


def main(settings: LoaderSettings) -> dict:
    """Measure, print and return images per second of the loader by number of workers, and of training."""
    check_benchmark(settings, ('batch_size', 'rounds', 'window', 'threads'))
    check_machine(settings.device, (settings.model,), settings.amp)
    torch.set_num_threads(settings.threads)
    recipe = FinetuneSettings(
        **recipe_settings(settings.recipe, settings.model) | dict(
            data_dir=settings.data_dir, model=settings.model, batch_size=settings.batch_size, cache_images=False))
    train_set, _, class_names = create_datasets(recipe)
    _, data_config = open_model(recipe, use_train_size=True, num_classes=len(class_names))
    images = IndexedImageDataset(
        train_set, training_transform(recipe, data_config), mode=image_mode(data_config), substitute=True)
    sampler = EpochSampler(len(images), shuffle=True)
    timing = ModelPairSettings(
        model='', against='', batch_size=settings.batch_size, img_size=data_config['input_size'][-1],
        threads=settings.threads, window=settings.window, amp=settings.amp, device=settings.device)
    step = build(timing, settings.model, recipe.model_kwargs, 'training')
    turns = {f'{workers} workers': partial(
        read, create_loader(images, sampler, settings.batch_size, workers), sampler, settings.window)
        for workers in settings.workers}
    turns['training'] = partial(images_per_second, step, timing)
    windows: dict[str, list[float]] = {name: [] for name in turns}
    for _ in progress_bar(range(settings.rounds), unit='round', desc='benchmark loader'):
        for name, turn in turns.items():
            windows[name].append(turn())
    rates = {name: statistics.median(values) for name, values in windows.items()}
    for name, rate in rates.items():
        print(f'{name:12} {rate:8.1f} images/s')
    report = dict(images_per_second=rates, windows=windows, settings=asdict(settings), **provenance(settings.device))
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
