"""Feature extraction: settings -> splits -> extractor -> shards, then k-NN and linear probe on them."""
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.data import ImageDataset, create_transform
from timm.models import safe_model_name
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from coatnet_train.data.dataset import IndexedImageDataset, create_dataset, read_targets
from coatnet_train.data.digest import data_digest
from coatnet_train.data.loader import UnreadableImages
from coatnet_train.evaluation.extraction_config import ExtractionSettings, check_values
from coatnet_train.evaluation.feature_shards import read_column, write_shard
from coatnet_train.evaluation.features import PooledFeatures, PyramidFeatures, knn_top1, linear_probe
from coatnet_train.models.open_model import image_mode, means_weights, open_model
from coatnet_train.models.weights_file import weights_digest
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, check_output, one_line
from coatnet_train.runtime.console import check_utf8, printable
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance

# Data


@dataclass(frozen=True)
class Split:
    """One split of the data: its name, images, labels (-1 without classes) and class names in label order."""

    name: str
    dataset: Dataset
    labels: list[int]
    class_names: list[str]

    def path(self, index: int) -> str:
        """Path of an image relative to the split, else 'image INDEX'."""
        name = self.dataset.filename(index) if isinstance(self.dataset, ImageDataset) else None
        return printable(str(name or f'image {index}'))


def open_split(settings: ExtractionSettings, name: str) -> Split:
    """Open a split; a folder without sub-folders, or a hfds/ set without a column of labels, has no classes."""
    # 0: a set without names for its labels needs none here
    dataset, class_names = create_dataset(settings, name, num_classes=0)
    if settings.dataset.startswith('hfds/') and not settings.target_key:
        table = dataset.reader.dataset
        if 'label' not in table.column_names:
            dataset.reader.dataset = table.add_column('label', [-1] * len(table))  # the reader looks for one
    if class_names == ['']:
        return Split(name, dataset, [-1] * len(dataset), [])
    try:
        labels = [-1 if label is None else int(label) for label in read_targets(dataset)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f'--target-key {settings.target_key or "label"} of --dataset {settings.dataset} is no '
                          f'column of whole numbers: {one_line(error)}; name the one with the labels.') from error
    return Split(name, dataset, labels, class_names)


def check_classes(settings: ExtractionSettings, train: Split, val: Split) -> None:
    """Raise ConfigError for unlabelled images, splits with different classes, or --knn-k above the training images."""
    name = '--knn' if settings.knn else '--linear-probe'
    for split in (train, val):
        if min(split.labels) < 0:
            raise ConfigError(f'{name} needs labels, and split {split.name!r} has images without; put the '
                              f'images of each class into a sub-folder of its own.')
    if train.class_names != val.class_names:
        differing = sorted(set(train.class_names) ^ set(val.class_names))
        raise ConfigError(f'{name} needs the same classes in both splits, but {", ".join(differing[:10])} are in one '
                          f'only; add images, or give the names of all in a --class-map.')
    if settings.knn and settings.knn_k > len(train.labels):
        raise ConfigError(f'--knn-k must be at most the {len(train.labels)} images of --split {train.name}, '
                          f'got {settings.knn_k}.')


# Model


def open_extractor(settings: ExtractionSettings) -> tuple[nn.Module, dict, str, dict[str, list[int]]]:
    """Open the extractor: (extractor, data settings of its model, digest of its weights, shape of each feature).

    Raises ConfigError for features that the model does not have.
    """
    random_seed(settings.seed)  # weights that are not loaded are the same in every process
    model, data_config = open_model(settings, settings.checkpoint, num_classes=settings.num_classes)
    digest = weights_digest(model)
    dimensions = {'pooled': 1, 'pyramid': 3}[settings.features]
    try:
        extractor = (PooledFeatures(model) if settings.features == 'pooled' else
                     PyramidFeatures(model, settings.out_indices)).eval()
        with torch.no_grad():
            features = extractor(torch.zeros(1, *data_config['input_size']))
        shapes = {name: list(values.shape[1:]) for name, values in features.items()}
        if wrong := [shape for shape in shapes.values() if len(shape) != dimensions]:
            raise ValueError(f'a feature has shape {wrong[0]}, not {dimensions} dimension{"s" * (dimensions > 1)}')
    except (AttributeError, RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        indices = f' --out-indices {" ".join(map(str, settings.out_indices))}' if settings.out_indices else ''
        raise ConfigError(f'--features {settings.features}{indices} cannot be had from --model {settings.model}: '
                          f'{one_line(error)}; try other levels or the other kind.') from error
    return extractor, data_config, digest, shapes


# Shards


def shard_paths(settings: ExtractionSettings, split: Split) -> dict[Path, range]:
    """The file of each shard and the images that belong to it."""
    folder = Path(settings.output) / (safe_model_name(split.name, remove_source=False) or 'images')
    starts = range(0, len(split.labels), settings.shard_size)
    return {folder / f'{number:05}-of-{len(starts):05}.{settings.format}':
            range(start, min(start + settings.shard_size, len(split.labels))) for number, start in enumerate(starts)}


def batches_of(shards: dict[Path, range], batch_size: int) -> Iterator[range]:
    """Image indices of each batch; no batch spans two shards, so its images do not depend on which shards are written.
    """
    for members in shards.values():
        for first in range(0, len(members), batch_size):
            yield members[first:first + batch_size]


def read_index(path: Path, signature: dict) -> dict:
    """Read the index of a split, {} if there is none; raises ConfigError if its settings or data differ."""
    if not path.exists():
        return {}
    index = json.loads(path.read_text(encoding='utf-8'))
    if changed := [f'{name} was {index.get(name)}, is {value}' for name, value in signature.items()
                   if index.get(name) != value]:
        raise ConfigError(f'--output {path.parent} was begun with other settings or data: {"; ".join(changed)}; '
                          f'restore them, or choose another --output.')
    return index


def extract(settings: ExtractionSettings, accelerator: Accelerator, extractor: nn.Module, data_config: dict,
            split: Split, signature: dict) -> dict:
    """Write the missing shards of a split and its index; the main process returns the complete index."""
    shards = shard_paths(settings, split)
    index_path = next(iter(shards)).parent / 'index.json'
    data = data_digest(split.dataset, split.class_names, accelerator)
    signature = signature | {'split': split.name, 'data': data, 'images': len(split.labels)}
    index = read_index(index_path, signature)
    missing = {path: members for path, members in shards.items() if not path.exists()}
    is_main_process = accelerator.is_main_process
    log = tqdm.write if is_main_process else lambda _: None
    unreadable_images = UnreadableImages(split.dataset, settings.max_bad_images, log)

    def add_unreadable(finished: dict[Path, range]) -> None:
        for path, members in finished.items():
            missing_rows = sorted(set(members) - set(read_column(path, 'index').tolist()))
            unreadable_images.add(torch.tensor(missing_rows, dtype=torch.long))

    try:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        add_unreadable({path: members for path, members in shards.items() if path not in missing})
        if index.get('complete') and not missing:
            return index
        accelerator.wait_for_everyone()  # now every process has seen which shards are missing
        index = signature | {'class_names': split.class_names, 'complete': False}
        if is_main_process:
            write_json(index_path, index)
        with accelerator.split_between_processes(list(missing.items())) as part:
            write_shards(settings, accelerator, extractor, data_config, split, dict(part), unreadable_images)
        accelerator.wait_for_everyone()
        if is_main_process:
            add_unreadable(missing)  # those of the other processes too
            index |= {'complete': True, 'rows': len(split.labels) - len(unreadable_images.found),
                      'unreadable': [split.path(number) for number in sorted(unreadable_images.found)],
                      'shards': {path.name: len(set(members) - unreadable_images.found)
                                 for path, members in shards.items()},
                      'provenance': provenance(accelerator.device.type)}
            write_json(index_path, index)
    except OSError as error:
        raise ConfigError(f'--output {index_path.parent} cannot be written: {one_line(error)}; choose '
                          f'another.') from error
    return index


def write_shards(settings: ExtractionSettings, accelerator: Accelerator, extractor: nn.Module, data_config: dict,
                 split: Split, shards: dict[Path, range], unreadable_images: UnreadableImages) -> None:
    """Extract and write the given shards one by one; raises ConfigError for features that are not finite."""
    dataset = IndexedImageDataset(
        split.dataset, create_transform(**data_config), settings.seed, image_mode(data_config))
    keys = ([(0, number) for number in batch] for batch in batches_of(shards, settings.batch_size))
    loaded = iter(DataLoader(dataset, batch_sampler=keys, num_workers=settings.workers,
                             pin_memory=accelerator.device.type == 'cuda'))
    labels = torch.tensor(split.labels)
    bar = progress_bar(total=sum(map(len, shards.values())), unit='img', desc=split.name or 'images',
                       quiet=not accelerator.is_main_process)
    for path, members in shards.items():
        rows, parts = [], []
        for batch in batches_of({path: members}, settings.batch_size):
            images, _, unreadable = next(loaded)
            unreadable_images.add(unreadable)
            with torch.inference_mode(), accelerator.autocast():
                features = extractor(images.to(accelerator.device, non_blocking=True))
            read = unreadable < 0
            rows.append(torch.tensor(batch)[read])
            parts.append({name: values.float().cpu()[read].to(getattr(torch, settings.dtype))
                          for name, values in features.items()})
            for name, values in parts[-1].items():
                if len(wrong := rows[-1][~values.flatten(1).isfinite().all(1)]):
                    raise ConfigError(f'{name} of {split.path(int(wrong[0]))} is not finite in '
                                      f'--dtype {settings.dtype}; take float32 and no --amp, or sound weights.')
            bar.update(len(images))
        rows = torch.cat(rows)
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        columns |= {'index': rows, 'label': labels[rows]}
        write_shard(path, columns, [split.path(row) for row in rows.tolist()])
    bar.close()


def read_split(settings: ExtractionSettings, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, C) in float32 and labels (N,) of all shards of a split."""
    paths = shard_paths(settings, split)
    return (torch.cat([read_column(path, 'embedding').float() for path in paths]),
            torch.cat([read_column(path, 'label') for path in paths]))


def extract_features(settings: ExtractionSettings) -> dict:
    """Extract features and measure them; the main process returns the summary that is also written to summary.json."""
    check_values(settings)
    stored = means_weights(settings.model) and not settings.checkpoint
    settings = replace(settings, pretrained=settings.pretrained or stored)
    check_utf8(settings.output, '--output')
    check_output(Path(settings.output))
    accelerator = create_accelerator(settings.device, settings.amp, settings.amp_dtype)
    with accelerator.main_process_first():  # a download is done once
        splits = [open_split(settings, settings.split)]
        if settings.knn or settings.linear_probe:
            splits.append(open_split(settings, settings.val_split))
            check_classes(settings, *splits)
    extractor, data_config, weights, shapes = open_extractor(settings)
    signature = {name: asdict(settings)[name] for name in (
        'model', 'model_kwargs', 'features', 'dtype', 'format', 'shard_size', 'dataset', 'input_key')}
    signature |= {'weights': weights, 'shapes': shapes, 'amp': settings.amp_dtype if settings.amp else '', **{
        name: data_config[name] for name in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}}
    signature = json.loads(json.dumps(signature))  # tuples become lists, as in the file they are compared with

    random = '' if settings.pretrained or settings.checkpoint else 'RANDOM WEIGHTS, '
    accelerator.print(f'{settings.model}: {random}{settings.features} features {shapes}, '
                      f'{" + ".join(str(len(split.labels)) for split in splits)} images, '
                      f'{accelerator.num_processes} x {accelerator.device.type} -> {settings.output}')
    extractor.to(accelerator.device)
    begun = time.perf_counter()
    indices = [extract(settings, accelerator, extractor, data_config, split, signature) for split in splits]
    seconds = time.perf_counter() - begun
    summary = {'model': settings.model, 'weights': weights, 'features': settings.features, 'seconds': seconds}
    if accelerator.is_main_process:
        for split, index in zip(splits, indices, strict=True):
            print(f'{split.name or "images"}: {index["rows"]} rows, {len(index["unreadable"])} unreadable, '
                  f'{len(index["shards"])} x {settings.format}')
        summary['rows'] = {split.name: index['rows'] for split, index in zip(splits, indices, strict=True)}
        summary |= measure(settings, splits, accelerator.device)
        summary['provenance'] = provenance(accelerator.device.type)
        write_json(Path(settings.output) / 'summary.json', summary)
    accelerator.end_training()
    return summary


def measure(settings: ExtractionSettings, splits: list[Split], device: torch.device) -> dict:
    """Print and return the scores of --knn and --linear-probe; {} without a second split."""
    if len(splits) == 1:
        return {}
    tensors = [tensor for split in splits for tensor in read_split(settings, split)]
    scores = {}
    if settings.knn:
        top1 = knn_top1(*(tensor.to(device) for tensor in tensors), settings.knn_k, settings.knn_temperature)
        scores['knn'] = {'top1': top1, 'k': settings.knn_k, 'temperature': settings.knn_temperature}
        print(f'{settings.knn_k} nearest neighbours: top-1 {top1:.2f} %')
    if settings.linear_probe:
        scores['linear_probe'] = found = linear_probe(*(tensor.numpy() for tensor in tensors), settings.seed)
        print(f'linear probe: top-1 {found["top1"]:.2f} % (C {found["C"]:g}, by {found["held_out_top1"]:.2f} % on a '
              f'fifth of {settings.split}{"" if found["converged"] else "; not converged"})')
    return scores
