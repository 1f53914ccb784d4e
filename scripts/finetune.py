"""Fine-tune any timm or zoo model on a folder of pictures, a torchvision data set, or one of the Hugging Face Hub.

    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20
    python scripts/finetune.py --data-dir data --dataset torch/cifar10 --dataset-download --model resnet18 --pretrained
    python scripts/finetune.py --data-dir flowers --model coatnet_pico_64 --epochs 20 --resume auto
    torchrun --nproc-per-node 8 scripts/finetune.py --recipe coatnet_in1k --data-dir imagenet --model coatnet_0

The folder has train/ and val/ (or validation/, test/), with one sub-folder per class in each. The run goes to
OUTPUT/EXPERIMENT: best weights with their config, metrics.csv, curves.png, confusion.png, misclassified.png and
summary.json. Once `coatnet_zoo` is imported, `timm.create_model('local-dir:OUTPUT/EXPERIMENT', pretrained=True)`
loads it. Exit codes: 2 for a setting that cannot work, 75 when a SIGTERM was answered by saving (--resume auto goes
on from there), 1 for a loss that is not finite.
"""

import argparse
import dataclasses
import json
import math
import pickle
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast
from evaluation import Predictions, predict
from open_model import ModelSettings, check_model_settings, open_model
from pictures import (
    BadPictures,
    DataSettings,
    EpochSampler,
    Pictures,
    StreamedPictures,
    batches,
    is_stream,
    open_pictures,
    seed_of,
    targets_of,
)
from plots import confusion_figure, misread_figure
from processes import start
from provenance import provenance
from recipes import RECIPES, settings_of
from run_folder import rank, write_config, write_figure, write_file, write_json, write_metrics, write_weights
from safetensors.torch import load_file
from settings import SettingsError, check_range, end_with_sentence, flag, one_line
from timm.data import Mixup, create_transform
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed, unwrap_model
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from training import build_optimizer, build_task, freeze_trunk, open_teacher, set_trunk_to_eval

PREEMPTED = 75  # exit code: stopped by SIGTERM, everything saved


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, DataSettings):
    recipe: str = ''  # Settings by name, see scripts/recipes.py; flags given beside it win.
    train_split: str = 'train'  # Name of the training split.
    val_split: str = 'validation'  # Name of the split that picks the best epoch.
    train_num_samples: int | None = None  # Training pictures of a stream that does not say it.
    val_num_samples: int | None = None  # Held-out pictures of such a stream.
    max_bad_images: float = 0.001  # Share of unreadable pictures that is reported and skipped before the run stops.
    class_balanced: bool = False  # Draw every class equally often.
    initial_checkpoint: str = ''  # Start from this file of weights, whose classes must be the data's.

    batch_size: int = 64  # Pictures per training step and process.
    validation_batch_size: int | None = None  # Pictures per evaluation step (--batch-size if not given).
    grad_accum_steps: int = 1  # Steps whose gradients are added up before the weights change.
    epochs: int = 10  # Passes over the training split.
    patience: int | None = None  # Stop after this many epochs without a better one.
    opt: str = 'adamw'  # Any name of timm.optim.list_optimizers().
    lr: float = 5e-4  # Highest learning rate.
    lr_base_size: int | None = None  # If given, --lr is for this many pictures a weight update, and scaled to theirs.
    weight_decay: float = 0.05  # Weight decay; not applied to biases and norms.
    momentum: float = 0.9  # Momentum of the optimizers that have one.
    layer_decay: float | None = None  # Factor on the learning rate per layer, counted from the classifier.
    head_lr_scale: float = 1.0  # Factor on the learning rate of the classifier.
    freeze_trunk: bool = False  # Train the classifier alone.
    clip_grad: float | None = 1.0  # Largest norm of the gradient.
    warmup_epochs: float = 1.0  # Epochs of linear warm-up, in place of the start of the cosine decay.
    warmup_lr: float = 1e-6  # Learning rate at the start of the warm-up.
    min_lr: float = 1e-6  # Learning rate at the end.

    smoothing: float = 0.1  # Label smoothing.
    drop: float | None = None  # Dropout before the classifier.
    drop_path: float | None = None  # Stochastic depth.
    dropconnect: float | None = None  # Rate at which LightConv and DynamicConv drop weights.
    train_img_sizes: tuple[int, ...] = ()  # Progressive sizes in pixels, each for an equal share of the epochs.
    scale: tuple[float, float] = (0.08, 1.0)  # Area of the random crop, as a share of the picture.
    hflip: float = 0.5  # Probability of a horizontal flip.
    color_jitter: float = 0.4  # Strength of random brightness, contrast and saturation.
    aa: str | None = None  # AutoAugment policy, such as rand-m9-mstd0.5-inc1.
    reprob: float = 0.0  # Probability of random erasing.
    mixup: float = 0.0  # Alpha of mixup; 0 leaves it out.
    cutmix: float = 0.0  # Alpha of cutmix; 0 leaves it out.
    mixup_prob: float = 1.0  # Probability of mixing a batch.
    mixup_switch_prob: float = 0.5  # Probability of cutmix where both are on.
    mixup_off_epoch: int = 0  # Stop mixing after this epoch; 0 never.

    teacher: str = ''  # Distil from this model, as --model names them: with weights, and with the data's classes.
    kd_loss_weight: float = 0.5  # Share of the teacher in the loss.
    kd_temperature: float = 1.0  # Divides the logits of both before they are compared.

    model_ema: bool = False  # Evaluate and release an exponential moving average of the weights.
    model_ema_decay: float = 0.9998  # Its decay, approached from 0 over the first steps.
    amp: bool = False  # Mixed precision.
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.
    channels_last: bool = True  # Memory format of pictures and weights.
    grad_checkpointing: bool = False  # Compute activations twice instead of keeping them.
    torchcompile: bool = False  # Compile the model.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    seed: int = 42  # Fixes weights, order and augmentation; bit for bit on a CPU.

    output: str = 'output'  # Parent of the run folders.
    experiment: str = ''  # Name of the run folder (the model's name if not given).
    resume: str = ''  # auto continues the run folder if it has begun; a path continues that run folder.
    recovery_interval: int = 0  # Also save every so many weight updates; 0 saves after epochs and on SIGTERM only.
    tracker: str = ''  # tensorboard, wandb or trackio; metrics.csv is written in any case.


# Settings that may differ when a run is resumed: they change where it is, not what it computes.
FREE_ON_RESUME = (
    'recipe', 'dataset_download', 'output', 'experiment', 'resume', 'device', 'recovery_interval', 'tracker',
    'max_bad_images')


class Preempted(Exception):
    """SIGTERM came, and the run is saved."""


@dataclass
class Progress:
    """How far a run is: what its checkpoint holds beside weights and optimizer."""

    epoch: int = 1  # the one under way
    batch: int = 0  # batches of it that are done
    updates: int = 0  # of the weights, since the start
    loss_sum: float = 0.0  # over the pictures of this epoch
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    bad_train: list[int] = field(default_factory=list)  # places of unreadable pictures
    bad_val: list[int] = field(default_factory=list)


def check_values(settings: Settings) -> None:
    """Refuse single values that cannot work, before anything is read."""
    for name in ('epochs', 'batch_size', 'validation_batch_size', 'lr', 'clip_grad', 'grad_accum_steps', 'patience',
                 'lr_base_size', 'kd_temperature', 'train_num_samples', 'val_num_samples'):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise SettingsError(f'{flag(name)} must be greater than 0, got {value}.')
    for name in ('workers', 'warmup_lr', 'weight_decay', 'head_lr_scale', 'mixup', 'cutmix', 'recovery_interval',
                 'mixup_off_epoch'):
        if not getattr(settings, name) >= 0:
            raise SettingsError(f'{flag(name)} must be at least 0, got {getattr(settings, name)}.')
    for name, least, most in (
            ('smoothing', 0, 0.999), ('hflip', 0, 1), ('reprob', 0, 1), ('color_jitter', 0, math.inf),
            ('momentum', 0, 1), ('model_ema_decay', 0, 1), ('layer_decay', 1e-6, 1), ('seed', 0, 2**32 - 1),
            ('warmup_epochs', 0, settings.epochs), ('min_lr', 0, settings.lr), ('max_bad_images', 0, 1),
            ('mixup_prob', 0, 1), ('mixup_switch_prob', 0, 1), ('kd_loss_weight', 0, 1)):
        check_range(settings, name, least, most)
    if not 0 < settings.scale[0] <= settings.scale[1] <= 1:
        raise SettingsError(f'--scale must be two rising shares of the picture from 0 to 1, got {settings.scale}.')
    if (settings.mixup or settings.cutmix) and settings.batch_size % 2:
        raise SettingsError(f'--batch-size must be even with --mixup or --cutmix, got {settings.batch_size}.')
    if any(size <= 0 for size in settings.train_img_sizes) or len(settings.train_img_sizes) > settings.epochs:
        raise SettingsError(f'--train-img-sizes must be positive and no more than the {settings.epochs} epochs, '
                            f'got {settings.train_img_sizes}.')
    if settings.freeze_trunk and settings.layer_decay is not None:
        raise SettingsError('--layer-decay has no layers to act on with --freeze-trunk; leave one of them out.')
    if settings.tracker and settings.tracker not in (known := [str(t) for t in get_available_trackers()]):
        raise SettingsError(f'--tracker must be the name of an installed tracker ({", ".join(known) or "none is"}), '
                            f'got {settings.tracker!r}; pip install it.')
    if settings.class_balanced and is_stream(settings):
        raise SettingsError('--class-balanced needs all labels before the start, which a stream does not have.')
    check_model_settings(settings)


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


def open_data(settings: Settings) -> tuple[Dataset, Dataset, list[str]]:
    """Open both splits and check that their classes agree with each other and with --num-classes."""
    shared = dict(batch_size=settings.batch_size, seed=settings.seed, num_classes=settings.num_classes)
    train_set, class_names = open_pictures(
        settings, settings.train_split, is_training=True, num_samples=settings.train_num_samples, **shared)
    val_set, val_names = open_pictures(settings, settings.val_split, num_samples=settings.val_num_samples, **shared)
    if differing := sorted(set(class_names) ^ set(val_names)):
        raise SettingsError(f'--data-dir {settings.data_dir}: both splits must have the same classes, but '
                            f'{", ".join(differing)} are in one only; add pictures or remove the folders.')
    if '' in class_names:
        raise SettingsError(f'--data-dir {settings.data_dir}: every picture must lie in the folder of its class, but '
                            f'some lie beside these folders; move them.')
    if len(class_names) < 2:
        raise SettingsError(f'--data-dir {settings.data_dir}: at least 2 classes are needed, found {len(class_names)}; '
                            f'put the pictures of each class into a sub-folder of its own.')
    if settings.num_classes not in (None, len(class_names)):
        raise SettingsError(f'--num-classes must be the number of classes in the data, {len(class_names)}, '
                            f'got {settings.num_classes}; leave it out to take it from the data.')
    return train_set, val_set, class_names


def training_transform(settings: Settings, data_config: dict, size: int | None = None) -> object:
    """timm's augmentation at the model's size, or at a size in pixels."""
    shape = data_config['input_size'] if size is None else (data_config['input_size'][0], size, size)
    return create_transform(
        shape, is_training=True, interpolation=data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], scale=settings.scale, hflip=settings.hflip, color_jitter=settings.color_jitter,
        auto_augment=settings.aa, re_prob=settings.reprob, re_mode='pixel')


def create_loaders(settings: Settings, train_set: Dataset, val_set: Dataset, data_config: dict,
                   accelerator: Accelerator) -> tuple[DataLoader, DataLoader, EpochSampler | None]:
    """Loaders over both splits, whose batches the processes share, and the sampler that decides the order."""
    try:
        transforms = training_transform(settings, data_config), create_transform(**data_config)
    except (ValueError, KeyError, AssertionError) as error:
        raise SettingsError(f'--aa, --interpolation or another setting of the pictures: {one_line(error)}.') from error
    mode = 'RGB' if settings.in_chans == 3 else 'L'
    shared = dict(workers=settings.workers, pin_memory=accelerator.device.type == 'cuda')
    val_batch = settings.validation_batch_size or settings.batch_size
    if is_stream(settings):  # timm's streams share their pictures out themselves
        train, val = (StreamedPictures(dataset, transform, settings.seed, accelerator.process_index)
                      for dataset, transform in zip((train_set, val_set), transforms, strict=True))
        return (batches(train, None, settings.batch_size, drop_last=True, **shared),
                batches(val, None, val_batch, **shared), None)
    train = Pictures(train_set, transforms[0], settings.seed, mode, substitute=True)
    val = Pictures(val_set, transforms[1], settings.seed, mode)
    targets = targets_of(train_set) if settings.class_balanced else None
    sampler = EpochSampler(len(train), settings.seed, shuffle=True, targets=targets)
    batch = settings.batch_size * accelerator.num_processes
    odd = len(train) % 2 and (settings.mixup or settings.cutmix)
    if len(train) < batch and (accelerator.num_processes > 1 or odd):
        raise SettingsError(f'--batch-size {settings.batch_size} in {accelerator.num_processes} processes must be at '
                            f'most the {len(train)} training pictures; give a smaller one.')
    loaders = (batches(train, sampler, batch, drop_last=len(train) > batch, **shared),
               batches(val, EpochSampler(len(val)), val_batch * accelerator.num_processes, **shared))
    return *accelerator.prepare(*loaders), sampler


def main(settings: Settings) -> dict:
    """Fine-tune as `settings` say, and return the summary that is also written to summary.json."""
    check_values(settings)
    run_dir, last = find_run(settings)
    accelerator = start(
        settings.device, settings.amp, settings.amp_dtype, gradient_accumulation_steps=settings.grad_accum_steps,
        log_with=settings.tracker or None, project_dir=run_dir if settings.tracker else None,
        dynamo_backend='inductor' if settings.torchcompile else None)
    writes, device = accelerator.is_main_process, accelerator.device
    train_set, val_set, class_names = open_data(settings)
    random_seed(settings.seed)
    model, data_config = open_model(
        settings, settings.initial_checkpoint, '--initial-checkpoint', use_train_size=True,
        try_sizes=settings.train_img_sizes, num_classes=len(class_names), drop_rate=settings.drop,
        drop_path_rate=settings.drop_path, dropconnect=settings.dropconnect)
    train_loader, val_loader, sampler = create_loaders(settings, train_set, val_set, data_config, accelerator)
    facts = {name: value for name, value in asdict(settings).items() if name not in FREE_ON_RESUME}
    facts |= {'classes': class_names, 'train_images': len(train_set), 'val_images': len(val_set),
              'processes': accelerator.num_processes}
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file they are compared with

    try:
        checkpoint = torch.load(last, map_location='cpu', weights_only=True) if last else None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise SettingsError(f'--resume: {last} cannot be read: {one_line(error)}; start another '
                            f'--experiment.') from error
    if last and (changed := [f'{name} was {value}, is {facts.get(name)}'
                             for name, value in checkpoint['facts'].items() if facts.get(name) != value]):
        raise SettingsError(f'--resume {run_dir} needs the settings the run began with, but {"; ".join(changed)}; '
                            f'restore them, or start another --experiment.')
    if settings.freeze_trunk:
        freeze_trunk(model)
    optimizer = build_optimizer(settings, model.to(device), settings.batch_size * accelerator.num_processes)
    teacher = open_teacher(settings, class_names, data_config) if settings.teacher else None
    if writes:
        try:
            (run_dir / 'last').mkdir(parents=True, exist_ok=True)
            write_json(run_dir / 'args.json', asdict(settings))
        except OSError as error:
            raise SettingsError(f'--output {run_dir} cannot be written: {one_line(error)}; choose another.') from error
        write_config(run_dir / 'config.json', model, class_names, data_config)

    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing()
    task = build_task(settings, model, teacher, data_config, device)
    if settings.model_ema:
        task.setup_ema(settings.model_ema_decay, use_warmup=True)  # so that a short run is not stuck near its start
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)

    steps_per_epoch = len(train_loader) - len(train_loader) % settings.grad_accum_steps * (sampler is None)
    if not steps_per_epoch:
        raise SettingsError(f'--grad-accum-steps {settings.grad_accum_steps} must be at most the {len(train_loader)} '
                            f'batches of an epoch.')
    scheduler, _ = create_scheduler_v2(
        optimizer.optimizer, 'cosine', num_epochs=settings.epochs, warmup_epochs=settings.warmup_epochs,
        min_lr=settings.min_lr * optimizer.optimizer.defaults['lr'] / settings.lr, warmup_lr=settings.warmup_lr,
        step_on_epochs=False, updates_per_epoch=math.ceil(steps_per_epoch / settings.grad_accum_steps))
    mixup = Mixup(
        settings.mixup, settings.cutmix, prob=settings.mixup_prob, switch_prob=settings.mixup_switch_prob,
        label_smoothing=settings.smoothing, num_classes=len(class_names)) if settings.mixup or settings.cutmix else None

    progress = Progress()
    if checkpoint:
        task.load_checkpoint_state(checkpoint['state_dict'])
        if settings.model_ema:
            task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
        optimizer.load_state_dict(checkpoint['optimizer'])
        scheduler.load_state_dict(checkpoint['scheduler'])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(checkpoint['scaler'])
        progress = Progress(**checkpoint['progress'])
        del checkpoint

    def save() -> None:
        """Written last of all: whatever is killed before it is done again, with the same result."""
        progress.bad_train, progress.bad_val = sorted(bad_train.found), sorted(bad_val.found)
        if writes:
            state = task.get_checkpoint_state() | (task.get_checkpoint_state(ema=True) if settings.model_ema else {})
            state |= {'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict(), 'facts': facts,
                      'scaler': accelerator.scaler.state_dict() if accelerator.scaler else None,
                      'progress': asdict(progress)}
            write_file(run_dir / 'last' / 'checkpoint.pt', partial(write_state, state))

    def evaluate(keep_wrong: int = 0) -> Predictions:
        model = unwrap_model(eval_model)  # DDP would wait for a process that has fewer batches
        for buffer in model.buffers() if accelerator.num_processes > 1 else ():
            broadcast(buffer)  # what the first process releases
        return predict(model, val_loader, accelerator, on_batch=bad_val.add, keep_wrong=keep_wrong)

    def check_finite(value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            saved = run_dir / 'last' / 'checkpoint.pt'
            raise FloatingPointError(
                f'{what} is {value} at step {(progress.epoch - 1) * steps_per_epoch + step} '
                f'(epoch {progress.epoch}): start another --experiment with a lower --lr; '
                f'the last good checkpoint is {saved if saved.exists() else "none, no epoch was finished"}.')

    pictures_per_step = settings.batch_size * accelerator.num_processes
    padded = sampler is not None and len(train_set) <= pictures_per_step  # one batch, smaller than a full one
    seen_per_epoch = len(train_set) if padded else steps_per_epoch * pictures_per_step
    bar = tqdm(total=settings.epochs * seen_per_epoch, unit='img', unit_scale=True, dynamic_ncols=True, mininterval=0.5,
               initial=min(((progress.epoch - 1) * steps_per_epoch + progress.batch) * pictures_per_step,
                           settings.epochs * seen_per_epoch), disable=not writes)
    say = bar.write if writes else lambda _: None
    say(f'{settings.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
        f'{len(class_names)} classes, {len(train_set)} + {len(val_set)} pictures, '
        f'{device} x {accelerator.num_processes} -> {run_dir}')
    bad_train = BadPictures(train_set, settings.max_bad_images, say)
    bad_val = BadPictures(val_set, settings.max_bad_images, say)
    bad_train.found, bad_val.found = set(progress.bad_train), set(progress.bad_val)
    if settings.tracker:
        accelerator.init_trackers('coatnet_zoo', {name: str(value) for name, value in asdict(settings).items()})
    eval_model = task.get_eval_model(ema=settings.model_ema)
    previous = signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    try:
        while progress.epoch <= settings.epochs and not out_of_patience(settings, progress.history):
            epoch = progress.epoch
            if settings.train_img_sizes:  # before the workers start
                share = (epoch - 1) * len(settings.train_img_sizes) // settings.epochs
                train_loader.dataset.transform = training_transform(
                    settings, data_config, settings.train_img_sizes[share])
            if sampler is not None:
                sampler.epoch, sampler.start = epoch, progress.batch * pictures_per_step
                stream = iter(train_loader)
            else:
                train_loader.dataset.epoch = epoch
                train_loader.dataset.dataset.set_epoch(epoch)
                stream = islice(train_loader, progress.batch, steps_per_epoch)
            if mixup:
                mixup.mixup_enabled = not settings.mixup_off_epoch or epoch <= settings.mixup_off_epoch
            bar.set_description(f'epoch {epoch}/{settings.epochs}')
            task.train()
            if settings.freeze_trunk:
                set_trunk_to_eval(unwrap_model(task.trainable_module))
            begun = time.perf_counter()
            for images, targets, bad in stream:
                bad_train.add(accelerator.gather(bad.to(device)))
                images = images.to(device, memory_format=memory_format, non_blocking=True)
                targets = targets.to(device, non_blocking=True)
                # All randomness of a step comes from (seed, epoch, batch): nothing to save but where we are.
                random_seed(seed_of(settings.seed, epoch, progress.batch), accelerator.process_index)
                if mixup:
                    images, targets = mixup(images, targets)
                with accelerator.accumulate(task.trainable_module):
                    with accelerator.autocast():
                        loss = task(images, targets)['loss']
                    loss_value = accelerator.reduce(loss.detach().clone(), 'mean').item()
                    check_finite(loss_value, 'training loss', progress.batch + 1)
                    accelerator.backward(loss)
                    if settings.clip_grad is not None and accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(task.get_clip_parameters(), settings.clip_grad)
                        if not accelerator.scaler:  # which would leave this step out
                            check_finite(float(norm), 'gradient norm of the training loss', progress.batch + 1)
                    lr = max(group['lr'] for group in optimizer.param_groups)
                    optimizer.step()
                    optimizer.zero_grad()
                count = len(images) * accelerator.num_processes
                progress.loss_sum += loss_value * count
                progress.batch += 1
                bar.set_postfix(loss=f'{loss_value:.3f}', refresh=False)
                bar.update(count)
                if accelerator.sync_gradients:
                    progress.updates += 1
                    scheduler.step_update(progress.updates)
                    task.update_ema(progress.updates)
                    due = settings.recovery_interval and progress.updates % settings.recovery_interval == 0
                    stop = accelerator.check_trigger()
                    if progress.batch < steps_per_epoch and (due or stop):
                        progress.epoch_seconds += time.perf_counter() - begun
                        begun = time.perf_counter()
                        save()
                    if stop:
                        if progress.batch < steps_per_epoch:
                            raise Preempted(f'stopped by SIGTERM in epoch {epoch}, saved after batch {progress.batch}')
                        accelerator.set_trigger()  # the epoch is done: evaluate, save, and stop then
            progress.epoch_seconds += time.perf_counter() - begun
            progress.train_seconds += progress.epoch_seconds

            scores = evaluate().scores
            check_finite(scores['loss'], 'evaluation loss', progress.batch)
            speed = progress.batch * pictures_per_step / progress.epoch_seconds
            row = {
                'epoch': epoch, 'lr': lr, 'train_loss': progress.loss_sum / seen_per_epoch, 'eval_loss': scores['loss'],
                'eval_top1': scores['top1'], 'eval_top5': scores['top5'], 'images_per_second': speed}
            progress.history.append(row)
            best = max(progress.history, key=rank)
            say(f'epoch {epoch:>3}/{settings.epochs}  lr {lr:.2e}  training loss {row["train_loss"]:.4f}  '
                f'held out: loss {scores["loss"]:.4f}  top-1 {scores["top1"]:.2f} %  top-5 {scores["top5"]:.2f} %  '
                f'{speed:.0f} images/s{"  best" if best is row else ""}')
            if settings.tracker:
                accelerator.log(row, step=epoch)
            if writes:
                if best is row:
                    write_weights(run_dir / 'model.safetensors', unwrap_model(eval_model).state_dict())
                write_metrics(run_dir, progress.history)
            progress.epoch, progress.batch, progress.loss_sum, progress.epoch_seconds = epoch + 1, 0, 0.0, 0.0
            save()
            if accelerator.check_trigger() and progress.epoch <= settings.epochs:
                raise Preempted(f'stopped by SIGTERM, saved after epoch {epoch}')

        # The released file once more, from disk: the pictures show what it does.
        unwrap_model(eval_model).load_state_dict(load_file(run_dir / 'model.safetensors'))
        predictions = evaluate(keep_wrong=24)
    finally:
        signal.signal(signal.SIGTERM, previous)
        bar.close()

    best = max(progress.history, key=rank)
    summary = {
        'model': settings.model, 'num_classes': len(class_names), 'best_epoch': best['epoch'],
        'epochs': len(progress.history), 'top1': best['eval_top1'], 'top5': best['eval_top5'],
        'loss': best['eval_loss'], 'seed': settings.seed, 'train_seconds': progress.train_seconds,
        'unreadable': [*bad_train.names(), *bad_val.names()],
        'processes': accelerator.num_processes, **provenance(device.type)}
    if writes:
        write_json(run_dir / 'summary.json', summary)
        write_figure(run_dir / 'confusion.png', confusion_figure(
            predictions.labels, predictions.top5[:, 0], class_names))
        write_figure(run_dir / 'misclassified.png', misread_figure(
            predictions.wrong, class_names, data_config['mean'], data_config['std']))
        print(f'best epoch {best["epoch"]}: top-1 {best["eval_top1"]:.2f} %. Load it with '
              f'timm.create_model(\'local-dir:{run_dir}\', pretrained=True)')
    accelerator.end_training()
    return summary


def write_state(state: dict, path: Path) -> None:
    with path.open('wb') as file:  # to a path of its own torch.save hides a full disk behind a RuntimeError
        torch.save(state, file)


def out_of_patience(settings: Settings, history: list[dict]) -> bool:
    """Whether --patience epochs have passed since the best one."""
    return bool(settings.patience and history and len(history) - max(history, key=rank)['epoch'] >= settings.patience)


def read_settings(arguments: list[str] | None = None) -> Settings:
    """The command line, over the settings of --recipe if there is one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--recipe', default='')
    first.add_argument('--model', default='')
    given, _ = first.parse_known_args(arguments)
    default = dict(model=tyro.MISSING)
    if given.recipe:
        if given.recipe not in RECIPES:
            raise SettingsError(f'--recipe must be one of {", ".join(RECIPES)}, got {given.recipe!r}.')
        default |= settings_of(given.recipe, given.model)
    return tyro.cli(Settings, args=arguments, default=dataclasses.replace(Settings(model=''), **default),
                    description=__doc__)


if __name__ == '__main__':
    try:
        end_with_sentence('finetune.py', lambda: main(read_settings()))
    except Preempted as reason:
        print(f'finetune.py: {reason}; --resume auto goes on from there.', file=sys.stderr)
        sys.exit(PREEMPTED)
    except FloatingPointError as error:
        sys.exit(f'finetune.py: {error}')
    except OSError as error:
        sys.exit(f'finetune.py: {one_line(error)}; nothing saved before is lost, --resume auto goes on from there.')
