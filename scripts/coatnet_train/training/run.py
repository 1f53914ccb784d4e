"""A fine-tuning run: settings -> datasets, loaders, model and task -> trainer -> files of the run directory."""
import copy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors import SafetensorError
from timm.utils import random_seed

from coatnet_train.data.dataset import image_name
from coatnet_train.evaluation.evaluator import Predictions
from coatnet_train.models.open_model import open_model
from coatnet_train.plotting.plots import confusion_figure, misclassified_figure
from coatnet_train.runtime.accelerator import create_accelerator, warn
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.checkpoint import check_resume_signature, read_checkpoint, resume_signature
from coatnet_train.training.config import FinetuneSettings, check_values
from coatnet_train.training.distillation import check_teacher_classes, check_teacher_input, create_teacher
from coatnet_train.training.fsdp import check_fsdp, prepare_model
from coatnet_train.training.loaders import create_datasets, create_loaders
from coatnet_train.training.optimizer import build_optimizer
from coatnet_train.training.run_dir import find_run, loading_line, write_config, write_predictions
from coatnet_train.training.schedule import with_schedule
from coatnet_train.training.task import build_task, check_training, freeze_trunk, set_bn_momentum
from coatnet_train.training.teacher_outputs import open_outputs
from coatnet_train.training.trainer import Trainer

__all__ = ['finetune']


def finetune(settings: FinetuneSettings) -> dict:
    """Fine-tune a model, and return the summary that is also written to summary.json."""
    check_values(settings)
    check_tracker(settings)
    run_dir, last = find_run(settings)
    checkpoint = read_checkpoint(last) if last else None
    settings = keep_precision(settings, checkpoint)
    accelerator = create_accelerator(
        settings.device, settings.amp, settings.amp_dtype, may_shard=True, amp_if_native=settings.amp_if_native,
        gradient_accumulation_steps=settings.grad_accum_steps, log_with=settings.tracker or None,
        project_dir=run_dir if settings.tracker else None, dynamo_backend='inductor' if settings.torchcompile else None)
    settings = replace(settings, amp=accelerator.mixed_precision != 'no')
    try:
        trainer, class_names, summary_line = create_trainer(settings, accelerator, run_dir, checkpoint)
    except OSError as error:
        raise ConfigError(f'nothing was begun: {one_line(error)}; see --data-dir and --output {run_dir}.') from error
    settings = trainer.settings
    if settings.tracker:
        accelerator.init_trackers('coatnet_zoo', {name: str(value) for name, value in asdict(settings).items()})
    best, predictions = trainer.run(summary_line)
    outputs = getattr(trainer.train_loader.dataset, 'outputs', None)  # streams have none
    summary = {
        'model': settings.model, 'num_classes': len(class_names), 'best_epoch': best['epoch'],
        'epochs': trainer.progress.epoch - 1, 'top1': best['eval_top1'], 'top5': best['eval_top5'],
        'loss': best['eval_loss'], 'seed': settings.seed, 'train_seconds': trainer.progress.train_seconds,
        'teacher': settings.teacher or getattr(outputs, 'teacher', None),
        'unreadable': [*trainer.unreadable_train.names(), *trainer.unreadable_val.names()],
        'processes': accelerator.num_processes, 'precision': settings.amp_dtype if settings.amp else 'float32',
        **provenance(accelerator.device.type)}
    if accelerator.is_main_process:
        write_json(run_dir / 'summary.json', summary)
        write_final_files(run_dir, trainer, class_names, predictions)
        print(f'best epoch {best["epoch"]}: top-1 {best["eval_top1"]:.2f} %. Load it with\n{loading_line(run_dir)}')
    accelerator.end_training()
    return summary


def check_tracker(settings: FinetuneSettings) -> None:
    if settings.tracker and settings.tracker not in (known := [str(t) for t in get_available_trackers()]):
        raise ConfigError(f'--tracker must be the name of an installed tracker ({", ".join(known) or "none is"}), '
                          f'got {settings.tracker!r}; pip install it.')


def keep_precision(settings: FinetuneSettings, checkpoint: dict | None) -> FinetuneSettings:
    """Resume in the precision that the run began in, even if the recipe would take another on this machine."""
    if checkpoint is None or not settings.amp_if_native:
        return settings
    amp = checkpoint['resume_signature']['amp']
    if settings.amp and not amp:
        warn('--resume: the run began in float32 and goes on in it; start another --experiment for the mixed precision '
             'of the recipe.')
    return replace(settings, amp=amp, amp_if_native=False)


def create_trainer(settings: FinetuneSettings, accelerator: Accelerator, run_dir: Path,
                   checkpoint: dict | None) -> tuple[Trainer, list[str], str]:
    """Create datasets, loaders, model and run directory; invalid configurations fail here.

    Returns:
        The trainer, the class names in label order, and a summary line to print.
    """
    check_fsdp(settings, accelerator)
    train_set, val_set, class_names = create_datasets(settings)
    settings = with_schedule(settings, len(train_set), accelerator.num_processes)
    check_values(settings)
    random_seed(settings.seed)
    model, data_config = open_model(
        settings, settings.initial_checkpoint, '--initial-checkpoint', use_train_size=True,
        try_sizes=settings.train_img_sizes, num_classes=len(class_names), drop_rate=settings.drop,
        drop_path_rate=settings.drop_path, dropconnect=settings.dropconnect)
    signature = resume_signature(settings, train_set, val_set, class_names, accelerator)
    outputs = None
    if settings.teacher_outputs:
        outputs = open_outputs(settings, data_config, class_names, signature['digest_of_train_images'], accelerator)
        signature['teacher_outputs'] = outputs.digest
    loaders = create_loaders(settings, train_set, val_set, data_config, accelerator, outputs)
    if checkpoint:
        check_resume_signature(checkpoint, run_dir, signature)
    if settings.bn_momentum is not None:
        set_bn_momentum(model, settings.bn_momentum)
    if settings.freeze_trunk:
        freeze_trunk(model)
    check_training(settings, model, data_config)
    model.to(accelerator.device)
    optimizer = build_optimizer(settings, model, settings.batch_size * accelerator.num_processes)
    teacher = None
    if settings.teacher:
        teacher, teacher_config = create_teacher(
            settings.teacher, img_size=settings.teacher_img_size, in_chans=settings.in_chans)
        check_teacher_input(teacher, settings.teacher, teacher_config['input_size'][0], data_config['input_size'],
                            settings.train_img_sizes, student=settings.model)
        check_teacher_classes(teacher, settings.teacher, class_names)
    if accelerator.is_main_process:
        try:
            (run_dir / 'last').mkdir(parents=True, exist_ok=True)
            write_json(run_dir / 'args.json', asdict(settings))
            write_config(run_dir / 'config.json', model, class_names, data_config)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f'--output {run_dir} cannot be written: {one_line(error)}; choose another.') from error
    if settings.channels_last and not accelerator.is_fsdp2:  # FSDP shards contiguous weights only
        model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing()
    task = build_task(settings, model, teacher, data_config, accelerator.device)
    if settings.model_ema:
        task.setup_ema(settings.model_ema_decay, use_warmup=True)  # warm-up for the sake of short runs
    full_model = copy.deepcopy(model) if accelerator.is_fsdp2 else None
    task.trainable_module, optimizer = prepare_model(accelerator, task.trainable_module, optimizer)
    if settings.cache_images:
        for loader in loaders[:2]:
            loader.dataset.load()
    trainer = Trainer(settings, accelerator, task, full_model, optimizer, loaders, data_config, len(class_names),
                      run_dir, signature, checkpoint)
    summary_line = (
        f'{settings.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, '
        f'{len(class_names)} classes, {len(train_set)} + {len(val_set)} images, '
        f'{accelerator.device} x {accelerator.num_processes} -> {run_dir}')
    return trainer, class_names, summary_line


def write_final_files(run_dir: Path, trainer: Trainer, class_names: list[str], predictions: Predictions) -> None:
    """Write confusion.png, predictions.csv and misclassified.png of the best weights."""
    write_figure(run_dir / 'confusion.png', confusion_figure(
        predictions.labels, predictions.top5[:, 0], class_names))
    held_out = trainer.val_loader.dataset.dataset
    files = [image_name(held_out, index) for index in range(len(predictions.labels))]
    write_predictions(run_dir, files, class_names, predictions)
    write_figure(run_dir / 'misclassified.png', misclassified_figure(
        predictions.wrong, ['' if item.index is None else Path(files[item.index]).name for item in predictions.wrong],
        class_names, trainer.data_config['mean'], trainer.data_config['std']))
