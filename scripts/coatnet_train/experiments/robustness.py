"""Accuracy at other sizes and on corrupted images: rows and plot of robustness.py."""
import io
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from timm.data import create_transform
from torchvision.transforms import Compose

from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, create_dataset
from coatnet_train.data.loader import EpochSampler, UnreadableImages, create_loader
from coatnet_train.evaluation.evaluator import predict
from coatnet_train.experiments.robustness_config import RobustnessSettings
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import image_mode, open_model
from coatnet_train.plotting.style import clean_axes
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, earlier_results, flag
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance

__all__ = ['CORRUPTIONS', 'run']


def jpeg(image: Image.Image) -> Image.Image:
    """JPEG compression at quality 30."""
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=30)
    return Image.open(buffer).convert(image.mode)


def blur(image: Image.Image) -> Image.Image:
    """Gaussian blur of radius 1 pixel."""
    return image.filter(ImageFilter.GaussianBlur(1))


def noise(image: Image.Image) -> Image.Image:
    """Gaussian noise of standard deviation 0.1 (pixels in 0 to 1), seeded by the image's own pixels."""
    pixels = np.asarray(image)
    rng = np.random.default_rng(zlib.crc32(pixels.tobytes()))
    return Image.fromarray((pixels + rng.normal(0, 25.5, pixels.shape)).round().clip(0, 255).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {'JPEG 30': jpeg, 'blur': blur, 'noise': noise}


def check_model(settings: RobustnessSettings, name: str) -> None:
    """Raise ConfigError for a model that rejects one of the sizes or has other classes, before any is measured."""
    _, class_names = create_dataset(DataSettings(data_dir=settings.data_dir), settings.val_split)
    for size in (*settings.sizes, None):
        model, _ = open_model(ModelSettings(model=name, pretrained=True, img_size=size), use_train_size=True)
    known = list(model.pretrained_cfg.get('label_names') or ())
    if model.num_classes != len(class_names) or (known and known != class_names):
        differ = next((f'; the first that differ are {mine} and {theirs}' for mine, theirs in zip(
            known, class_names, strict=False) if mine != theirs), '')
        raise ConfigError(
            f'--model {name} must have the classes of --data-dir {settings.data_dir} in their order, but has '
            f'{model.num_classes} for {len(class_names)}{differ}; give the images it was made for.')


def measure_top1(
        settings: RobustnessSettings, accelerator: Accelerator, name: str, size: int | None, corruption: str) -> float:
    """Top-1 (%) of a model at a size (its own if None), under a corruption ('' for none)."""
    model, data_config = open_model(ModelSettings(model=name, pretrained=True, img_size=size), use_train_size=True)
    dataset, _ = create_dataset(DataSettings(data_dir=settings.data_dir), settings.val_split)
    transform = create_transform(**data_config)
    transform = Compose([CORRUPTIONS[corruption], transform]) if corruption else transform
    images = IndexedImageDataset(dataset, transform, mode=image_mode(data_config))
    loader = create_loader(images, EpochSampler(len(images)), settings.batch_size, settings.workers)
    unreadable = UnreadableImages(dataset, settings.max_bad_images)
    found = predict(model.to(accelerator.device), accelerator.prepare(loader), accelerator, on_batch=unreadable.add)
    return found.scores['top1']


def plot(report: dict) -> Figure:
    """Plot the top-1 of each model over the image size, and beside it under each corruption."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    sizes, width = report['settings']['sizes'], 0.8 / len(report['top1'])
    for place, (model, row) in enumerate(report['top1'].items()):
        colour = f'C{place}'
        left.plot(sizes, [row[f'{size} px'] for size in sizes], '.-', color=colour, label=model)
        left_edges = [index + place * width for index in range(len(CORRUPTIONS))]
        right.bar(left_edges, [row[name] for name in CORRUPTIONS], width, color=colour, align='edge')
    left.set(xlabel='height and width of the image (pixels)', ylabel='top-1 (%)', ylim=(0, None), xticks=sizes,
             title='Other sizes')
    right.set_xticks([index + 0.4 for index in range(len(CORRUPTIONS))], list(CORRUPTIONS))
    right.set_title("Corruptions, at the weights' own size")
    for axes in (left, right):
        clean_axes(axes)
    left.legend(frameon=False, loc='lower left')
    return figure


def run(settings: RobustnessSettings) -> dict:
    """Measure every row, and return the report."""
    path = Path(settings.results_file) if settings.results_file else None
    rows, made = {}, {}
    kept = {name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(settings).items() if name not in ('model', 'results_file')}
    if path and (earlier := earlier_results(settings.results_file, 'settings', 'top1', 'made')):
        rows, made = earlier['top1'], earlier['made']
        for name in ('data_dir', 'sizes', 'val_split', 'amp'):
            if earlier['settings'][name] != kept[name]:
                raise ConfigError(f'--results-file {path} holds rows made with {flag(name)} '
                                  f'{earlier["settings"][name]}, not {kept[name]}; give another file.')
    for name in settings.model:
        if name not in rows:
            check_model(settings, name)
    columns = [*((f'{size} px', size, '') for size in settings.sizes), *((name, None, name) for name in CORRUPTIONS)]
    accelerator = create_accelerator(settings.device, settings.amp)
    origin, width = provenance(str(accelerator.device)), max(map(len, settings.model))
    print(f'{"top-1 (%)":{width}}  ' + ''.join(f'{title:>9}' for title, _, _ in columns), flush=True)
    for name in settings.model:
        print(f'{name:{width}}  ', end='', flush=True)
        row = rows.get(name) or {}
        for title, size, corruption in columns:
            if name not in rows:
                row[title] = measure_top1(settings, accelerator, name, size, corruption)
            print(f'{row[title]:9.2f}', end='', flush=True)
        print()
        rows[name], made[name] = row, made.get(name, origin)
        if path:
            write_json(path, dict(settings=kept, top1=rows, made=made))
            write_figure(path.with_suffix('.png'), plot(dict(settings=kept, top1=rows)))
    return dict(settings=kept, top1=rows, made=made)
