"""What finetune.py reads: both splits of the data with their classes checked, and the loaders over them."""

from accelerate import Accelerator
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from coatnet_train.data.config import is_stream
from coatnet_train.data.dataset import Pictures, StreamedPictures, open_pictures, targets_of
from coatnet_train.data.device_cache import Augmentation, DecodedPictures, Normalize, decoded_batches
from coatnet_train.data.image_folder import look_alikes
from coatnet_train.data.loader import EpochSampler, batches
from coatnet_train.models.open_model import image_mode
from coatnet_train.runtime.cli import SettingsError, one_line
from coatnet_train.training.config import Settings

__all__ = ['create_loaders', 'open_data', 'training_transform']


def open_data(settings: Settings) -> tuple[Dataset, Dataset, list[str]]:
    """Open both splits and check that their classes agree with each other and with --num-classes."""
    shared = dict(batch_size=settings.batch_size, seed=settings.seed, num_classes=settings.num_classes)
    train_set, class_names = open_pictures(
        settings, settings.train_split, is_training=True, num_samples=settings.train_num_samples, **shared)
    val_set, val_names = open_pictures(settings, settings.val_split, num_samples=settings.val_num_samples, **shared)
    if flat := [settings.train_split] * (class_names == ['']) or [settings.val_split] * (val_names == ['']):
        raise SettingsError(f'--data-dir {settings.data_dir}: every image must lie in the folder of its class, but '
                            f'those of {flat[0]} lie in no such folder; move them.')
    if differing := sorted(set(class_names) ^ set(val_names)):
        alike = ''.join(f' {first!a} and {second!a} look alike, but are spelled differently in Unicode '
                        f'(NFC and NFD): rename one.' for first, second in look_alikes(differing))
        raise SettingsError(f'--data-dir {settings.data_dir}: both splits must have the same classes, but '
                            f'{", ".join(differing)} are in one only; add pictures or remove the folders.{alike}')
    if len(class_names) < 2:
        raise SettingsError(f'--data-dir {settings.data_dir}: at least 2 classes are needed, found {len(class_names)}; '
                            f'put the pictures of each class into a sub-folder of its own.')
    if settings.num_classes not in (None, len(class_names)):
        raise SettingsError(f'--num-classes must be the number of classes in the data, {len(class_names)}, '
                            f'got {settings.num_classes}; leave it out to take it from the data.')
    return train_set, val_set, class_names


def training_transform(settings: Settings, data_config: dict, size: int | None = None) -> object:
    """timm's augmentation, or that of decoded pictures, at the model's size or at a size in pixels."""
    if settings.decode_once:
        return Augmentation(
            size or data_config['input_size'][-1], data_config['mean'], data_config['std'], settings.scale,
            settings.hflip, settings.color_jitter, settings.reprob)
    shape = data_config['input_size'] if size is None else (data_config['input_size'][0], size, size)
    return create_transform(
        shape, is_training=True, interpolation=data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], scale=settings.scale, hflip=settings.hflip, color_jitter=settings.color_jitter,
        auto_augment=settings.aa, re_prob=settings.reprob, re_mode='pixel')


def create_loaders(settings: Settings, train_set: Dataset, val_set: Dataset, data_config: dict,
                   accelerator: Accelerator) -> tuple[DataLoader, DataLoader, EpochSampler | None]:
    """Loaders over both splits, whose batches the processes share, and the sampler that decides the order.

    With --decode-once their data sets have a load(), to be called once all else is known to work.
    """
    train, val, sampler = _loaders(settings, train_set, val_set, data_config, accelerator)
    if settings.grad_accum_steps > len(train):
        raise SettingsError(f'--grad-accum-steps {settings.grad_accum_steps} must be at most the {len(train)} batches '
                            f'of an epoch; give fewer, or a smaller --batch-size.')
    return train, val, sampler


def _loaders(settings: Settings, train_set: Dataset, val_set: Dataset, data_config: dict,
             accelerator: Accelerator) -> tuple[DataLoader, DataLoader, EpochSampler | None]:
    try:
        transforms = training_transform(settings, data_config), create_transform(**data_config)
    except (ValueError, KeyError, AssertionError) as error:
        raise SettingsError(f'--aa, --interpolation or another setting of the pictures: {one_line(error)}.') from error
    mode = image_mode(data_config)
    shared = dict(workers=settings.workers, pin_memory=accelerator.device.type == 'cuda')
    val_batch = settings.validation_batch_size or settings.batch_size
    if is_stream(settings):  # timm's streams share their pictures out themselves
        train, val = (StreamedPictures(dataset, transform, settings.seed, accelerator.process_index, mode)
                      for dataset, transform in zip((train_set, val_set), transforms, strict=True))
        return (batches(train, None, settings.batch_size, drop_last=True, **shared),
                batches(val, None, val_batch, **shared), None)
    targets = targets_of(train_set) if settings.class_balanced else None
    sampler = EpochSampler(len(train_set), settings.seed, shuffle=True, targets=targets)
    batch = settings.batch_size * accelerator.num_processes
    odd = len(train_set) % 2 and (settings.mixup or settings.cutmix)
    if len(train_set) < batch and (accelerator.num_processes > 1 or odd):
        raise SettingsError(f'--batch-size {settings.batch_size} in {accelerator.num_processes} processes must be at '
                            f'most the {len(train_set)} training pictures; give a smaller one.')
    order = EpochSampler(len(val_set))
    val_batch, drop_last = val_batch * accelerator.num_processes, len(train_set) > batch
    if settings.decode_once:
        keep = dict(device=accelerator.device, workers=settings.workers, quiet=not accelerator.is_main_process)
        channels, height, width = data_config['input_size']
        if height != width:
            raise SettingsError(f'--decode-once keeps squares, and --model {settings.model} takes pictures of '
                                f'{height} x {width}; give --no-decode-once, or an --img-size.')
        # train is cropped on the device: what is kept of it is all of each picture, for the largest size it will have
        size = max((height, *settings.train_img_sizes))
        whole = data_config | dict(input_size=(channels, size, size), crop_pct=1.0, crop_mode='squash')
        train = Pictures(train_set, create_transform(**whole, normalize=False), settings.seed, mode, substitute=True)
        val = Pictures(val_set, create_transform(**data_config, normalize=False), settings.seed, mode)
        as_it_is = Normalize(data_config['mean'], data_config['std'])
        loaders = (decoded_batches(DecodedPictures(train, transforms[0], **keep), sampler, batch, drop_last),
                   decoded_batches(DecodedPictures(val, as_it_is, **keep), order, val_batch))
    else:
        train = Pictures(train_set, transforms[0], settings.seed, mode, substitute=True)
        val = Pictures(val_set, transforms[1], settings.seed, mode)
        loaders = (batches(train, sampler, batch, drop_last=drop_last, **shared),
                   batches(val, order, val_batch, **shared))
    return *accelerator.prepare(*loaders), sampler
