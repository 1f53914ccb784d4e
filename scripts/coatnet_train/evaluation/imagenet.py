"""Evaluation on ImageNet and its relatives: settings -> datasets -> models -> predictions -> table."""
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.data import create_transform, infer_imagenet_subset
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.data import Dataset

from coatnet_train.data.config import is_stream
from coatnet_train.data.dataset import IndexedImageDataset, StreamingImageDataset, create_dataset, image_name
from coatnet_train.data.folder_dataset import SPLIT_FOLDERS
from coatnet_train.data.loader import EpochSampler, UnreadableImages, create_loader
from coatnet_train.evaluation.config import EvaluationSettings, check_values
from coatnet_train.evaluation.evaluator import Predictions, expected_calibration_error, predict
from coatnet_train.evaluation.imagenet_labels import (
    LabelMap,
    corruption_folders,
    map_labels,
    mean_corruption_error,
    to_real_labels,
)
from coatnet_train.evaluation.tables import format_corruptions, format_table, make_output_dirs, write_row
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import check_model_name, image_mode, open_model
from coatnet_train.models.weights_file import read_weights
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.progress import progress_bar


@dataclass(frozen=True)
class Part:
    """One folder of images: all of the data, or one corruption at one severity."""

    dataset: Dataset
    class_names: list[str]
    corruption: str = ''
    severity: str = ''

    @property
    def flat(self) -> bool:
        """Whether the images lie outside of class folders."""
        return self.class_names == ['']


def rows_of(settings: EvaluationSettings) -> Iterator[tuple[ModelSettings, str]]:
    """The model and the checkpoint (or '') of each row of the table."""
    checkpoints = settings.checkpoint or [''] * len(settings.model)
    names = settings.model * len(checkpoints) if len(settings.model) == 1 else settings.model
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ModelSettings)}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        own = settings.pretrained and not checkpoint
        yield ModelSettings(**fields | {'model': name, 'pretrained': own}), checkpoint


def open_parts(settings: EvaluationSettings) -> list[Part]:
    """Open the images: one part, or one for each corruption and severity if the folder has that layout."""
    options = dict(batch_size=settings.batch_size, num_classes=settings.num_classes, num_samples=settings.num_samples)
    root = Path(settings.data_dir)
    if settings.dataset or not settings.data_dir:
        return [Part(*create_dataset(settings, settings.split, **options))]
    if corruptions := corruption_folders(root):
        return [
            Part(*create_dataset(dataclasses.replace(settings, data_dir=str(folder)), '', **options), name, severity)
            for name, severity, folder in corruptions]
    other = [*SPLIT_FOLDERS['train'], *SPLIT_FOLDERS.get(settings.split, (settings.split,))]
    itself = settings.split == 'validation' and not any((root / name).is_dir() for name in other)
    return [Part(*create_dataset(settings, '' if itself else settings.split, **options))]


def check_class_map(settings: EvaluationSettings, dataset: Dataset, accelerator: Accelerator) -> None:
    """Raise ConfigError unless --class-map numbers its classes 0, 1, ... without a gap; print folders it leaves out."""
    reader = getattr(dataset, 'reader', None)
    given = getattr(reader, 'class_to_idx', None) or {}
    if sorted(given.values()) != list(range(len(given))):
        raise ConfigError(f'--class-map {settings.class_map} must number its classes from 0 without a gap; leave it '
                          f'out for ImageNet synsets, which are mapped by name.')
    if not settings.dataset and (left_out := sorted(set(reader.folders) - given.keys())):
        accelerator.print(f'--class-map {settings.class_map} leaves out {len(left_out)} folders: '
                          f'{", ".join(left_out[:5])}{", ..." if len(left_out) > 5 else ""}')


def open_scored_model(
        settings: EvaluationSettings, model_settings: ModelSettings, checkpoint: str) -> tuple[nn.Module, dict]:
    """Create one model in eval mode with its data settings, and load its checkpoint if it has one."""
    model, data_config = open_model(
        model_settings, checkpoint, use_train_size=settings.use_train_size, use_ema=settings.use_ema,
        num_classes=settings.num_classes)
    if not model.num_classes:
        raise ConfigError(f'--model {model_settings.model} has no classes to score; give a model with a classifier, or '
                          f'--num-classes and a --checkpoint.')
    of_weights = model.pretrained_cfg.get('num_classes')
    if model_settings.pretrained and of_weights != model.num_classes:
        raise ConfigError(f'--num-classes {model.num_classes} gives --model {model_settings.model} a new, random '
                          f'classifier: its weights have {of_weights}; leave the flag out, or give a --checkpoint.')
    if settings.use_ema:
        plain, averaged = (read_weights(checkpoint, use_ema=use_ema) for use_ema in (False, True))
        if plain.keys() == averaged.keys() and all(torch.equal(plain[key], averaged[key]) for key in plain):
            raise ConfigError(f'--use-ema: --checkpoint {checkpoint} has no averaged weights; leave it out.')
    return model, data_config


def evaluate_part(settings: EvaluationSettings, part: Part, model: nn.Module, data_config: dict, labels: LabelMap,
                  accelerator: Accelerator, title: str) -> tuple[Predictions, int]:
    """Predictions for one folder as logit indices, and the number of unreadable images.

    Raises ConfigError for image settings that timm rejects, a folder without a labelled image, or a loss that is not
    finite.
    """
    try:
        transform = create_transform(**data_config)
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f'--interpolation, --crop-mode or another setting of the images: '
                          f'{one_line(error)}.') from error
    sampler, streamed = EpochSampler(len(part.dataset)), is_stream(settings)
    kind = StreamingImageDataset if streamed else IndexedImageDataset
    dataset = kind(part.dataset, transform, mode=image_mode(data_config))
    batch_size = settings.batch_size * (1 if streamed else accelerator.num_processes)
    loader = create_loader(
        dataset, sampler, batch_size, settings.workers, pin_memory=accelerator.device.type == 'cuda')
    loader = loader if streamed else accelerator.prepare(loader)
    with progress_bar(total=len(part.dataset), desc=title, unit='img', quiet=not accelerator.is_main_process) as bar:
        report = bar.write if accelerator.is_main_process else (lambda line: None)
        bad = UnreadableImages(part.dataset, settings.max_bad_images, report)

        def on_batch(indices: torch.Tensor) -> None:
            bad.add(indices)
            bar.update(len(indices))

        predictions = predict(model, loader, accelerator, classes=labels.classes, on_batch=on_batch)
    if not (predictions.labels >= 0).any():
        raise ConfigError(f'--data-dir {settings.data_dir} has no image with a label that can be read; repair some.'
                          if not settings.dataset else f'--dataset {settings.dataset} has no image with a label '
                          f'that can be read in --split {settings.split}; choose another.')
    if not math.isfinite(predictions.scores['loss']):
        raise ConfigError(f'--model {title} gives logits that are not finite; take no --amp, or sound weights.')
    # among several processes the length of a stream is that of one share
    if accelerator.num_processes == 1 and len(predictions.labels) != len(part.dataset):
        accelerator.print(f'the stream gave {len(predictions.labels)} images, not the {len(part.dataset)} it named')
    predictions = labels.to_logits(predictions)
    if settings.real_labels:
        names = [Path(image_name(part.dataset, index)).name for index in range(len(part.dataset))]
        predictions = to_real_labels(predictions, names, settings.real_labels)
    return predictions, len(bad.found)


def pool(parts: list[Predictions]) -> Predictions:
    """Concatenate the predictions of several folders; scores are plain means, as the folders have equal sizes."""
    scores = {name: None if value is None else sum(part.scores[name] for part in parts) / len(parts)
              for name, value in parts[0].scores.items()}
    return Predictions(scores, *(torch.cat([getattr(part, name) for part in parts])
                                 for name in ('labels', 'top5', 'confidence')))


def evaluate_model(settings: EvaluationSettings, model_settings: ModelSettings, checkpoint: str, parts: list[Part],
                   accelerator: Accelerator) -> tuple[dict, Predictions, LabelMap]:
    """Evaluate one model: its row of the table, its predictions, and the map from labels to its logits."""
    model, data_config = open_scored_model(settings, model_settings, checkpoint)
    if settings.real_labels and infer_imagenet_subset(model) != 'imagenet-1k':
        raise ConfigError(f'--real-labels are for the 1000 classes of ImageNet-1k, --model {model_settings.model} has '
                          f'{model.num_classes}; leave them.')
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = reparameterize_model(model) if settings.reparam else model
    model.to(accelerator.device, memory_format=memory_format)
    predictions, errors, unreadable, seconds = [], {}, 0, 0.0
    for part in parts:
        numbered = settings.dataset and part.class_names == [str(index) for index in range(len(part.class_names))]
        source = 'class map' if settings.class_map or numbered else 'data set' if settings.dataset else ''
        labels = map_labels(part.class_names, model, settings.valid_labels, ordered_by=source, flat=part.flat)
        for note in labels.notes if part is parts[0] else ():
            accelerator.print(f'{model_settings.model}: {note}')
        begin = time.perf_counter()
        title = ' '.join(filter(None, (model_settings.model, part.corruption, part.severity)))
        found, bad = evaluate_part(settings, part, model, data_config, labels, accelerator, title)
        seconds += time.perf_counter() - begin
        unreadable += bad
        predictions.append(found)
        errors.setdefault(part.corruption, {})[part.severity] = round(100 - found.scores['top1'], 4)
    predictions = pool(predictions) if len(predictions) > 1 else predictions[0]
    scores = {name: None if value is None else round(value, 4) for name, value in predictions.scores.items()}
    row = {
        # the columns of timm's validate.py
        'model': model_settings.model, 'top1': scores['top1'], 'top1_err': round(100 - scores['top1'], 4),
        'top5': scores['top5'], 'top5_err': round(100 - scores['top5'], 4),
        'param_count': round(parameters / 1e6, 2), 'img_size': data_config['input_size'][-1],
        'crop_pct': data_config['crop_pct'], 'interpolation': data_config['interpolation'], 'checkpoint': checkpoint,
        # and more
        'loss': scores['loss'], 'ece': round(expected_calibration_error(predictions), 4),
        'images': int((predictions.labels >= 0).sum()), 'unreadable': unreadable,
        'images_per_second': round(len(predictions.labels) / seconds, 2),
        'data': settings.dataset or settings.data_dir, 'valid_labels': labels.valid_labels,
        'real_labels': settings.real_labels}
    if parts[0].corruption:
        row |= {'mce': mean_corruption_error(errors), 'corruptions': errors}
    return row, predictions, labels


def evaluate(settings: EvaluationSettings) -> list[dict]:
    """Evaluate all requested models and return the rows of the table."""
    check_values(settings)
    runs = list(rows_of(settings))
    for model_settings, _ in runs:
        check_model_name(model_settings.model)
    accelerator = create_accelerator(settings.device, settings.amp, settings.amp_dtype)
    parts = open_parts(settings)
    if parts[0].flat and not settings.real_labels:
        raise ConfigError(f'--data-dir {settings.data_dir}: the images lie in no class folders, expected '
                          f'CLASS/IMAGE.jpg; a flat validation split is scored with --real-labels timm.')
    if settings.class_map:
        check_class_map(settings, parts[0].dataset, accelerator)
    make_output_dirs(settings)
    rows = []
    try:
        for model_settings, checkpoint in runs:
            row, predictions, labels = evaluate_model(settings, model_settings, checkpoint, parts, accelerator)
            rows.append(row)
            if accelerator.is_main_process:
                write_row(settings, rows, predictions, labels, accelerator)
    finally:  # print finished rows even if a later model fails or the disk is full
        if rows:
            accelerator.print(format_table(rows))
    if settings.real_labels:
        accelerator.print('right is any ReaL label of an image; there is no loss')
    if parts[0].corruption:
        for row in rows:
            accelerator.print(format_corruptions(row))
    accelerator.end_training()
    return rows
