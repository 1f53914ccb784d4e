"""Stored outputs of a teacher: shards of float16 logits for views of every training image, and a manifest.

A folder holds manifest.json and shards NNNNN-of-NNNNN.safetensors. A shard holds n consecutive images with all V views
of each. Without --top-k its columns are

    logits   (n, V, C) float16   logits minus their maximum in each view, which leaves every softmax unchanged

and with --top-k, where T is the number of stored temperatures,

    logits   (n, V, k) float16   the k largest logits, minus the maximum
    classes  (n, V, k) int16     their classes (int32 above 32,767 classes)
    rest     (n, V, T) float16   logsumexp((other logits - maximum) / temperature)

The manifest has a `signature` that identifies images, views and teacher, and the SHA-256 of every shard.
"""
import hashlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.teach_config import TeachSettings

__all__ = [
    'TeacherOutputs', 'compress', 'differences', 'file_digest', 'open_outputs', 'read_manifest', 'shard_members',
    'view_signature']

COLUMNS = ('logits', 'classes', 'rest')


def view_signature(
        settings: FinetuneSettings | TeachSettings, data_config: dict, device: torch.device) -> dict[str, object]:
    """Settings that, with the image, the seed and v, determine view v of an image.

    The size is left out, because the crop is the same at every size, unless random erasing draws pixels. The
    normalisation is left out, because the teacher inverts it, unless --aa or --reprob is set, whose fill
    values depend on it.
    """
    names = 'cache_images', 'scale', 'hflip', 'color_jitter', 'aa', 'reprob'
    signature = {name: getattr(settings, name) for name in names} | {
        'interpolation': data_config['interpolation'], 'in_chans': data_config['input_size'][0]}
    if settings.aa or settings.reprob:
        signature |= {name: data_config[name] for name in ('mean', 'std')}
    if settings.reprob:
        signature['img_size'] = data_config['input_size'][-1]
        if settings.cache_images:
            signature['device'] = device.type  # the device that draws the noise of random erasing
    return json.loads(json.dumps(signature))  # tuples become lists, as in the file


def differences(stored: dict[str, object], expected: dict[str, object]) -> str:
    """'NAME is A there and B here' for every entry that differs, '' if none does; digests are abbreviated."""
    def short(value: object) -> object:
        return f'{value[:12]}...' if isinstance(value, str) and len(value) == 64 else value

    return '; '.join(
        f'{name} is {short(stored.get(name, "unknown"))} there and {short(value)} here'
        for name, value in expected.items() if name not in stored or stored[name] != value)


def compress(logits: torch.Tensor, top_k: int | None, temperatures: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Logits (B, C) -> columns of a shard for one view: (B, C); or (B, k), (B, k) and (B, T) with `top_k`."""
    logits = logits.float() - logits.float().amax(1, keepdim=True)
    if top_k is None:
        return {'logits': logits.half()}
    top, classes = logits.topk(top_k)
    others = logits.scatter(1, classes, -torch.inf)
    rest = torch.stack([(others / temperature).logsumexp(1) for temperature in temperatures], 1)
    return {'logits': top.half(), 'classes': classes.to(torch.int16 if logits.shape[1] < 2**15 else torch.int32),
            'rest': rest.half()}


def shard_members(images: int, shard_size: int) -> dict[str, range]:
    """The name of each shard and the images that belong to it."""
    starts = range(0, images, shard_size)
    return {f'{number:05}-of-{len(starts):05}.safetensors': range(start, min(start + shard_size, images))
            for number, start in enumerate(starts)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path, option: str) -> dict:
    """Read the manifest in a folder; raises ConfigError, naming `option`, if it is missing or invalid."""
    try:
        manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        if not isinstance(manifest, dict) or not manifest.keys() >= {'signature', 'shards', 'complete', 'teacher'}:
            raise ValueError('it is no manifest of teach.py')
    except (OSError, ValueError) as error:
        raise ConfigError(f'{option} {folder} must be a folder that teach.py wrote: {one_line(error)}; give '
                          f'another.') from error
    return manifest


class TeacherOutputs:
    """Outputs of a teacher for view v of image i, opened from the shards of a folder.

    Args:
        folder: Folder with the shards.
        manifest: Complete manifest of the folder.
        temperature: Temperature for which `rest` is read, if the shards hold the top k.

    Attributes:
        views: Number V of views.
        seed: Seed of the views: view v of image i is the item (v, i) of a dataset with this seed.
        teacher: Name of the teacher.
        digest: SHA-256 over the signature and the digests of all shards.
    """

    def __init__(self, folder: Path, manifest: dict, temperature: float):
        signature = manifest['signature']
        self.views, self.seed, self.shard_size = signature['views'], signature['seed'], signature['shard_size']
        self.teacher = manifest['teacher']
        parts = [signature, manifest['shards']]
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        names = COLUMNS if signature['top_k'] else COLUMNS[:1]
        self.shards: list[tuple[torch.Tensor, ...]] = []
        for name in shard_members(signature['images'], self.shard_size):
            with safe_open(folder / name, 'pt') as shard:
                columns = {column: shard.get_tensor(column) for column in names}
            if 'rest' in columns:
                columns['rest'] = columns['rest'][..., signature['temperatures'].index(temperature)]
            self.shards.append(tuple(columns.values()))

    def row(self, view: int, index: int) -> tuple[torch.Tensor, ...]:
        """Columns of one view of one image: (C,), or (k,), (k,) and ()."""
        shard, place = divmod(index, self.shard_size)
        return tuple(column[place, view] for column in self.shards[shard])

    def load(self, device: torch.device) -> None:
        """Copy all columns to a device, for `rows`; raises ConfigError if it is out of memory."""
        try:
            self.columns = [torch.cat(parts).to(device) for parts in zip(*self.shards, strict=True)]
        except RuntimeError as error:
            size = sum(column.nbytes for columns in self.shards for column in columns) / 1e9
            raise ConfigError(f'--teacher-outputs of {size:.3g} GB are more than {device} has left; store fewer by '
                              f'--top-k, or give --no-cache-images.') from error

    def rows(self, views: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Columns of a batch, after `load`: (B, C), or (B, k), (B, k) and (B,)."""
        return tuple(column[indices, views] for column in self.columns)


def open_outputs(settings: FinetuneSettings, data_config: dict, class_names: list[str], data: str,
                 accelerator: Accelerator) -> TeacherOutputs:
    """Open --teacher-outputs; raises ConfigError unless they are complete, undamaged and of these images and views.

    Args:
        settings: Settings of finetune.py.
        data_config: Data settings of the student.
        class_names: In label order.
        data: Digest of the training images.
        accelerator: Accelerator of the run.
    """
    folder = Path(settings.teacher_outputs)
    manifest = read_manifest(folder, '--teacher-outputs')
    stored, where = manifest['signature'], f'--teacher-outputs {folder}'
    members = shard_members(stored['images'], stored['shard_size'])
    if not manifest['complete']:
        raise ConfigError(f'{where} has {len(manifest["shards"])} of {len(members)} shards; run teach.py again, which '
                          f'goes on, or give another.')
    expected = {'training_images': data, 'classes': len(class_names)}
    if settings.teacher_img_size:  # optional
        expected['teacher_img_size'] = settings.teacher_img_size
    expected |= view_signature(settings, data_config, accelerator.device)
    if changed := differences(stored, expected):
        raise ConfigError(f'{where} is of other images or views: {changed}; give the data, recipe and flags that '
                          f'teach.py had, or run it again.')
    if settings.reprob and {*settings.train_img_sizes} - {stored['img_size']}:
        raise ConfigError(f'--reprob erases other pixels at other sizes, and {where} is of {stored["img_size"]} '
                          f'pixels, not of --train-img-sizes {settings.train_img_sizes}; leave one of them out.')
    if stored['top_k'] and settings.kd_temperature not in stored['temperatures']:
        raise ConfigError(f'--kd-temperature must be one of those that {where} has for its --top-k, '
                          f'{", ".join(map(str, stored["temperatures"]))}, got {settings.kd_temperature}.')
    wrong = [find_damaged(folder, manifest['shards']) if accelerator.is_main_process else None]
    if wrong := broadcast_object_list(wrong)[0]:
        raise ConfigError(f'{where}: {", ".join(wrong[:3])} is missing or not as it was written (SHA-256); run '
                          f'teach.py again, which writes it anew.')
    try:
        return TeacherOutputs(folder, manifest, settings.kd_temperature)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f'{where} cannot be read: {one_line(error)}.') from error


def find_damaged(folder: Path, shards: dict[str, str]) -> list[str]:
    """Names of shards that are missing or have another SHA-256."""
    return [name for name, digest in shards.items()
            if not (folder / name).is_file() or file_digest(folder / name) != digest]
