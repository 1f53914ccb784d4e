"""Prediction of images: settings -> model -> top-5 predictions and an overlay for each image."""
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image
from timm.data import create_transform
from timm.models import is_model_pretrained
from torch import nn

from coatnet_train.data.image_files import UNREADABLE, to_mode
from coatnet_train.data.image_folder import find_images
from coatnet_train.explain.config import PredictionSettings, check_values
from coatnet_train.explain.maps import ExplainTarget, choose_target
from coatnet_train.explain.panels import RANDOM, Label, explain_image, open_classifier, read_labels
from coatnet_train.models.open_model import image_mode
from coatnet_train.plotting.overlay import create_panels, draw_image, draw_top5
from coatnet_train.plotting.plots import to_pixels
from coatnet_train.plotting.style import use_fonts
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.console import printable
from coatnet_train.runtime.files import write_csv, write_figure

SHOWN = {
    'attention': 'attention of stage {} (T)', 'kernels': 'predicted kernels of stage {} (D)',
    'gradcam': 'Grad-CAM of the predicted class'}
MAX_STEM_BYTES = 220  # of an image's name in that of its overlay: file systems allow 255 for the whole name


def name_overlays(images: list[Path], output: Path, kind: str) -> list[Path]:
    """Overlay path in `output` for each image, all different and none of them an input image."""
    taken, overlays = {path.resolve() for path in images}, []
    for image in images:
        stem = image.stem
        while len(os.fsencode(stem)) > MAX_STEM_BYTES:
            stem = stem[:-1]
        number, overlay = 1, output / f'{stem}-{kind}.png'
        while overlay.resolve() in taken:
            number += 1
            overlay = output / f'{stem}-{kind}-{number}.png'
        taken.add(overlay.resolve())
        overlays.append(overlay)
    return overlays


def predict_image(
        path: Path, image: torch.Tensor, overlay: Path, settings: PredictionSettings, model: nn.Module,
        target: ExplainTarget, data_config: dict, labels: list[Label], title: str, device: torch.device,
) -> tuple[str, dict]:
    """Write the overlay of one image (C, H, W); returns its lines of output and its row of predictions.csv.

    Raises ConfigError for logits that are not finite, or an overlay that cannot be written.
    """
    pixels = to_pixels(image, data_config['mean'], data_config['std'])
    logits, draw_callbacks = explain_image(
        model, target, image[None].to(device), pixels, labels, settings.model, settings.at)
    if not logits.isfinite().all():
        raise ConfigError(f'--model {settings.model} gives logits that are not finite for {printable(str(path))}; '
                          f'give sound weights.')
    confidences, best = (values.tolist() for values in logits.float().softmax(-1).topk(min(5, len(logits))))
    top5 = [labels[i] for i in best]

    figure, axes = create_panels(
        f'{printable(path.name)}  ·  {title}', 1 + len(draw_callbacks), pixels.shape[0] / pixels.shape[1])
    draw_image(axes[0], pixels, 'What the model sees', f'{pixels.shape[1]} x {pixels.shape[0]} pixels')
    for draw, panel in zip(draw_callbacks, axes[1:-1], strict=True):
        draw(panel)
    draw_top5(axes[-1], [label.short for label in top5], confidences, 'Top-5 predictions', f'of {len(labels)} classes')
    try:
        write_figure(overlay, figure)
    except OSError as error:
        raise ConfigError(f'--output: {overlay} cannot be written: {one_line(error)}; choose another.') from error
    lines, row = [f'{printable(str(path))} -> {printable(str(overlay))}'], {'file': printable(str(path))}
    for place, (label, confidence) in enumerate(zip(top5, confidences, strict=True), 1):
        lines.append(f'  {place}  {100 * confidence:5.1f} %  {label}')
        row |= {f'label_{place}': label.name, f'description_{place}': label.description,
                f'confidence_{place}': round(confidence, 6)}
    return '\n'.join(lines), row


def predict_images(settings: PredictionSettings) -> int:
    """Predict and explain every image; returns the exit code."""
    check_values(settings)
    accelerator = create_accelerator(settings.device)
    model, data_config, weights = open_classifier(settings, settings.checkpoint)
    target = choose_target(model, settings.model, settings.explain, settings.stage)
    if settings.at is not None and target.kind == 'gradcam':
        raise ConfigError(f'--at chooses a query or a kernel, but of {settings.model} Grad-CAM is shown, which has '
                          f'neither; leave it out.')
    images, bad = find_images(settings.images)
    overlays = name_overlays(images, settings.output, target.kind)
    if (settings.output / 'args.json').exists():  # a run has a predictions.csv of its own
        raise ConfigError(f'--output {settings.output} must not be the run folder of finetune.py, whose '
                          f'predictions.csv would be overwritten; choose another.')
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'--output {settings.output} cannot be written: {one_line(error)}; '
                          f'choose another.') from error
    if accelerator.is_main_process:
        shown = SHOWN[target.kind].format(target.stage)
        if weights == RANDOM and is_model_pretrained(settings.model):
            weights += '; --pretrained loads its weights'
        print(f'{settings.model}: {weights}; overlays: {shown}', flush=True)
        for complaint in bad:
            print(complaint, file=sys.stderr)

    labels = read_labels(model)
    use_fonts(map(str, labels))
    predict = partial(
        predict_image, settings=settings, model=model.to(accelerator.device), target=target, data_config=data_config,
        labels=labels, device=accelerator.device,
        title=settings.model if RANDOM not in weights else f'{settings.model}  ·  {RANDOM}')
    transform, mode, unreadable, rows = create_transform(**data_config), image_mode(data_config), [], []
    with accelerator.split_between_processes(list(zip(images, overlays, strict=True))) as part:
        for path, overlay in part:
            try:
                with Image.open(path) as file:
                    image = transform(to_mode(file, mode))
            except UNREADABLE as error:
                unreadable.append(path)
                print(f'{printable(str(path))}: cannot be read: {one_line(error)}', file=sys.stderr)
                continue
            text, row = predict(path, image, overlay)
            rows.append(row)
            print(text, flush=True)
    unreadable, rows = gather_object(unreadable), gather_object(rows)
    if len(unreadable) == len(images):
        raise ConfigError('IMAGES must name at least one image that can be read, and none of these can; see above '
                          'for the reasons.')
    if accelerator.is_main_process:
        table = settings.output / 'predictions.csv'
        try:
            write_csv(table, rows)
        except OSError as error:
            raise ConfigError(f'--output: {table} cannot be written: {one_line(error)}; choose another.') from error
        print(f'all of them: {table}')
    return 1 if unreadable or bad else 0
