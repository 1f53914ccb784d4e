"""Length of a run: batch size and epochs from the number of images, and advice on runs that are too short."""
import dataclasses
import math
from collections.abc import Iterator

from coatnet_train.training.config import FinetuneSettings

__all__ = ['MIN_UPDATES', 'advice', 'with_schedule']

MIN_UPDATES = 300  # weight updates of a run; with fewer, a new classifier and BatchNorm's statistics do not settle
MIN_EPOCHS = 10  # epochs of a schedule that is derived from the number of images


def with_schedule(settings: FinetuneSettings, images: int, processes: int = 1) -> FinetuneSettings:
    """Fill in --batch-size, --epochs and --warmup-epochs where they are None.

    The batch over all processes is a power of two near a twentieth of the images, from 8 to 64. The epochs give at
    least MIN_UPDATES weight updates and are at least MIN_EPOCHS. A tenth of the epochs is warm-up.

    Args:
        settings: Settings of finetune.py.
        images: Number of training images.
        processes: Number of processes that share a batch.
    """
    batch_size, epochs = settings.batch_size, settings.epochs
    if batch_size is None:
        nearest = 2 ** round(math.log2(max(images, 1) / 20))
        batch_size = max(2, min(max(nearest, 8), 64) // processes)  # BatchNorm needs two
    if epochs is None:
        updates = max(1, images // (batch_size * processes) // settings.grad_accum_steps)  # of an epoch
        epochs = max(MIN_EPOCHS, math.ceil(MIN_UPDATES / updates))
    warmup_epochs = epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
    return dataclasses.replace(settings, batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs)


def advice(images: int, used: int, updates: int, batch_size: int, shared: int = 1, step: int = 1,
           scheduled: bool = False) -> Iterator[str]:
    """Advice on a run that leaves images out of its epochs, or makes few weight updates.

    Args:
        images: Number of training images.
        used: Images used in an epoch.
        updates: Weight updates in the whole run.
        batch_size: Batch size of a process.
        shared: Processes times gradient accumulation steps.
        step: Divisor of valid batch sizes, 2 where images are mixed in pairs.
        scheduled: Whether `with_schedule` chose batch size and epochs, so that the advice must not contradict it.
    """
    if used < images:
        # of the sizes above half the batch size, the largest that leaves out the fewest images
        better = min(range(batch_size, batch_size // 2, -step), key=lambda size: images % (size * shared))
        fewer = images % (better * shared)
        advised = fewer < images - used and not scheduled
        yield (f'{images - used} of {images} training images are left out of each epoch, other ones each time'
               + (f'; --batch-size {better} leaves out {fewer or "none"}.' if advised else '.'))
    if updates < MIN_UPDATES:
        yield (f'warning: the run makes {updates} updates of the weights, where fine-tuning takes some {MIN_UPDATES}; '
               + ('leave --epochs and --batch-size to the recipe.' if scheduled else
                  '--recipe small_data chooses batch size and epochs by the number of images, or give a smaller '
                  '--batch-size or more --epochs.'))
