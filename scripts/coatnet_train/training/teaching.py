"""Storing the outputs of a teacher: settings -> images and teacher -> shards of outputs, and their manifest."""
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from timm.task.distillation import DistillationTeacher
from torch.utils.data import DataLoader, Dataset

from coatnet_train.data.dataset import create_dataset
from coatnet_train.data.digest import data_digest
from coatnet_train.data.loader import UnreadableImages, ignore_sigterm
from coatnet_train.models.weights_file import weights_digest
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.cli import ConfigError, check_output, one_line
from coatnet_train.runtime.console import check_utf8
from coatnet_train.runtime.files import write_file, write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.distillation import check_teacher_classes, check_teacher_input, create_teacher
from coatnet_train.training.loaders import create_train_images
from coatnet_train.training.teach_config import TeachSettings, check_values
from coatnet_train.training.teacher_outputs import (
    compress,
    differences,
    file_digest,
    find_damaged,
    read_manifest,
    shard_members,
    view_signature,
)

__all__ = ['teach']


class Teacher:
    """Augmented images (B, C, H, W) of the student -> the teacher's logits (B, classes) in float32.

    Args:
        model: What `create_teacher` returned.
        data_config: Data settings with the mean and std of the images' normalisation.
        accelerator: Device and precision to use.
    """

    def __init__(self, model: torch.nn.Module, data_config: dict, accelerator: Accelerator):
        self.accelerator, device = accelerator, accelerator.device
        self.teacher = DistillationTeacher(model.to(device, memory_format=torch.channels_last), device=device).eval()
        self.mean, self.std = (torch.tensor(data_config[name], device=device).view(1, -1, 1, 1)
                               for name in ('mean', 'std'))

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.accelerator.device, memory_format=torch.channels_last, non_blocking=True)
        with self.accelerator.autocast():
            return self.teacher(self.teacher.normalize_input(images, self.mean, self.std)).float()


def teach(settings: TeachSettings) -> dict:
    """Store the outputs of a teacher, and return the manifest that is written beside them."""
    check_values(settings)
    check_utf8(settings.output, '--output')
    folder = Path(settings.output)
    check_output(folder)
    if folder.is_dir() and not (folder / 'manifest.json').is_file() and any(
            path.name != '.manifest.json.tmp' for path in folder.iterdir()):  # a killed call may leave it
        raise ConfigError(f'--output {folder} must be new, empty, or outputs that teach.py began, but holds other '
                          f'files; name another folder.')
    accelerator = create_accelerator(settings.device, settings.amp, settings.amp_dtype)
    with accelerator.main_process_first():  # a download is done once
        dataset, class_names = create_dataset(settings, settings.train_split)
    model, teacher_config = create_teacher(
        settings.teacher, img_size=settings.teacher_img_size, in_chans=settings.in_chans)
    channels, *size = teacher_config['input_size']
    if settings.img_size is not None:
        size = [settings.img_size, settings.img_size]
    check_teacher_input(model, settings.teacher, channels, (channels, *size))
    check_teacher_classes(model, settings.teacher, class_names)
    if settings.top_k is not None and settings.top_k >= len(class_names):
        raise ConfigError(f'--top-k must be below the number of classes, {len(class_names)}, got {settings.top_k}; '
                          f'leave it out to keep all.')
    data_config = {
        'input_size': (channels, *size), 'interpolation': settings.interpolation,
        'mean': settings.mean or teacher_config['mean'], 'std': settings.std or teacher_config['std']}
    try:
        images = create_train_images(settings, dataset, data_config, accelerator)
    except ConfigError:
        raise
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f'--aa, --mean, --std or another setting of the images: {one_line(error)}.') from error
    signature = {
        'training_images': data_digest(dataset, class_names, accelerator), 'images': len(dataset),
        'classes': len(class_names), 'teacher_weights': weights_digest(model),
        'teacher_img_size': settings.teacher_img_size or data_config['input_size'][-1],
        'img_size': data_config['input_size'][-1], 'precision': settings.amp_dtype if settings.amp else 'float32',
        'seed': settings.seed, 'views': settings.views, 'top_k': settings.top_k,
        'temperatures': settings.temperatures if settings.top_k else (), 'shard_size': settings.shard_size,
        **view_signature(settings, data_config, accelerator.device)}
    signature = json.loads(json.dumps(signature))  # tuples become lists, as in the file
    members = shard_members(len(dataset), settings.shard_size)
    try:
        shards = finished_shards(folder, signature)
        todo = {name: rows for name, rows in members.items() if name not in shards}
        accelerator.print(f'{settings.teacher}: {settings.views} views of {len(dataset)} images, {len(class_names)} '
                          f'classes, {len(todo)} of {len(members)} shards to write -> {folder}')
        accelerator.wait_for_everyone()  # now every process has seen which shards are missing
        manifest = {'teacher': settings.teacher, 'signature': signature, 'shards': shards, 'complete': False}
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / 'manifest.json', manifest)
        if todo and settings.cache_images:
            images.load()
        begun = time.perf_counter()
        write_shards(settings, folder, manifest, todo, images, Teacher(model, data_config, accelerator))
        manifest |= {'complete': True, 'provenance': provenance(accelerator.device.type)}
        if accelerator.is_main_process:
            write_json(folder / 'manifest.json', manifest)
            size = sum((folder / name).stat().st_size for name in members) / 1e6
            print(f'{len(members)} shards, {size:.1f} MB, {time.perf_counter() - begun:.0f} s; finetune.py takes '
                  f'--teacher-outputs {folder}')
    except OSError as error:
        raise ConfigError(f'--output {folder} cannot be written: {one_line(error)}; choose another.') from error
    return manifest


def finished_shards(folder: Path, signature: dict) -> dict[str, str]:
    """SHA-256 of the intact shards of an earlier call; raises ConfigError if its settings, data or teacher differ."""
    if not (folder / 'manifest.json').exists():
        return {}
    manifest = read_manifest(folder, '--output')
    if changed := differences(manifest['signature'], signature):
        raise ConfigError(f'--output {folder} was begun with other settings, data or teacher: {changed}; restore '
                          f'them, or choose another --output.')
    damaged = find_damaged(folder, manifest['shards'])
    return {name: digest for name, digest in manifest['shards'].items() if name not in damaged}


def write_shards(settings: TeachSettings, folder: Path, manifest: dict, shards: dict[str, range], images: Dataset,
                 teacher: Teacher) -> None:
    """Write the given shards, one per process at a time, and record each in the manifest."""
    accelerator = teacher.accelerator
    names, processes = list(shards), accelerator.num_processes
    own = names[accelerator.process_index::processes]
    keys = [batch for name in own for batch in batches_of(shards[name], settings)]
    workers = 0 if settings.cache_images else settings.workers
    loader = DataLoader(
        images, batch_sampler=keys, num_workers=workers, worker_init_fn=ignore_sigterm,
        pin_memory=accelerator.device.type == 'cuda' and not settings.cache_images,
        **(dict(collate_fn=lambda batch: batch) if settings.cache_images else {}))
    bar = progress_bar(total=settings.views * sum(map(len, shards.values())), unit='img',
                       quiet=not accelerator.is_main_process)
    unreadable = UnreadableImages(
        images.dataset, settings.max_bad_images, bar.write if accelerator.is_main_process else lambda _: None)
    loaded = iter(loader)
    for first in range(0, len(names), processes):
        written = []
        for name in names[first:first + processes][accelerator.process_index:accelerator.process_index + 1]:
            parts, bad = [], []
            for _ in batches_of(shards[name], settings):
                batch, _, found = next(loaded)
                parts.append(compress(check_finite(teacher(batch)).cpu(), settings.top_k, settings.temperatures))
                bad += found.tolist()
                bar.update(len(batch) * min(processes, len(names) - first))
            columns = {column: torch.cat([part[column] for part in parts]).unflatten(0, (settings.views, -1))
                       .transpose(0, 1).contiguous() for column in parts[0]}
            write_file(folder / name, partial(save_file, columns))
            written.append((name, file_digest(folder / name), bad))
        for name, digest, bad in gather_object(written):
            manifest['shards'][name] = digest
            unreadable.add(torch.tensor(bad, dtype=torch.long))
        if accelerator.is_main_process:
            write_json(folder / 'manifest.json', manifest)
    bar.close()


def batches_of(images: range, settings: TeachSettings) -> Iterator[list[tuple[int, int]]]:
    """(view, index) keys of each batch of a shard, view by view; a batch holds a single view."""
    for view in range(settings.views):
        for first in range(0, len(images), settings.batch_size):
            yield [(view, index) for index in images[first:first + settings.batch_size]]


def check_finite(logits: torch.Tensor) -> torch.Tensor:
    if not logits.isfinite().all():
        raise ConfigError('--teacher gives logits that are not finite; take no --amp, or sound weights.')
    return logits
