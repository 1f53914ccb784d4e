"""A fine-tuning run from its settings to its summary: opens data, model and run folder, and trains."""
import copy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors import SafetensorError
from timm.utils import random_seed

from coatnet_train.data.config import is_stream
from coatnet_train.data.dataset import picture_name
from coatnet_train.data.digest import data_digest
from coatnet_train.models.open_model import open_model
from coatnet_train.plotting.plots import confusion_figure, misclassified_figure
from coatnet_train.runtime.accelerator import start, warn
from coatnet_train.runtime.cli import SettingsError, one_line
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.checkpoint import check_facts, read_checkpoint
from coatnet_train.training.config import FREE_ON_RESUME, Settings, check_values
from coatnet_train.training.distillation import open_teacher
from coatnet_train.training.fsdp import check_sharding, wrap
from coatnet_train.training.loaders import create_loaders, open_data
from coatnet_train.training.optimizer import build_optimizer
from coatnet_train.training.run_dir import find_run, loading_line, write_config, write_predictions
from coatnet_train.training.schedule import with_schedule
from coatnet_train.training.task import build_task, check_training, freeze_trunk, set_bn_momentum
from coatnet_train.training.trainer import Trainer

__all__ = ['finetune']


def check_tracker(settings: Settings) -> None:
    if settings.tracker and settings.tracker not in (known := [str(t) for t in get_available_trackers()]):
        raise SettingsError(f'--tracker must be the name of an installed tracker ({", ".join(known) or "none is"}), '
                            f'got {settings.tracker!r}; pip install it.')


def keep_precision(settings: Settings, checkpoint: dict | None) -> Settings:
    """A run that goes on ends in the precision it began in, whatever its recipe takes on this machine."""
    if checkpoint is None or not settings.amp_if_native:
        return settings
    amp = checkpoint['facts']['amp']
    if settings.amp and not amp:
        warn('--resume: the run began in float32 and goes on in it; start another --experiment for the mixed precision '
             'of the recipe.')
    return replace(settings, amp=amp, amp_if_native=False)


def finetune(settings: Settings) -> dict:
    """Fine-tune as `settings` say, and return the summary that is also written to summary.json."""
    check_values(settings)
    check_tracker(settings)
    run_dir, last = find_run(settings)
    checkpoint = read_checkpoint(last) if last else None
    settings = keep_precision(settings, checkpoint)
    accelerator = start(
        settings.device, settings.amp, settings.amp_dtype, may_shard=True, amp_if_native=settings.amp_if_native,
        gradient_accumulation_steps=settings.grad_accum_steps, log_with=settings.tracker or None,
        project_dir=run_dir if settings.tracker else None, dynamo_backend='inductor' if settings.torchcompile else None)
    settings = replace(settings, amp=accelerator.mixed_precision != 'no')
    try:
        trainer, class_names, headline = prepare(settings, accelerator, run_dir, checkpoint)
    except OSError as error:
        raise SettingsError(f'nothing was begun: {one_line(error)}; see --data-dir and --output {run_dir}.') from error
    settings = trainer.settings
    if settings.tracker:
        accelerator.init_trackers('coatnet_zoo', {name: str(value) for name, value in asdict(settings).items()})
    best, predictions = trainer.run(headline)

    summary = {
        'model': settings.model, 'num_classes': len(class_names), 'best_epoch': best['epoch'],
        'epochs': trainer.progress.epoch - 1, 'top1': best['eval_top1'], 'top5': best['eval_top5'],
        'loss': best['eval_loss'], 'seed': settings.seed, 'train_seconds': trainer.progress.train_seconds,
        'unreadable': [*trainer.bad_train.names(), *trainer.bad_val.names()],
        'processes': accelerator.num_processes, 'precision': settings.amp_dtype if settings.amp else 'float32',
        **provenance(accelerator.device.type)}
    if accelerator.is_main_process:
        write_json(run_dir / 'summary.json', summary)
        write_figure(run_dir / 'confusion.png', confusion_figure(
            predictions.labels, predictions.top5[:, 0], class_names))
        held_out = trainer.val_loader.dataset.dataset
        files = [picture_name(held_out, index) for index in range(len(predictions.labels))]
        write_predictions(run_dir, files, class_names, predictions)
        write_figure(run_dir / 'misclassified.png', misclassified_figure(
            predictions.wrong, ['' if item.index is None else Path(files[item.index]).name for item in
                                predictions.wrong],
            class_names, trainer.data_config['mean'], trainer.data_config['std']))
        print(f'best epoch {best["epoch"]}: top-1 {best["eval_top1"]:.2f} %. Load it with\n{loading_line(run_dir)}')
    accelerator.end_training()
    return summary


def prepare(settings: Settings, accelerator: Accelerator, run_dir: Path,
            checkpoint: dict | None) -> tuple[Trainer, list[str], str]:
    """Open data, model and run folder; what cannot work ends here. Returns also class names and a line of facts."""
    check_sharding(settings, accelerator)
    train_set, val_set, class_names = open_data(settings)
    settings = with_schedule(settings, len(train_set), accelerator.num_processes)
    check_values(settings)
    random_seed(settings.seed)
    model, data_config = open_model(
        settings, settings.initial_checkpoint, '--initial-checkpoint', use_train_size=True,
        try_sizes=settings.train_img_sizes, num_classes=len(class_names), drop_rate=settings.drop,
        drop_path_rate=settings.drop_path, dropconnect=settings.dropconnect)
    loaders = create_loaders(settings, train_set, val_set, data_config, accelerator)
    free = (*FREE_ON_RESUME, *(() if is_stream(settings) else ('workers',)))  # streams share out by them
    facts = {name: value for name, value in asdict(settings).items() if name not in free}
    facts |= {f'digest_of_{name}_images': data_digest(dataset, class_names, accelerator)
              for name, dataset in (('train', train_set), ('val', val_set))}
    facts |= {'classes': class_names, 'train_images': len(train_set), 'val_images': len(val_set),
              'processes': accelerator.num_processes, 'sharded': accelerator.is_fsdp2}
    if checkpoint:
        check_facts(checkpoint, run_dir, facts)
    if settings.bn_momentum is not None:
        set_bn_momentum(model, settings.bn_momentum)
    if settings.freeze_trunk:
        freeze_trunk(model)
    check_training(settings, model, data_config)
    model.to(accelerator.device)
    optimizer = build_optimizer(settings, model, settings.batch_size * accelerator.num_processes)
    teacher = open_teacher(settings, class_names, data_config) if settings.teacher else None
    if accelerator.is_main_process:
        try:
            (run_dir / 'last').mkdir(parents=True, exist_ok=True)
            write_json(run_dir / 'args.json', asdict(settings))
            write_config(run_dir / 'config.json', model, class_names, data_config)
        except (OSError, SafetensorError) as error:
            raise SettingsError(f'--output {run_dir} cannot be written: {one_line(error)}; choose another.') from error
    if settings.channels_last and not accelerator.is_fsdp2:  # which shards contiguous weights alone
        model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing()
    task = build_task(settings, model, teacher, data_config, accelerator.device)
    if settings.model_ema:
        task.setup_ema(settings.model_ema_decay, use_warmup=True)  # so that a short run is not stuck near its start
    whole_model = copy.deepcopy(model) if accelerator.is_fsdp2 else None
    task.trainable_module, optimizer = wrap(accelerator, task.trainable_module, optimizer)
    trainer = Trainer(
        settings, accelerator, task, whole_model, optimizer, loaders, data_config, len(class_names), run_dir, facts)
    if checkpoint:
        trainer.restore(checkpoint)
    if settings.decode_once:
        for loader in loaders[:2]:
            loader.dataset.load()
    headline = (
        f'{settings.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
        f'{len(class_names)} classes, {len(train_set)} + {len(val_set)} pictures, '
        f'{accelerator.device} x {accelerator.num_processes} -> {run_dir}')
    return trainer, class_names, headline
