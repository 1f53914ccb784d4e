"""Fine-tune any timm or zoo model on a folder of pictures or a torchvision data set.

    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20
    python scripts/finetune.py --data-dir data --dataset torch/cifar10 --dataset-download --model resnet18 --pretrained
    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20 --resume auto

The folder has train/ and val/ (or validation/, test/), with one sub-folder per class in each. The run goes to
OUTPUT/EXPERIMENT: best weights with their config, metrics.csv, curves.png and summary.json. Once `coatnet_zoo` is
imported, `timm.create_model('local-dir:OUTPUT/EXPERIMENT', pretrained=True)` loads it.
"""

import ast
import difflib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from run_folder import rank, write_config, write_file, write_json, write_metrics, write_weights
from timm.data import create_dataset, create_transform, resolve_input_data_config
from timm.models import parse_model_name, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed, unwrap_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose
from tqdm import tqdm

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm


@dataclass(frozen=True)
class Settings:
    data_dir: str  # Folder with train/ and val/ (or validation/, test/), or where --dataset keeps its files.
    model: str  # Any name of timm.list_models(), or hf-hub:OWNER/NAME, or local-dir:FOLDER.
    dataset: str = ''  # Empty for a folder of pictures, else a torchvision data set such as torch/cifar10.
    train_split: str = 'train'  # Name of the training split.
    val_split: str = 'validation'  # Name of the split that picks the best epoch.
    dataset_download: bool = False  # Let torchvision download the data set.

    pretrained: bool = False  # Start from the model's pretrained weights; the classifier is made anew.
    initial_checkpoint: str = ''  # Start from this file of weights, whose classes must be the data's.
    num_classes: int | None = None  # Number of classes; must be the data's (taken from there if not given).
    img_size: int | None = None  # Height and width in pixels (the model's own if not given).
    in_chans: int = 3  # Read pictures as RGB (3) or grey (1).
    model_kwargs: tuple[str, ...] = ()  # More arguments of the model, as key=value.
    mean: tuple[float, ...] = ()  # Mean of each channel, in 0..1 (the model's own if not given).
    std: tuple[float, ...] = ()  # Standard deviation of each channel (the model's own if not given).
    interpolation: str = ''  # Resizing method, such as bicubic (the model's own if not given).
    crop_pct: float | None = None  # Share of the resized picture kept in evaluation (the model's own if not given).

    batch_size: int = 64  # Pictures per training step.
    validation_batch_size: int | None = None  # Pictures per evaluation step (--batch-size if not given).
    epochs: int = 10  # Passes over the training split.
    opt: str = 'adamw'  # Any name of timm.optim.list_optimizers().
    lr: float = 5e-4  # Highest learning rate.
    weight_decay: float = 0.05  # Weight decay; not applied to biases and norms.
    momentum: float = 0.9  # Momentum of the optimizers that have one.
    layer_decay: float | None = None  # Factor on the learning rate per layer, counted from the classifier.
    clip_grad: float | None = 1.0  # Largest norm of the gradient.
    warmup_epochs: float = 1.0  # Epochs of linear warm-up; cosine decay follows, updated at each step.
    warmup_lr: float = 1e-6  # Learning rate at the start of the warm-up.
    min_lr: float = 1e-6  # Learning rate at the end.

    smoothing: float = 0.1  # Label smoothing.
    drop: float | None = None  # Dropout before the classifier.
    drop_path: float | None = None  # Stochastic depth.
    scale: tuple[float, float] = (0.08, 1.0)  # Area of the random crop, as a share of the picture.
    hflip: float = 0.5  # Probability of a horizontal flip.
    color_jitter: float = 0.4  # Strength of random brightness, contrast and saturation.
    aa: str | None = None  # AutoAugment policy, such as rand-m9-mstd0.5-inc1.
    reprob: float = 0.0  # Probability of random erasing.

    model_ema: bool = False  # Evaluate and release an exponential moving average of the weights.
    model_ema_decay: float = 0.9998  # Its decay, approached from 0 over the first steps.
    amp: bool = False  # Mixed precision.
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.
    channels_last: bool = True  # Memory format of pictures and weights.
    device: str = 'auto'  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.
    workers: int = 4  # Processes that read pictures; 0 reads in the training process.
    seed: int = 42  # Fixes weights, order and augmentation; bit for bit on a CPU.

    output: str = 'output'  # Parent of the run folders.
    experiment: str = ''  # Name of the run folder (the model's name if not given).
    resume: str = ''  # auto continues the run folder if it has begun; a path continues that run folder.


# Settings that may differ when a run is resumed: they change where it is, not what it computes.
FREE_ON_RESUME = ('dataset_download', 'output', 'experiment', 'resume', 'device')
SPLIT_FOLDERS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'valid', 'eval', 'test')}


class SettingsError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence with the way out."""


def one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def check_values(settings: Settings) -> None:
    """Refuse single values that cannot work, before anything is read."""
    for name in ('epochs', 'batch_size', 'validation_batch_size', 'lr', 'clip_grad', 'img_size'):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise SettingsError(f'--{name.replace("_", "-")} must be greater than 0, got {value}.')
    for name in ('workers', 'warmup_lr', 'weight_decay'):
        if not getattr(settings, name) >= 0:
            raise SettingsError(f'--{name.replace("_", "-")} must be at least 0, got {getattr(settings, name)}.')
    for name, least, most in (
            ('smoothing', 0, 0.999), ('hflip', 0, 1), ('reprob', 0, 1), ('color_jitter', 0, math.inf),
            ('momentum', 0, 1), ('model_ema_decay', 0, 1), ('layer_decay', 1e-6, 1), ('crop_pct', 1e-6, 1),
            ('seed', 0, 2**32 - 1), ('warmup_epochs', 0, settings.epochs), ('min_lr', 0, settings.lr)):
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise SettingsError(f'--{name.replace("_", "-")} must be from {least:g} to {most:g}, got {value}.')
    if not 0 < settings.scale[0] <= settings.scale[1] <= 1:
        raise SettingsError(f'--scale must be two rising shares of the picture from 0 to 1, got {settings.scale}.')
    if any(not value > 0 for value in settings.std):
        raise SettingsError(f'--std must be greater than 0 for each channel, got {settings.std}.')
    if settings.in_chans not in (1, 3):
        raise SettingsError(f'--in-chans must be 3 (pictures read as RGB) or 1 (as grey), got {settings.in_chans}.')
    if settings.amp_dtype not in ('bfloat16', 'float16'):
        raise SettingsError(f'--amp-dtype must be bfloat16 or float16, got {settings.amp_dtype!r}.')
    if settings.dataset and not settings.dataset.startswith('torch/'):
        raise SettingsError(f'--dataset must be empty (a folder) or start with torch/, got {settings.dataset!r}.')


def find_run(settings: Settings) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to continue from, if there is one; never an older run to overwrite."""
    run_dir = Path(settings.output) / (settings.experiment or safe_model_name(settings.model))
    if settings.resume not in ('', 'auto'):
        run_dir = Path(settings.resume)
    checkpoint = run_dir / 'last' / 'checkpoint.pt'
    if settings.resume and checkpoint.is_file():
        return run_dir, checkpoint
    if settings.resume not in ('', 'auto'):
        raise SettingsError(f'--resume {settings.resume} must be a run folder, but there is no {checkpoint}; '
                            f'give the folder that holds last/, or auto.')
    # A run killed in its first epoch has args.json but no checkpoint: auto begins it again.
    if (run_dir / ('summary.json' if settings.resume else 'args.json')).exists():
        raise SettingsError(f'--output {run_dir} already holds a run, which is never overwritten; continue it with '
                            f'--resume auto (while it has last/), or choose another --experiment.')
    return run_dir, None


def choose_device(name: str) -> torch.device:
    try:
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f'--device {name} cannot be used here: {one_line(error)}; try --device auto.') from error
    return device


# Data


def open_split(settings: Settings, split: str) -> tuple[Dataset, list[str]]:
    """Open one split of the data and return it with its class names in label order."""
    if settings.dataset:
        try:
            dataset = create_dataset(
                settings.dataset, root=settings.data_dir, split=split, download=settings.dataset_download)
            # torchvision's ImageNet has tuples of synonyms
            return dataset, [name if isinstance(name, str) else name[0] for name in dataset.classes]
        except (RuntimeError, AssertionError, AttributeError, OSError, ValueError) as error:
            raise SettingsError(
                f'--dataset {settings.dataset} cannot be read from --data-dir {settings.data_dir}: '
                f'{one_line(error)}; --dataset-download fetches what torchvision offers.') from error

    names = SPLIT_FOLDERS.get(split, (split,))
    folder = next((path for name in names if (path := Path(settings.data_dir) / name).is_dir()), None)
    layout = f'expected {settings.data_dir}/{names[0]}/CLASS/PICTURE.jpg (or .png)'
    if folder is None:
        raise SettingsError(f'--data-dir {settings.data_dir} has no folder {" or ".join(names)}; {layout}.')
    try:
        dataset = create_dataset('', root=str(folder), search_split=False)
    except RuntimeError as error:
        raise SettingsError(f'--data-dir {settings.data_dir}: no pictures found in {folder}; {layout}.') from error
    return dataset, sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)


def open_data(settings: Settings) -> tuple[Dataset, Dataset, list[str]]:
    """Open both splits and check that their classes agree with each other and with --num-classes."""
    if not settings.dataset_download and not Path(settings.data_dir).is_dir():
        raise SettingsError(f'--data-dir {settings.data_dir} is not a folder; give the one that holds train/ and val/.')
    train_set, class_names = open_split(settings, settings.train_split)
    val_set, val_names = open_split(settings, settings.val_split)
    if differing := sorted(set(class_names) ^ set(val_names)):
        raise SettingsError(f'--data-dir {settings.data_dir}: both splits must have the same classes, but '
                            f'{", ".join(differing)} are in one only; add pictures or remove the folders.')
    if len(class_names) < 2:
        raise SettingsError(f'--data-dir {settings.data_dir}: at least 2 classes are needed, found {len(class_names)}; '
                            f'put the pictures of each class into a sub-folder of its own.')
    if settings.num_classes not in (None, len(class_names)):
        raise SettingsError(f'--num-classes must be the number of classes in the data, {len(class_names)}, '
                            f'got {settings.num_classes}; leave it out to take it from the data.')
    return train_set, val_set, class_names


def seed_worker(_: int) -> None:
    np.random.seed(torch.initial_seed() % 2**32)  # torch itself seeds torch and random


def create_loaders(
        settings: Settings, train_set: Dataset, val_set: Dataset, data_config: dict, device: torch.device,
) -> tuple[DataLoader, DataLoader]:
    """Give both data sets their transforms and wrap them in seeded loaders."""
    to_mode = partial(Image.Image.convert, mode='RGB' if settings.in_chans == 3 else 'L')
    try:
        augment = create_transform(
            **{key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std')}, is_training=True,
            scale=settings.scale, hflip=settings.hflip, color_jitter=settings.color_jitter,
            auto_augment=settings.aa, re_prob=settings.reprob, re_mode='pixel',
        )
        train_set.transform = Compose([to_mode, augment])
        val_set.transform = Compose([to_mode, create_transform(**data_config)])
    except (ValueError, KeyError, AssertionError) as error:
        raise SettingsError(f'--aa, --interpolation or another setting of the pictures: {one_line(error)}.') from error
    shared = dict(num_workers=settings.workers, worker_init_fn=seed_worker, pin_memory=device.type == 'cuda')
    train_loader = DataLoader(
        train_set, settings.batch_size, shuffle=True, generator=torch.Generator(),
        drop_last=len(train_set) > settings.batch_size, **shared)
    val_loader = DataLoader(val_set, settings.validation_batch_size or settings.batch_size, **shared)
    return train_loader, val_loader


# Model


def create_model(settings: Settings, num_classes: int) -> tuple[nn.Module, dict]:
    """Create the model and its data settings, and show it one picture so that it can refuse before training."""
    try:
        source, name = parse_model_name(settings.model)
    except ValueError as error:
        raise SettingsError(f'--model: {one_line(error)}') from error
    if source is None and not timm.is_model(name):
        raise SettingsError(f'--model {name} is not a name in timm.list_models()'
                            f'{did_you_mean(name, timm.list_models()) or "."}')
    if settings.initial_checkpoint and not Path(settings.initial_checkpoint).is_file():
        raise SettingsError(f'--initial-checkpoint {settings.initial_checkpoint} is not a file; give one or leave it.')
    if wrong := [item for item in settings.model_kwargs if '=' not in item]:
        raise SettingsError(f'--model-kwargs must be key=value, got {wrong[0]!r}.')
    flags = ('num_classes', 'in_chans', 'img_size', 'drop_rate', 'drop_path_rate', 'pretrained', 'checkpoint_path')
    if wrong := [item for item in settings.model_kwargs if item.split('=')[0] in flags]:
        raise SettingsError(f'--model-kwargs {wrong[0]}: this one has a flag of its own, use that.')
    try:
        # timm's rule: img_size goes to models built for one size, others just get pictures of that size
        img_size = resolve_model_input_args(settings.model, {'img_size': settings.img_size}).get('img_size')
        model = timm.create_model(
            settings.model, pretrained=settings.pretrained, checkpoint_path=settings.initial_checkpoint,
            num_classes=num_classes, in_chans=settings.in_chans, img_size=img_size, drop_rate=settings.drop,
            drop_path_rate=settings.drop_path, **dict(map(parse_argument, settings.model_kwargs)),
        )
        data_config = resolve_input_data_config(model, {
            'img_size': settings.img_size, 'interpolation': settings.interpolation, 'crop_pct': settings.crop_pct,
            'mean': settings.mean or None, 'std': settings.std or None,
        })
        with torch.no_grad():
            model.eval()(torch.zeros(1, *data_config['input_size']))
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        size = '' if settings.img_size is None else f' with --img-size {settings.img_size}'
        raise SettingsError(f'--model {settings.model}{size} cannot be built: {one_line(error)}') from error
    return model, data_config


def parse_argument(item: str) -> tuple[str, object]:
    """Read key=value as timm's train.py does: a Python literal if it is one, else a string."""
    key, value = item.split('=', 1)
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


# Training


def main(settings: Settings) -> dict:
    """Fine-tune as `settings` say, and return the summary that is also written to summary.json."""
    check_values(settings)
    run_dir, last = find_run(settings)
    device = choose_device(settings.device)
    train_set, val_set, class_names = open_data(settings)
    random_seed(settings.seed)
    model, data_config = create_model(settings, len(class_names))
    train_loader, val_loader = create_loaders(settings, train_set, val_set, data_config, device)
    facts = {name: value for name, value in asdict(settings).items() if name not in FREE_ON_RESUME}
    facts |= {'classes': class_names, 'train_images': len(train_set), 'val_images': len(val_set)}
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file they are compared with

    checkpoint = torch.load(last, map_location='cpu', weights_only=True) if last else None
    if last and (changed := [f'{name} was {value}, is {facts.get(name)}'
                             for name, value in checkpoint['facts'].items() if facts.get(name) != value]):
        raise SettingsError(f'--resume {run_dir} needs the settings the run began with, but {"; ".join(changed)}; '
                            f'restore them, or start another --experiment.')
    try:
        optimizer = create_optimizer_v2(
            model.to(device), settings.opt, lr=settings.lr, weight_decay=settings.weight_decay,
            momentum=settings.momentum, layer_decay=settings.layer_decay)
    except (ValueError, TypeError, AssertionError) as error:
        raise SettingsError(f'--opt {settings.opt}: {one_line(error)}; see timm.optim.list_optimizers()'
                            f'{did_you_mean(settings.opt, list_optimizers()) or "."}') from error
    try:
        (run_dir / 'last').mkdir(parents=True, exist_ok=True)
        write_json(run_dir / 'args.json', asdict(settings))
    except OSError as error:
        raise SettingsError(f'--output {run_dir} cannot be written: {one_line(error)}; choose another.') from error
    write_config(run_dir / 'config.json', model, class_names, data_config)

    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    task = ClassificationTask(model, criterion_kwargs={'smoothing': settings.smoothing}, device=device)
    if settings.model_ema:
        task.setup_ema(settings.model_ema_decay, use_warmup=True)  # so that a short run is not stuck near its start
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs, min_lr=settings.min_lr,
        warmup_lr=settings.warmup_lr, step_on_epochs=False, updates_per_epoch=len(train_loader))
    autocast = partial(torch.autocast, device.type, getattr(torch, settings.amp_dtype), settings.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp and settings.amp_dtype == 'float16')

    def place(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.to(device, memory_format=memory_format, non_blocking=True)
        return images, targets.to(device, non_blocking=True)

    history, train_seconds = [], 0.0
    if checkpoint:
        task.load_checkpoint_state(checkpoint['state_dict'])
        if settings.model_ema:
            task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
        optimizer.load_state_dict(checkpoint['optimizer'])
        scheduler.load_state_dict(checkpoint['scheduler'])
        scaler.load_state_dict(checkpoint['scaler'])
        history, train_seconds = checkpoint['history'], checkpoint['train_seconds']

    def check_finite(loss: float, what: str, epoch: int, step: int) -> None:
        if not math.isfinite(loss):
            saved = run_dir / 'last' / 'checkpoint.pt'
            raise FloatingPointError(
                f'{what} loss is {loss} at step {step} (epoch {epoch}): start another --experiment with a lower --lr; '
                f'the last good checkpoint is {saved if saved.exists() else "none, no epoch was finished"}.'
            )

    first_epoch, steps_per_epoch = len(history) + 1, len(train_loader)
    seen_per_epoch = steps_per_epoch * settings.batch_size if train_loader.drop_last else len(train_set)
    print(f'{settings.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
          f'{len(class_names)} classes, {len(train_set)} + {len(val_set)} pictures, {device} -> {run_dir}')
    bar = tqdm(total=settings.epochs * seen_per_epoch, initial=len(history) * seen_per_epoch, unit='img',
               unit_scale=True, dynamic_ncols=True, mininterval=0.5)
    for epoch in range(first_epoch, settings.epochs + 1):
        # All randomness of an epoch comes from (seed, epoch): a resumed run needs no saved generator states.
        epoch_seed = int(np.random.SeedSequence((settings.seed, epoch)).generate_state(1)[0])
        random_seed(epoch_seed)
        train_loader.generator.manual_seed(epoch_seed)
        bar.set_description(f'epoch {epoch}/{settings.epochs}')
        task.train()
        loss_sum, start = 0.0, time.perf_counter()
        for step, (images, targets) in enumerate(train_loader, (epoch - 1) * steps_per_epoch + 1):
            with autocast():
                loss = task(*place(images, targets))['loss']
            loss_value = loss.item()
            check_finite(loss_value, 'training', epoch, step)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if settings.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(task.get_clip_parameters(), settings.clip_grad)
            lr = max(group['lr'] for group in optimizer.param_groups)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step_update(step)
            task.update_ema(step)
            loss_sum += loss_value * len(images)
            bar.set_postfix(loss=f'{loss_value:.3f}', refresh=False)
            bar.update(len(images))
        seconds = time.perf_counter() - start
        train_seconds += seconds

        eval_model = task.get_eval_model(ema=settings.model_ema)
        eval_model.eval()
        evaluator = task.create_evaluator()
        for images, targets in val_loader:
            images, targets = place(images, targets)
            with torch.inference_mode(), autocast():
                evaluator.update(eval_model(images), targets)
        scores = evaluator.compute()
        check_finite(scores['loss'], 'evaluation', epoch, step)
        history.append({
            'epoch': epoch, 'lr': lr, 'train_loss': loss_sum / seen_per_epoch, 'eval_loss': scores['loss'],
            'eval_top1': scores['top1'], 'eval_top5': scores['top5'], 'images_per_second': seen_per_epoch / seconds,
        })
        best = max(history, key=rank)
        bar.write(f'epoch {epoch:>3}/{settings.epochs}  lr {lr:.2e}  training loss {loss_sum / seen_per_epoch:.4f}  '
                  f'held out: loss {scores["loss"]:.4f}  top-1 {scores["top1"]:.2f} %  top-5 {scores["top5"]:.2f} %  '
                  f'{seen_per_epoch / seconds:.0f} images/s{"  best" if best is history[-1] else ""}')
        if best is history[-1]:
            write_weights(run_dir / 'model.safetensors', unwrap_model(eval_model))
        write_metrics(run_dir, history)
        state = task.get_checkpoint_state() | (task.get_checkpoint_state(ema=True) if settings.model_ema else {})
        state |= {'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict(),
                  'scaler': scaler.state_dict(), 'epoch': epoch, 'best': best, 'history': history,
                  'train_seconds': train_seconds, 'facts': facts}
        # Written last: whatever is killed before it is done again, with the same result.
        write_file(run_dir / 'last' / 'checkpoint.pt', partial(torch.save, state))
    bar.close()

    best = max(history, key=rank)
    summary = {
        'model': settings.model, 'num_classes': len(class_names), 'best_epoch': best['epoch'], 'epochs': len(history),
        'top1': best['eval_top1'], 'top5': best['eval_top5'], 'loss': best['eval_loss'], 'seed': settings.seed,
        'train_seconds': train_seconds, 'device': str(device), 'torch': torch.__version__, 'timm': timm.__version__,
    }
    write_json(run_dir / 'summary.json', summary)
    print(f'best epoch {best["epoch"]}: top-1 {best["eval_top1"]:.2f} %. Load it with '
          f'timm.create_model(\'local-dir:{run_dir}\', pretrained=True)')
    return summary


if __name__ == '__main__':
    try:
        main(tyro.cli(Settings, description=__doc__))
    except SettingsError as error:
        print(f'finetune.py: {error}', file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f'finetune.py: {error}')
