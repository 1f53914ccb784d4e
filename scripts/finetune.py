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
import copy
import dataclasses
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from data_settings import DataSettings, is_stream
from loaders import create_loaders, open_data
from model_settings import ModelSettings, check_model_settings
from open_model import open_model
from plots import confusion_figure, misread_figure
from processes import start
from provenance import provenance
from recipes import RECIPES, settings_of
from run_folder import write_config, write_figure, write_json
from safetensors import SafetensorError
from settings import SettingsError, check_range, end_with_sentence, flag, one_line
from sharding import check_sharding, wrap
from timm.models import safe_model_name
from timm.utils import random_seed
from trainer import Preempted, Trainer, read_checkpoint
from training import build_optimizer, build_task, check_training, freeze_trunk, open_teacher

PREEMPTED = 75  # exit code: stopped by SIGTERM, everything saved


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, DataSettings):
    recipe: str = ''  # Settings by name, see scripts/recipes.py; flags given beside it win.
    train_split: str = 'train'  # Name of the training split.
    val_split: str = 'validation'  # Name of the split that picks the best epoch.
    train_num_samples: int | None = None  # Training pictures of a stream that does not say it.
    val_num_samples: int | None = None  # Held-out pictures of such a stream.
    max_bad_images: float = 0.001  # Share of unreadable pictures to report and skip before it ends; streams only warn.
    class_balanced: bool = False  # Draw every class equally often.
    decode_once: bool = False  # Keep all pictures, as squares of the model's size, on the device; augment them there.
    initial_checkpoint: str = ''  # Start from this file of weights, whose classes must be the data's.

    batch_size: int = 64  # Pictures per training step and process.
    validation_batch_size: int | None = None  # Pictures per evaluation step (--batch-size if not given).
    grad_accum_steps: int = 1  # Steps whose gradients are added up before the weights change.
    epochs: int = 10  # Passes over the training split.
    last_epoch: int | None = None  # End the run after this one of --epochs, where time is short; --resume auto goes on.
    val_interval: int = 1  # Evaluate after every so many epochs, and after the last.
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
    'recipe', 'last_epoch', 'dataset_download', 'output', 'experiment', 'resume', 'device', 'recovery_interval',
    'tracker', 'max_bad_images')


def check_values(settings: Settings) -> None:
    """Refuse single values that cannot work, before anything is read."""
    for name, value in asdict(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f'{flag(name)} must be a finite number, got {value}.')
    for name in ('epochs', 'batch_size', 'validation_batch_size', 'lr', 'clip_grad', 'grad_accum_steps', 'patience',
                 'val_interval', 'lr_base_size', 'kd_temperature', 'train_num_samples', 'val_num_samples'):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise SettingsError(f'{flag(name)} must be greater than 0, got {value}.')
    for name in ('workers', 'warmup_lr', 'weight_decay', 'head_lr_scale', 'mixup', 'cutmix', 'recovery_interval',
                 'mixup_off_epoch'):
        if not getattr(settings, name) >= 0:
            raise SettingsError(f'{flag(name)} must be at least 0, got {getattr(settings, name)}.')
    for name, least, most in (
            ('smoothing', 0, 0.999), ('hflip', 0, 1), ('reprob', 0, 1), ('color_jitter', 0, 10),
            ('momentum', 0, 1), ('model_ema_decay', 0, 1), ('layer_decay', 1e-6, 1), ('seed', 0, 2**32 - 1),
            ('warmup_epochs', 0, settings.epochs), ('last_epoch', 1, settings.epochs), ('min_lr', 0, settings.lr),
            ('max_bad_images', 0, 1), ('mixup_prob', 0, 1), ('mixup_switch_prob', 0, 1), ('kd_loss_weight', 0, 1)):
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
    if settings.decode_once and settings.aa:
        raise SettingsError(f'--aa works on pictures that PIL decodes each time, which --decode-once does not, got '
                            f'{settings.aa}; leave it out, or give --no-decode-once.')
    if settings.decode_once and is_stream(settings):
        raise SettingsError(f'--decode-once needs pictures with an index, which the stream --dataset '
                            f'{settings.dataset} does not have; give --no-decode-once.')
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


def main(settings: Settings) -> dict:
    """Fine-tune as `settings` say, and return the summary that is also written to summary.json."""
    check_values(settings)
    run_dir, last = find_run(settings)
    accelerator = start(
        settings.device, settings.amp, settings.amp_dtype, may_shard=True,
        gradient_accumulation_steps=settings.grad_accum_steps, log_with=settings.tracker or None,
        project_dir=run_dir if settings.tracker else None, dynamo_backend='inductor' if settings.torchcompile else None)
    try:
        trainer, class_names, headline = prepare(settings, accelerator, run_dir, last)
    except OSError as error:
        raise SettingsError(f'nothing was begun: {one_line(error)}; see --data-dir and --output {run_dir}.') from error
    if settings.tracker:
        accelerator.init_trackers('coatnet_zoo', {name: str(value) for name, value in asdict(settings).items()})
    best, predictions = trainer.run(headline)

    summary = {
        'model': settings.model, 'num_classes': len(class_names), 'best_epoch': best['epoch'],
        'epochs': trainer.progress.epoch - 1, 'top1': best['eval_top1'], 'top5': best['eval_top5'],
        'loss': best['eval_loss'], 'seed': settings.seed, 'train_seconds': trainer.progress.train_seconds,
        'unreadable': [*trainer.bad_train.names(), *trainer.bad_val.names()],
        'processes': accelerator.num_processes, **provenance(accelerator.device.type)}
    if accelerator.is_main_process:
        write_json(run_dir / 'summary.json', summary)
        write_figure(run_dir / 'confusion.png', confusion_figure(
            predictions.labels, predictions.top5[:, 0], class_names))
        write_figure(run_dir / 'misclassified.png', misread_figure(
            predictions.wrong, class_names, trainer.data_config['mean'], trainer.data_config['std']))
        print(f'best epoch {best["epoch"]}: top-1 {best["eval_top1"]:.2f} %. Load it with '
              f'timm.create_model(\'local-dir:{run_dir}\', pretrained=True)')
    accelerator.end_training()
    return summary


def prepare(settings: Settings, accelerator: Accelerator, run_dir: Path,
            last: Path | None) -> tuple[Trainer, list[str], str]:
    """Open data, model and run folder; what cannot work ends here. Returns also class names and a line of facts."""
    check_sharding(settings, accelerator)
    train_set, val_set, class_names = open_data(settings)
    random_seed(settings.seed)
    model, data_config = open_model(
        settings, settings.initial_checkpoint, '--initial-checkpoint', use_train_size=True,
        try_sizes=settings.train_img_sizes, num_classes=len(class_names), drop_rate=settings.drop,
        drop_path_rate=settings.drop_path, dropconnect=settings.dropconnect)
    loaders = create_loaders(settings, train_set, val_set, data_config, accelerator)
    free = (*FREE_ON_RESUME, *(() if is_stream(settings) else ('workers',)))  # streams share out by them
    facts = {name: value for name, value in asdict(settings).items() if name not in free}
    facts |= {'classes': class_names, 'train_images': len(train_set), 'val_images': len(val_set),
              'processes': accelerator.num_processes, 'sharded': accelerator.is_fsdp2}
    checkpoint = read_checkpoint(last, run_dir, facts) if last else None
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
