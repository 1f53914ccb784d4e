"""Accuracy at other image sizes and on pictures that were made worse, without any retraining.

    python scripts/robustness.py --data-dir tiny-imagenet --results-file results/robustness_tin200_cpu.json \\
        --model coatnet_pico_64.tin200_preview lightconvnet_pico_64.tin200_preview

Sizes resize the whole picture; crop and colours stay those of the weights. The damage is done to the picture as it is
stored, before it is resized: JPEG at quality 30, Gaussian blur of radius 1 pixel, Gaussian noise of deviation 0.1 (of
1), the same noise for a picture each time. Models that the results file holds are not measured again.
"""
import io
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from data_settings import DataSettings
from evaluation import predict
from matplotlib.figure import Figure
from model_settings import ModelSettings
from open_model import open_model
from pictures import BadPictures, EpochSampler, Pictures, batches, open_pictures
from PIL import Image, ImageFilter
from plots import LIGHT
from processes import start
from provenance import provenance
from run_folder import write_figure, write_json
from settings import SettingsError, check_range, earlier_results, end_with_sentence, flag
from timm.data import create_transform
from torchvision.transforms import Compose

__all__ = ['DAMAGE']


def jpeg(image: Image.Image) -> Image.Image:
    """Quality 30."""
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=30)
    return Image.open(buffer).convert(image.mode)


def blur(image: Image.Image) -> Image.Image:
    """Gaussian of radius 1 pixel."""
    return image.filter(ImageFilter.GaussianBlur(1))


def noise(image: Image.Image) -> Image.Image:
    """Gaussian of deviation 0.1, which follows from the picture's own pixels."""
    pixels = np.asarray(image)
    rng = np.random.default_rng(zlib.crc32(pixels.tobytes()))
    return Image.fromarray((pixels + rng.normal(0, 25.5, pixels.shape)).round().clip(0, 255).astype(np.uint8))


DAMAGE: dict[str, Callable[[Image.Image], Image.Image]] = {'JPEG 30': jpeg, 'blur': blur, 'noise': noise}


@dataclass(frozen=True, kw_only=True)
class Settings:
    data_dir: str  # Folder with val/, a sub-folder a class.
    model: tuple[str, ...]  # With weights: names of releases, hf-hub:OWNER/NAME or local-dir:FOLDER.
    sizes: tuple[int, ...] = (48, 64, 96, 128)  # Heights and widths in pixels.
    val_split: str = 'validation'  # Name of the split.
    batch_size: int = 64  # Pictures per step.
    max_bad_images: float = 0.001  # Share of unreadable pictures that is reported and left out before the run stops.
    amp: bool = False  # bfloat16 autocast.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    workers: int = 1  # Processes that read pictures.
    results_file: str = ''  # JSON to write after every model; the plot takes its name.


def check_model(settings: Settings, name: str) -> None:
    """Refuse a model that cannot take the sizes or has other classes, before any is measured."""
    _, class_names = open_pictures(DataSettings(data_dir=settings.data_dir), settings.val_split)
    for size in (*settings.sizes, None):
        model, _ = open_model(ModelSettings(model=name, pretrained=True, img_size=size), use_train_size=True)
    known = list(model.pretrained_cfg.get('label_names') or ())
    if model.num_classes != len(class_names) or (known and known != class_names):
        differ = next((f'; the first that differ are {mine} and {theirs}' for mine, theirs in zip(
            known, class_names, strict=False) if mine != theirs), '')
        raise SettingsError(
            f'--model {name} must have the classes of --data-dir {settings.data_dir} in their order, but has '
            f'{model.num_classes} for {len(class_names)}{differ}; give the pictures it was made for.')


def top1(settings: Settings, name: str, size: int | None, damage: str) -> float:
    """Top-1 (%) of a model at a size, its own if None, under one kind of damage, '' for none."""
    accelerator = start(settings.device, settings.amp)
    model, data_config = open_model(ModelSettings(model=name, pretrained=True, img_size=size), use_train_size=True)
    dataset, _ = open_pictures(DataSettings(data_dir=settings.data_dir), settings.val_split)
    transform = create_transform(**data_config)
    pictures = Pictures(dataset, Compose([DAMAGE[damage], transform]) if damage else transform)
    loader = batches(pictures, EpochSampler(len(pictures)), settings.batch_size, settings.workers)
    bad = BadPictures(dataset, settings.max_bad_images)
    found = predict(model.to(accelerator.device), accelerator.prepare(loader), accelerator, on_batch=bad.add)
    return found.scores['top1']


def plot(report: dict) -> Figure:
    """Top-1 over the size of the picture, a line a model, and beside it under each kind of damage."""
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    sizes, width = report['settings']['sizes'], 0.8 / len(report['top1'])
    for place, (name, row) in enumerate(report['top1'].items()):
        colour = f'C{place}'
        left.plot(sizes, [row[f'{size} px'] for size in sizes], '.-', color=colour, label=name)
        right.bar([kind + place * width for kind in range(len(DAMAGE))], [row[damage] for damage in DAMAGE], width,
                  color=colour, align='edge')
    left.set(xlabel='height and width of the picture (pixels)', ylabel='top-1 (%)', ylim=(0, None), xticks=sizes,
             title='Other sizes')
    right.set_xticks([kind + 0.4 for kind in range(len(DAMAGE))], list(DAMAGE))
    right.set_title("Damage, at the weights' own size")
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color=LIGHT)
        axes.set_axisbelow(True)
    left.legend(frameon=False, loc='lower left')
    return figure


def main(settings: Settings) -> dict:
    """Measure every row, and return the report."""
    check_range(settings, 'max_bad_images', 0, 1)
    if not settings.model or min(settings.sizes, default=0) < 1:
        raise SettingsError(f'--model and --sizes must name at least one each, sizes above 0, got {settings.model} and '
                            f'{settings.sizes}.')
    for name, least in (('batch_size', 1), ('workers', 0)):
        if getattr(settings, name) < least:
            raise SettingsError(f'{flag(name)} must be at least {least}, got {getattr(settings, name)}.')
    path = Path(settings.results_file) if settings.results_file else None
    rows, made = {}, {}
    kept = {name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(settings).items() if name not in ('model', 'results_file')}
    if path and (earlier := earlier_results(settings.results_file, 'settings', 'top1', 'made')):
        rows, made = earlier['top1'], earlier['made']
        for name in ('data_dir', 'sizes', 'val_split', 'amp'):
            if earlier['settings'][name] != kept[name]:
                raise SettingsError(f'--results-file {path} holds rows made with {flag(name)} '
                                    f'{earlier["settings"][name]}, not {kept[name]}; give another file.')
    for name in settings.model:
        if name not in rows:
            check_model(settings, name)
    columns = [(f'{size} px', size, '') for size in settings.sizes] + [(damage, None, damage) for damage in DAMAGE]
    facts, width = provenance(str(start(settings.device).device)), max(map(len, settings.model))
    print(f'{"top-1 (%)":{width}}  ' + ''.join(f'{title:>9}' for title, _, _ in columns), flush=True)
    for name in settings.model:
        print(f'{name:{width}}  ', end='', flush=True)
        row = rows.get(name) or {}
        for title, size, damage in columns:
            if name not in rows:
                row[title] = top1(settings, name, size, damage)
            print(f'{row[title]:9.2f}', end='', flush=True)
        print()
        rows[name], made[name] = row, made.get(name, facts)
        if path:
            write_json(path, dict(settings=kept, top1=rows, made=made))
            write_figure(path.with_suffix('.png'), plot(dict(settings=kept, top1=rows)))
    return dict(settings=kept, top1=rows, made=made)


if __name__ == '__main__':
    end_with_sentence('robustness.py', lambda: main(tyro.cli(Settings, description=__doc__)))
