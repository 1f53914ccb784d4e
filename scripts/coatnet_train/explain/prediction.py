"""Predictions from settings to overlays: the best guesses of each image, and what the model looked at."""
import dataclasses
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.models import is_model_pretrained
from torch import nn

from coatnet_train.data.image_files import UNREADABLE, to_mode
from coatnet_train.data.image_folder import find_images
from coatnet_train.evaluation.imagenet_labels import describe_synsets
from coatnet_train.explain.config import Settings, check_values
from coatnet_train.explain.maps import (
    Target,
    attention_weights,
    choose_target,
    dynamic_kernels,
    expected_distance,
    gradcam,
    run_with_input,
    share_on_padding,
    tap_distances,
)
from coatnet_train.models.open_model import image_mode, means_weights, open_model
from coatnet_train.plotting.overlay import draw_guesses, draw_heat, draw_kernel, draw_kernels, draw_picture, panels
from coatnet_train.plotting.plots import to_picture, use_fonts
from coatnet_train.runtime.accelerator import start
from coatnet_train.runtime.cli import SettingsError, one_line
from coatnet_train.runtime.console import printable
from coatnet_train.runtime.files import write_csv, write_figure

RANDOM = 'RANDOM WEIGHTS: the guesses mean nothing'
SHOWN = {
    'attention': 'attention of stage {} (T)', 'kernels': 'predicted kernels of stage {} (D)',
    'gradcam': 'Grad-CAM of the best guess'}
LONGEST_STEM = 220  # bytes of an image's name in that of its overlay: file systems take 255 with all that is added


@dataclass(frozen=True)
class Label:
    """A class: its name in the data, such as n01440764, and in words, if they are known."""

    name: str
    words: str = ''

    def __str__(self) -> str:
        return f'{self.name}  {self.words}' if self.words else self.name

    @property
    def short(self) -> str:
        return self.words.split(', ')[0] or self.name


def name_overlays(pictures: list[Path], output: Path, kind: str) -> list[Path]:
    """A file in `output` for each picture, no two the same and none of them a picture that is read."""
    taken, overlays = {path.resolve() for path in pictures}, []
    for picture in pictures:
        stem = picture.stem
        while len(os.fsencode(stem)) > LONGEST_STEM:
            stem = stem[:-1]
        number, overlay = 1, output / f'{stem}-{kind}.png'
        while overlay.resolve() in taken:
            number += 1
            overlay = output / f'{stem}-{kind}-{number}.png'
        taken.add(overlay.resolve())
        overlays.append(overlay)
    return overlays


def read_labels(model: nn.Module) -> list[Label]:
    """The classes of a model in the order of its logits: as its config names them, else as ImageNet, else by number."""
    count, config = model.num_classes, model.pretrained_cfg
    names, words = config.get('label_names') or (), config.get('label_descriptions') or {}
    if len(names) != count:
        subset = infer_imagenet_subset(model)
        names = ImageNetInfo(subset).label_names() if subset else [f'class {i}' for i in range(count)]
    known = describe_synsets(names)
    return [Label(str(name), words.get(name) or known.get(name, '')) for name in names]


def position_of(at: tuple[float, float] | None, feat_size: tuple[int, int]) -> tuple[int, int] | None:
    """The (row, column) of a map (h, w) that holds the point `at` (X, Y)."""
    if at is None:
        return None
    return tuple(min(int(share * size), size - 1) for share, size in zip(reversed(at), feat_size, strict=True))


def look(
        model: nn.Module, target: Target, image: torch.Tensor, picture: np.ndarray, labels: list[Label],
        settings: Settings) -> tuple[torch.Tensor, list[partial]]:
    """The logits (classes,) for an image (1, C, H, W), and what draws each panel of the overlay on given axes.

    A panel's words are the keywords `title` and `subtitle` of what draws it.
    """
    if target.kind == 'gradcam':
        logits, maps = gradcam(model, image, settings.model)
        heat = maps[0].cpu().numpy()
        size = ' x '.join(map(str, heat.shape))
        found = f'last map of features, {size}' if heat.any() else 'nothing in the picture speaks for this class'
        return logits[0], [partial(
            draw_heat, picture=picture, heat=heat / (heat.max() or 1), smooth=True, least=0,
            title=f'Grad-CAM of {labels[int(logits[0].argmax())].short}', subtitle=found,
            unit='evidence for the class, 1 = strongest here')]

    logits, x = run_with_input(model, target.module, image)
    if target.kind == 'attention':
        feat_size = tuple(x.shape[1:3])
        weights = attention_weights(target.module, x)[0].mean(0)
        position = position_of(settings.at, feat_size)
        row = weights.mean(0) if position is None else weights[position[0] * feat_size[1] + position[1]]
        heat = (row * len(row)).view(feat_size).cpu().numpy()
        mean_of = f'{target.module.num_heads} heads' + (f' and {len(row)} queries' if position is None else '')
        return logits[0], [partial(
            # a scale from 0, or attention that is even would look uneven
            draw_heat, picture=picture, heat=heat, least=min(0, heat.min()), most=max(2, heat.max()), frame=position,
            title=f'Where {"all positions look" if position is None else "the framed position looks"}',
            subtitle=f'attention of stage {target.stage}, mean of {mean_of}; no class', unit='attention, 1 = even')]

    taps = dynamic_kernels(target.module, x)
    feat_size = tuple(taps.shape[-2:])
    mean = taps[0].mean(0).cpu().numpy()
    step = picture.shape[0] / feat_size[0], picture.shape[1] / feat_size[1]
    distance, reach = expected_distance(taps, step)[0], tap_distances(target.module.kernel_size, step)
    subtitle = f'stage {target.stage}, mean of {taps.shape[1]} heads; no class'
    position = position_of(settings.at, feat_size)
    padding = share_on_padding(taps)[0]
    if position is None:
        padding, whose = padding.mean(), 'their'
        first = partial(draw_kernels, picture=picture, kernels=mean, title='Kernels predicted at positions',
                        subtitle=f'{subtitle}, not to scale')
    else:
        padding, whose = padding[position], 'its'
        first = partial(draw_kernel, picture=picture, kernel=mean[(..., *position)], position=position,
                        feat_size=feat_size, title='Kernel predicted at the frame', subtitle=subtitle)
    return logits[0], [first, partial(
        draw_heat, picture=picture, heat=distance.cpu().numpy(), frame=position, least=0, most=reach.max().item(),
        title='How far the kernels look', unit=f'expected distance (pixels), {reach.mean():.0f} = even',
        subtitle=f'{100 * padding:.0f} % of {whose} weight falls on the padding')]


def open_weights(settings: Settings) -> tuple[nn.Module, dict, str]:
    """The model, its data settings, and where its weights come from."""
    stored = means_weights(settings.model) and not settings.checkpoint
    settings = dataclasses.replace(settings, pretrained=settings.pretrained or stored)
    model, data_config = open_model(settings, settings.checkpoint, num_classes=settings.num_classes)
    if not model.num_classes:
        raise SettingsError(f'--model {settings.model} has no classes to predict; give a model with a classifier.')
    if settings.checkpoint:
        return model, data_config, f'weights of {settings.checkpoint}'
    if not settings.pretrained:
        return model, data_config, RANDOM
    if settings.num_classes not in (None, known := model.pretrained_cfg['num_classes']):
        raise SettingsError(f'--num-classes must be that of the weights, {known}, got {settings.num_classes}: another '
                            f'classifier would be random; leave it out.')
    return model, data_config, 'its own weights'


def predict_picture(
        path: Path, image: torch.Tensor, overlay: Path, settings: Settings, model: nn.Module, target: Target,
        data_config: dict, labels: list[Label], headline: str, device: torch.device) -> tuple[str, dict]:
    """Write the overlay of one picture (C, H, W) and return its table, and its row of predictions.csv."""
    picture = to_picture(image, data_config['mean'], data_config['std'])
    logits, painters = look(model, target, image[None].to(device), picture, labels, settings)
    if not logits.isfinite().all():
        raise SettingsError(f'--model {settings.model} gives logits that are not finite for {printable(str(path))}; '
                            f'give sound weights.')
    shares, best = (values.tolist() for values in logits.float().softmax(-1).topk(min(5, len(logits))))
    guesses = [labels[i] for i in best]

    figure, axes = panels(
        f'{printable(path.name)}  ·  {headline}', 1 + len(painters), picture.shape[0] / picture.shape[1])
    draw_picture(axes[0], picture, 'What the model sees', f'{picture.shape[1]} x {picture.shape[0]} pixels')
    for paint, panel in zip(painters, axes[1:-1], strict=True):
        paint(panel)
    draw_guesses(axes[-1], [label.short for label in guesses], shares, 'Best guesses', f'of {len(labels)} classes')
    try:
        write_figure(overlay, figure)
    except OSError as error:
        raise SettingsError(f'--output: {overlay} cannot be written: {one_line(error)}; choose another.') from error
    lines, row = [f'{printable(str(path))} -> {printable(str(overlay))}'], {'file': printable(str(path))}
    for rank, (label, share) in enumerate(zip(guesses, shares, strict=True), 1):
        lines.append(f'  {rank}  {100 * share:5.1f} %  {label}')
        row |= {f'label_{rank}': label.name, f'description_{rank}': label.words, f'confidence_{rank}': round(share, 6)}
    return '\n'.join(lines), row


def predict_images(settings: Settings) -> int:
    """Predict and explain every image; returns the exit code."""
    check_values(settings)
    accelerator = start(settings.device)
    model, data_config, weights = open_weights(settings)
    target = choose_target(model, settings.model, settings.explain, settings.stage)
    if settings.at is not None and target.kind == 'gradcam':
        raise SettingsError(f'--at chooses a query or a kernel, but of {settings.model} Grad-CAM is shown, which has '
                            f'neither; leave it out.')
    pictures, bad = find_images(settings.images)
    overlays = name_overlays(pictures, settings.output, target.kind)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f'--output {settings.output} cannot be written: {one_line(error)}; '
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
        predict_picture, settings=settings, model=model.to(accelerator.device), target=target, data_config=data_config,
        labels=labels, device=accelerator.device,
        headline=settings.model if RANDOM not in weights else f'{settings.model}  ·  {RANDOM}')
    transform, mode, unreadable, rows = create_transform(**data_config), image_mode(data_config), [], []
    with accelerator.split_between_processes(list(zip(pictures, overlays, strict=True))) as part:
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
    if len(unreadable) == len(pictures):
        raise SettingsError('IMAGES must name at least one picture that can be read, and none of these can; see above '
                            'for the reasons.')
    if accelerator.is_main_process:
        table = settings.output / 'predictions.csv'
        try:
            write_csv(table, rows)
        except OSError as error:
            raise SettingsError(f'--output: {table} cannot be written: {one_line(error)}; choose another.') from error
        print(f'all of them: {table}')
    return 1 if unreadable or bad else 0
