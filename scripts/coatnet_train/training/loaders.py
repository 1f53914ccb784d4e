"""Datasets and loaders of finetune.py: both splits, with their classes checked, and the loaders over them."""
from collections.abc import Callable

from accelerate import Accelerator
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from coatnet_train.data.config import is_stream
from coatnet_train.data.dataset import IndexedImageDataset, StreamingImageDataset, create_dataset, read_targets
from coatnet_train.data.device_cache import Augmentation, DeviceImageCache, Normalize, create_cached_loader
from coatnet_train.data.image_folder import look_alikes
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.models.open_model import image_mode
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.teach_config import TeachSettings
from coatnet_train.training.teacher_outputs import TeacherOutputs

__all__ = ['create_datasets', 'create_loaders', 'create_train_images', 'training_transform']


def create_datasets(settings: FinetuneSettings) -> tuple[Dataset, Dataset, list[str]]:
    """Open both splits; returns (training set, validation set, class names in label order).

    Raises ConfigError unless the classes of the splits agree with each other and with --num-classes.
    """
    shared = dict(batch_size=settings.batch_size, seed=settings.seed, num_classes=settings.num_classes)
    train_set, class_names = create_dataset(
        settings, settings.train_split, is_training=True, num_samples=settings.train_num_samples, **shared)
    val_set, val_names = create_dataset(settings, settings.val_split, num_samples=settings.val_num_samples, **shared)
    if flat := [settings.train_split] * (class_names == ['']) or [settings.val_split] * (val_names == ['']):
        raise ConfigError(f'--data-dir {settings.data_dir}: every image must lie in the folder of its class, but '
                          f'those of {flat[0]} lie in no such folder; move them.')
    if differing := sorted(set(class_names) ^ set(val_names)):
        alike = ''.join(f' {first!a} and {second!a} look alike, but are spelled differently in Unicode '
                        f'(NFC and NFD): rename one.' for first, second in look_alikes(differing))
        raise ConfigError(f'--data-dir {settings.data_dir}: both splits must have the same classes, but '
                          f'{", ".join(differing)} are in one only; add images or remove the folders.{alike}')
    if len(class_names) < 2:
        raise ConfigError(f'--data-dir {settings.data_dir}: at least 2 classes are needed, found {len(class_names)}; '
                          f'put the images of each class into a sub-folder of its own.')
    if settings.num_classes not in (None, len(class_names)):
        raise ConfigError(f'--num-classes must be the number of classes in the data, {len(class_names)}, '
                          f'got {settings.num_classes}; leave it out to take it from the data.')
    return train_set, val_set, class_names


def training_transform(
        settings: FinetuneSettings | TeachSettings, data_config: dict, size: int | None = None) -> Callable:
    """timm's augmentation, or that of cached images; `size` in pixels replaces the model's size."""
    if settings.cache_images:
        return Augmentation(
            size or data_config['input_size'][-1], data_config['mean'], data_config['std'], settings.scale,
            settings.hflip, settings.color_jitter, settings.reprob)
    shape = data_config['input_size'] if size is None else (data_config['input_size'][0], size, size)
    return create_transform(
        shape, is_training=True, interpolation=data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], scale=settings.scale, hflip=settings.hflip, color_jitter=settings.color_jitter,
        auto_augment=settings.aa, re_prob=settings.reprob, re_mode='pixel')


def create_loaders(settings: FinetuneSettings, train_set: Dataset, val_set: Dataset, data_config: dict,
                   accelerator: Accelerator, outputs: TeacherOutputs | None = None,
                   ) -> tuple[DataLoader, DataLoader, EpochSampler | None]:
    """Create the training and validation loaders, which split every batch over the processes, and the training sampler.

    The sampler is None for streams. With --cache-images the datasets of the loaders have a load(), to be called after
    all other checks. With `outputs` the training images are the views for which the teacher's outputs are stored.
    Raises ConfigError for settings of the images or batches that cannot work.
    """
    try:
        transforms = training_transform(settings, data_config), create_transform(**data_config)
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f'--aa, --interpolation or another setting of the images: {one_line(error)}.') from error
    if is_stream(settings):
        train, val = stream_loaders(settings, train_set, val_set, transforms, image_mode(data_config), accelerator)
        sampler = None
    else:
        targets = read_targets(train_set) if settings.class_balanced else None
        sampler = EpochSampler(
            len(train_set), settings.seed, shuffle=True, targets=targets, views=outputs.views if outputs else 0)
        train_images = create_train_images(
            settings, train_set, data_config, accelerator, sizes=settings.train_img_sizes, outputs=outputs)
        create = cached_loaders if settings.cache_images else indexed_loaders
        train, val = accelerator.prepare(*create(
            settings, train_images, val_set, transforms[1], data_config, sampler, accelerator))
    if settings.grad_accum_steps > len(train):
        raise ConfigError(f'--grad-accum-steps {settings.grad_accum_steps} must be at most the {len(train)} batches '
                          f'of an epoch; give fewer, or a smaller --batch-size.')
    return train, val, sampler


def stream_loaders(settings: FinetuneSettings, train_set: Dataset, val_set: Dataset,
                   transforms: tuple[Callable, Callable], mode: str, accelerator: Accelerator) -> list[DataLoader]:
    """Training and validation loaders over streams, which themselves divide the images among the processes."""
    batch_sizes = settings.batch_size, settings.validation_batch_size or settings.batch_size
    return [create_loader(
        StreamingImageDataset(dataset, transform, settings.seed, accelerator.process_index, mode), None, batch_size,
        settings.workers, drop_last=is_training, pin_memory=accelerator.device.type == 'cuda')
        for dataset, transform, batch_size, is_training in zip(
            (train_set, val_set), transforms, batch_sizes, (True, False), strict=True)]


def total_batch_sizes(settings: FinetuneSettings, images: int, processes: int) -> tuple[int, int, bool]:
    """Batch sizes of training and evaluation over all processes, and whether an incomplete training batch is dropped.

    Raises ConfigError where there are fewer images than a batch needs.
    """
    batch_size = settings.batch_size * processes
    odd = images % 2 and (settings.mixup or settings.cutmix)
    if images < batch_size and (processes > 1 or odd):
        raise ConfigError(f'--batch-size {settings.batch_size} in {processes} processes must be at most the {images} '
                          f'training images; give a smaller one.')
    return batch_size, (settings.validation_batch_size or settings.batch_size) * processes, images > batch_size


def create_train_images(
        settings: FinetuneSettings | TeachSettings, dataset: Dataset, data_config: dict, accelerator: Accelerator,
        sizes: tuple[int, ...] = (), outputs: TeacherOutputs | None = None,
) -> IndexedImageDataset | DeviceImageCache:
    """Augmented training images by (epoch, index), or by (view, index) with stored outputs.

    Args:
        settings: Augmentation, --cache-images, --workers and --seed.
        dataset: What `create_dataset` returned.
        data_config: Input size, normalisation and interpolation.
        accelerator: Accelerator whose device keeps cached images.
        sizes: Other image sizes in pixels that training uses.
        outputs: Stored outputs of a teacher.

    Raises ConfigError for cached images that are not square.
    """
    seed, mode = outputs.seed if outputs else settings.seed, image_mode(data_config)
    transform = training_transform(settings, data_config)
    if not settings.cache_images:
        return IndexedImageDataset(dataset, transform, seed, mode, substitute=True, outputs=outputs)
    channels, height, width = data_config['input_size']
    if height != width:
        raise ConfigError(f'--cache-images keeps squares, and the model takes images of {height} x {width}; give '
                          f'--no-cache-images, or an --img-size.')
    # training crops on the device, so the whole image is cached at the largest size that training uses
    size = max((height, *sizes))
    whole_image = data_config | dict(input_size=(channels, size, size), crop_pct=1.0, crop_mode='squash')
    source = IndexedImageDataset(
        dataset, create_transform(**whole_image, normalize=False), seed, mode, substitute=True)
    return DeviceImageCache(source, transform, accelerator.device, settings.workers,
                            quiet=not accelerator.is_main_process, outputs=outputs)


def indexed_loaders(settings: FinetuneSettings, train: IndexedImageDataset, val_set: Dataset, transform: Callable,
                    data_config: dict, sampler: EpochSampler, accelerator: Accelerator) -> list[DataLoader]:
    """Training and validation loaders that decode and augment each image in a worker process."""
    train_batch, val_batch, drop_last = total_batch_sizes(settings, len(train), accelerator.num_processes)
    pin_memory = accelerator.device.type == 'cuda'
    val = IndexedImageDataset(val_set, transform, settings.seed, image_mode(data_config))
    return [create_loader(train, sampler, train_batch, settings.workers, drop_last, pin_memory),
            create_loader(val, EpochSampler(len(val_set)), val_batch, settings.workers, pin_memory=pin_memory)]


def cached_loaders(settings: FinetuneSettings, train: DeviceImageCache, val_set: Dataset, _: Callable,
                   data_config: dict, sampler: EpochSampler, accelerator: Accelerator) -> list[DataLoader]:
    """Training and validation loaders over images that are decoded once and stay on the device."""
    train_batch, val_batch, drop_last = total_batch_sizes(settings, len(train), accelerator.num_processes)
    whole = IndexedImageDataset(
        val_set, create_transform(**data_config, normalize=False), settings.seed, image_mode(data_config))
    val = DeviceImageCache(whole, Normalize(data_config['mean'], data_config['std']), accelerator.device,
                           settings.workers, quiet=not accelerator.is_main_process)
    return [create_cached_loader(train, sampler, train_batch, drop_last),
            create_cached_loader(val, EpochSampler(len(val_set)), val_batch)]
