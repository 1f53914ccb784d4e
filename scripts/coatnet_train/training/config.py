"""Settings of finetune.py: all fields, the checks of their values, and the command line; without torch and timm."""
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from coatnet_train.data.config import DataSettings, is_stream
from coatnet_train.models.config import ModelSettings, check_model_settings
from coatnet_train.runtime.cli import ConfigError, check_range, flag, parse_flags, tyro
from coatnet_train.training.recipes import RECIPES, recipe_defaults

__all__ = [
    'RESUME_IGNORED_FIELDS',
    'FinetuneSettings',
    'ImageAugmentationSettings',
    'check_augmentation',
    'check_values',
    'read_settings',
    'upgrade_fields',
]


@dataclass(frozen=True, kw_only=True)
class TrainingDataSettings(DataSettings):
    """Training and validation images."""

    train_split: str = 'train'  # Name of the training split.
    val_split: str = 'validation'  # Name of the split that picks the best epoch.
    train_num_samples: int | None = None  # Training images of a stream that does not say it.
    val_num_samples: int | None = None  # Held-out images of such a stream.
    max_bad_images: float = 0.001  # Fraction of unreadable images to skip before the run ends; streams only warn.
    class_balanced: bool = False  # Draw every class equally often.
    cache_images: bool = False  # Keep all images, as squares of the model's size, on the device; augment them there.


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimisation of the weights."""

    initial_checkpoint: str = ''  # Start from this file of weights, whose classes must be the data's.
    batch_size: int | None = 64  # Images per training step and process; None: by the number of images, 8 to 64.
    validation_batch_size: int | None = None  # Images per evaluation step (--batch-size if not given).
    grad_accum_steps: int = 1  # Steps whose gradients are added up before the weights change.
    epochs: int | None = 10  # Passes over the training split; None: for at least 300 updates of the weights.
    last_epoch: int | None = None  # End the run after this one of --epochs, where time is short; --resume auto goes on.
    val_interval: int = 1  # Evaluate after every so many epochs, and after the last.
    patience: int | None = None  # Stop after this many epochs without a better one.
    opt: str = 'adamw'  # Any name of timm.optim.list_optimizers().
    lr: float = 5e-4  # Highest learning rate.
    lr_base_size: int | None = None  # If given, --lr is for this many images a weight update, and scaled to theirs.
    weight_decay: float = 0.05  # Weight decay; not applied to biases and norms.
    momentum: float = 0.9  # Momentum of the optimizers that have one.
    layer_decay: float | None = None  # Factor on the learning rate per layer, counted from the classifier.
    head_lr_scale: float = 1.0  # Factor on the learning rate of the classifier.
    freeze_trunk: bool = False  # Train the classifier alone.
    bn_momentum: float | None = None  # Weight of a batch in BatchNorm's running statistics (the model's own if None).
    clip_grad: float | None = 1.0  # Largest norm of the gradient.
    warmup_epochs: float | None = None  # Linear warm-up in place of the cosine's start; None: a tenth of --epochs.
    warmup_lr: float = 1e-6  # Learning rate at the start of the warm-up.
    min_lr: float = 1e-6  # Learning rate at the end.
    drop: float | None = None  # Dropout before the classifier.
    drop_path: float | None = None  # Stochastic depth.
    dropconnect: float | None = None  # Rate at which LightConv and DynamicConv drop weights.
    smoothing: float = 0.1  # Label smoothing.
    teacher: str = ''  # Distil from this model, as --model names them: with weights, and with the data's classes.
    teacher_img_size: int | None = None  # Height and width of the teacher's images (the student's if not given).
    teacher_outputs: str = ''  # Distil from what teach.py stored in this folder, in place of --teacher.
    kd_loss_weight: float = 0.5  # Weight of the teacher in the loss.
    kd_temperature: float = 1.0  # Divides the logits of both before they are compared.
    model_ema: bool = False  # Evaluate and release an exponential moving average of the weights.
    model_ema_decay: float = 0.9998  # Its decay, approached from 0 over the first steps.


@dataclass(frozen=True, kw_only=True)
class ImageAugmentationSettings:
    """Augmentation of single images, which with a seed determines every view of an image."""

    scale: tuple[float, float] = (0.08, 1.0)  # Area of the random crop, as a fraction of the image.
    hflip: float = 0.5  # Probability of a horizontal flip.
    color_jitter: float = 0.4  # Strength of random brightness, contrast and saturation.
    aa: str | None = None  # AutoAugment policy, such as rand-m9-mstd0.5-inc1.
    reprob: float = 0.0  # Probability of random erasing.


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings(ImageAugmentationSettings):
    """Augmentation of the training images."""

    train_img_sizes: tuple[int, ...] = ()  # Progressive sizes in pixels, each for an equal part of the epochs.
    mixup: float = 0.0  # Alpha of mixup; 0 leaves it out.
    cutmix: float = 0.0  # Alpha of cutmix; 0 leaves it out.
    mixup_prob: float = 1.0  # Probability of mixing a batch.
    mixup_switch_prob: float = 0.5  # Probability of cutmix where both are on.
    mixup_off_epoch: int = 0  # Stop mixing after this epoch; 0 never.


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Computation and output."""

    recipe: Annotated[str, tyro.conf.arg(
        help=f'Settings by name (coatnet_train/training/recipes.py), over which other flags win: '
             f'{", ".join(RECIPES)}.')] = ''
    output: str = 'output'  # Parent of the run folders.
    experiment: str = ''  # Name of the run folder (the model's name if not given).
    resume: str = ''  # auto continues the run folder if it has begun; a path continues that run folder.
    recovery_interval: int = 0  # Also save every so many weight updates; 0 saves after epochs and on SIGTERM only.
    tracker: str = ''  # tensorboard, wandb or trackio; metrics.csv is written in any case.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    seed: int = 42  # Fixes weights, order and augmentation; bit for bit on a CPU.
    amp: bool = False  # Mixed precision.
    # Set by read_settings, never by a flag: --amp of a recipe means a GPU, or a CPU with bfloat16 instructions.
    amp_if_native: Annotated[bool, tyro.conf.Suppress] = False
    amp_dtype: str = 'bfloat16'  # bfloat16 or float16.
    channels_last: bool = True  # Memory format of images and weights.
    grad_checkpointing: bool = False  # Compute activations twice instead of keeping them.
    torchcompile: bool = False  # Compile the model.


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RunSettings, AugmentationSettings, TrainingSettings, ModelSettings, TrainingDataSettings):
    """All settings of finetune.py."""


# Fields that may differ when a run is resumed: they change where it runs, not what it computes. The contents of
# --data-dir, --class-map and --teacher-outputs are compared by digests instead.
RESUME_IGNORED_FIELDS = (
    'recipe', 'amp_if_native', 'last_epoch', 'teacher_outputs', 'data_dir', 'dataset_download', 'class_map', 'output',
    'experiment', 'resume', 'device', 'recovery_interval', 'tracker', 'max_bad_images')

# Present names of fields by the names in earlier run folders.
RENAMED_FIELDS = {'decode_once': 'cache_images'}


def upgrade_fields(fields: dict[str, object]) -> dict[str, object]:
    """Rename the settings of an earlier run to the present field names."""
    return {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}


def check_augmentation(settings: ImageAugmentationSettings, cache_images: bool) -> None:
    """Raise ConfigError for values of the single-image augmentation that cannot work."""
    for name, maximum in (('hflip', 1), ('reprob', 1), ('color_jitter', 10)):
        check_range(settings, name, 0, maximum)
    if not 0 < settings.scale[0] <= settings.scale[1] <= 1:
        raise ConfigError(f'--scale must be two rising fractions of the image from 0 to 1, got {settings.scale}.')
    if cache_images and settings.aa:
        raise ConfigError(f'--aa works on images that PIL decodes each time, which --cache-images does not, got '
                          f'{settings.aa}; leave it out, or give --no-cache-images.')


def check_values(settings: FinetuneSettings) -> None:
    """Raise ConfigError for values and combinations that cannot work.

    Fields that are None until the images are counted are checked by a second call.
    """
    if Path(settings.experiment).is_absolute() or '..' in Path(settings.experiment).parts:
        raise ConfigError(f'--experiment must be a folder inside --output, got {settings.experiment}; change '
                          f'--output to write elsewhere.')
    epochs = math.inf if settings.epochs is None else settings.epochs
    for name, value in asdict(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f'{flag(name)} must be a finite number, got {value}.')
    for name in ('epochs', 'batch_size', 'validation_batch_size', 'lr', 'clip_grad', 'grad_accum_steps', 'patience',
                 'val_interval', 'lr_base_size', 'kd_temperature', 'teacher_img_size', 'train_num_samples',
                 'val_num_samples'):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f'{flag(name)} must be greater than 0, got {value}.')
    for name in ('workers', 'warmup_lr', 'weight_decay', 'head_lr_scale', 'mixup', 'cutmix', 'recovery_interval',
                 'mixup_off_epoch'):
        if not getattr(settings, name) >= 0:
            raise ConfigError(f'{flag(name)} must be at least 0, got {getattr(settings, name)}.')
    for name, minimum, maximum in (
            ('smoothing', 0, 0.999), ('momentum', 0, 1), ('model_ema_decay', 0, 1), ('layer_decay', 1e-6, 1),
            ('seed', 0, 2**32 - 1),
            ('warmup_epochs', 0, epochs), ('last_epoch', 1, epochs), ('min_lr', 0, settings.lr), ('bn_momentum', 0, 1),
            ('max_bad_images', 0, 1), ('mixup_prob', 0, 1), ('mixup_switch_prob', 0, 1), ('kd_loss_weight', 0, 1)):
        check_range(settings, name, minimum, maximum)
    check_augmentation(settings, settings.cache_images)
    if (settings.mixup or settings.cutmix) and (settings.batch_size or 0) % 2:
        raise ConfigError(f'--batch-size must be even with --mixup or --cutmix, got {settings.batch_size}.')
    if any(size <= 0 for size in settings.train_img_sizes) or len(settings.train_img_sizes) > epochs:
        raise ConfigError(f'--train-img-sizes must be positive and no more than the {epochs} epochs, '
                          f'got {settings.train_img_sizes}.')
    if settings.freeze_trunk and settings.layer_decay is not None:
        raise ConfigError('--layer-decay has no layers to act on with --freeze-trunk; leave one of them out.')
    if settings.teacher and settings.teacher_outputs:
        raise ConfigError(f'--teacher {settings.teacher} and --teacher-outputs {settings.teacher_outputs} are two '
                          f'teachers; give one of them.')
    if not (settings.teacher or settings.teacher_outputs):
        for name in ('kd_loss_weight', 'kd_temperature', 'teacher_img_size'):
            if getattr(settings, name) != getattr(FinetuneSettings, name):
                source = f'--recipe {settings.recipe}' if settings.recipe else 'The command line'
                raise ConfigError(f'{source} sets {flag(name)} {getattr(settings, name)} and needs a teacher; give '
                                  f'--teacher or --teacher-outputs.')
    if settings.teacher_outputs and is_stream(settings):
        raise ConfigError(f'--teacher-outputs needs images with an index, which the stream --dataset '
                          f'{settings.dataset} does not have; give --teacher.')
    if settings.cache_images and is_stream(settings):
        raise ConfigError(f'--cache-images needs images with an index, which the stream --dataset '
                          f'{settings.dataset} does not have; give --no-cache-images.')
    if is_stream(settings) and None in (settings.batch_size, settings.epochs):
        raise ConfigError(f'--batch-size and --epochs of None follow from a count of the images, which the stream '
                          f'--dataset {settings.dataset} does not give in time; give both.')
    if settings.class_balanced and is_stream(settings):
        raise ConfigError('--class-balanced needs all labels before the start, which a stream does not have.')
    check_model_settings(settings)


def read_settings(arguments: list[str] | None = None, description: str | None = None) -> FinetuneSettings:
    """Read the command line of finetune.py, over the settings of --recipe if there is one.

    Args:
        arguments: Command line; sys.argv if not given.
        description: Text above the flags of --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return parse_flags(FinetuneSettings, description, arguments, recipe_defaults(arguments))
