"""Images decoded once and kept on the device as uint8; crop, flip, colour jitter and random erasing run there.

For many epochs on images no larger than the model's input, where PIL would be the bottleneck. The cache holds squares:
larger images lose the detail that a crop would show, and wide images their aspect ratio. Crops and colours have the
distributions of RandomResizedCrop and ColorJitter, but every crop is bilinear and the colour operations have a fixed
order. Evaluation images are the same as without the cache.

The augmentation of an image depends on (seed, epoch, index) alone, not on its batch, process or device: its random
numbers are a row of a table. The crop is the same at every size.
"""
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms.functional import normalize

from coatnet_train.data.dataset import IndexedImageDataset, StoredOutputs, check_labels, derive_seed
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.progress import progress_bar

__all__ = [
    'Augmentation', 'DeviceImageCache', 'Normalize', 'adjust_colors', 'create_cached_loader', 'crop_and_flip',
    'draw_crops']

ASPECT = (3 / 4, 4 / 3)  # range of a crop's width / height, as in RandomResizedCrop
READ_BATCH = 256  # images that are read together while decoding
DRAWS_OF_CROP = 22  # ten areas, ten aspects, left and top
TABLE = 2**32  # takes the place of an index in the seed of the table, which serves all images
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision's colour operations


class Normalize:
    """uint8 images (B, C, H, W) -> (x / 255 - mean) / std in float32; on a CPU bit-identical to torchvision's."""

    draws = 0

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = mean, std

    def __call__(self, images: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        return normalize(images.float().div_(255), self.mean, self.std)


def draw_crops(draws: torch.Tensor, scale: tuple[float, float]) -> torch.Tensor:
    """Random numbers (B, 22) in [0, 1) -> (left, top, width, height) of a crop as fractions of a square's side: (B, 4).

    The first of ten draws that fits inside, else the whole image, as in RandomResizedCrop: the area is uniform in
    `scale`, the logarithm of width over height uniform from 3/4 to 4/3.
    """
    area, aspect, place = draws.split((10, 10, 2), 1)
    area = torch.lerp(*(torch.full_like(area, end) for end in scale), area)
    aspect = torch.lerp(*(torch.full_like(aspect, math.log(end)) for end in ASPECT), aspect).exp()
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    found = fits.any(1)
    width, height = (torch.where(found, side.gather(1, first).squeeze(1), 1) for side in (width, height))
    left, top = place.unbind(1)
    return torch.stack((left * (1 - width), top * (1 - height), width, height), 1)


def crop_and_flip(images: torch.Tensor, crops: torch.Tensor, flipped: torch.Tensor, size: int) -> torch.Tensor:
    """Crop images (B, C, S, S) by `crops` (B, 4) and mirror those where `flipped` (B,) is true: (B, C, size, size)."""
    left, top, width, height = crops.unbind(1)
    zero, sign = torch.zeros_like(left), torch.where(flipped, -1., 1.)
    across = torch.stack((sign * width, zero, 2 * left + width - 1), 1)
    down = torch.stack((zero, height, 2 * top + height - 1), 1)
    finer = math.ceil(images.shape[-1] / size)  # antialiasing: downscaling averages pixels instead of picking some
    grid = F.affine_grid(torch.stack((across, down), 1), (len(images), 1, finer * size, finer * size), False)
    return F.avg_pool2d(F.grid_sample(images, grid, padding_mode='border', align_corners=False), finer)


def adjust_colors(images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor,
                  saturation: torch.Tensor) -> torch.Tensor:
    """Scale brightness, then contrast, then saturation of images (B, C, H, W) in 0 to 1 by factors (B,) around 1.

    As torchvision's adjust_brightness, adjust_contrast and adjust_saturation compute them.
    """
    def grey(images: torch.Tensor) -> torch.Tensor:
        weights = LUMA if images.shape[1] == 3 else (1,)
        return (images * torch.tensor(weights, device=images.device).view(-1, 1, 1)).sum(1, keepdim=True)

    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    images = (images * brightness).clamp(0, 1)
    images = torch.lerp(grey(images).mean((2, 3), keepdim=True), images, contrast).clamp(0, 1)
    return torch.lerp(grey(images), images, saturation).clamp(0, 1)


class Augmentation:
    """uint8 images (B, C, S, S) -> what a model trains on, (B, C, size, size) float32 on their device.

    All randomness comes from `draws` (B, 28), numbers in [0, 1); the erased region also depends on the size.

    Args:
        size: Height and width of the output in pixels.
        mean, std: Per channel, for images in 0 to 1.
        scale: Area of the random crop, as a fraction of the image.
        hflip: Probability of a horizontal flip.
        color_jitter: Brightness, contrast and saturation are scaled by factors up to this far from 1.
        reprob: Probability of random erasing, by timm's RandomErasing.
    """

    draws = DRAWS_OF_CROP + 6  # a flip, three colours, erasing and its seed

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...], scale: tuple[float, float],
                 hflip: float, color_jitter: float, reprob: float):
        self.size, self.mean, self.std, self.scale = size, mean, std, scale
        self.hflip, self.color_jitter, self.reprob = hflip, color_jitter, reprob

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        crops, flips, colors, erasing = draws.to(images.device).split((DRAWS_OF_CROP, 1, 3, 2), 1)
        flipped = flips.squeeze(1) < self.hflip
        images = crop_and_flip(images.float().div_(255), draw_crops(crops, self.scale), flipped, self.size)
        if self.color_jitter:
            low, high = max(0, 1 - self.color_jitter), 1 + self.color_jitter
            images = adjust_colors(images, *(low + (high - low) * colors).unbind(1))
        images = normalize(images, self.mean, self.std)
        if self.reprob:
            erase = RandomErasing(1, mode='pixel', device=images.device)
            for image, (drawn, seed) in zip(images, erasing.tolist(), strict=True):
                if drawn < self.reprob:
                    random_seed(int(seed * 2**24))  # all bits that a float32 below 1 has
                    erase(image)
        return images


class DeviceImageCache(Dataset):
    """List of (epoch, index) -> batch on the device: (images (B, C, H, W), labels (B,), bad (B,), *outputs).

    `load` must be called first.

    Args:
        source: Dataset that `load` reads once, in index order; its transform gives uint8 (C, S, S).
        transform: uint8 (B, C, S, S) and random numbers (B, transform.draws) in [0, 1) -> float32 (B, C, H, W).
        device: Where the images stay.
        workers: Number of processes that read.
        quiet: Whether to leave the progress bar out.
        outputs: Stored outputs of a teacher; keys are then (view, index), and the outputs of that view are appended.
    """

    def __init__(self, source: IndexedImageDataset, transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
                 device: torch.device, workers: int = 0, quiet: bool = False, outputs: StoredOutputs | None = None):
        self.source, self.dataset, self.seed = source, source.dataset, source.seed
        self.transform, self.device, self.workers, self.quiet = transform, device, workers, quiet
        self.outputs = outputs
        self.draw_table = lru_cache(outputs.views if outputs else 1)(self._draw_table)  # views share a batch

    def load(self) -> None:
        """Decode all images; raises ConfigError if the device is out of memory or labels are not whole numbers."""
        shape = self.source[0, 0][0].shape
        size = f'{len(self)} images of {tuple(shape)} take {len(self) * shape.numel() / 1e9:.3g} GB'
        try:
            self.images = torch.empty(len(self), *shape, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise ConfigError(
                f'--cache-images: {size}, more than {self.device} has left; give --no-cache-images.') from error
        found = []
        with progress_bar(total=len(self), desc=f'decoding: {size}', unit='img', quiet=self.quiet) as bar:
            loader = create_loader(self.source, EpochSampler(len(self)), READ_BATCH, self.workers)
            for step, (images, labels, bad) in enumerate(loader):
                check_labels(labels, 2**31)  # training checks them against the number of classes
                self.images[READ_BATCH * step:][:len(images)] = images.to(self.device)
                found.append((labels, bad))
                bar.update(len(images))
        self.labels, self.bad = (torch.cat(column).to(self.device) for column in zip(*found, strict=True))
        if self.outputs:
            self.outputs.load(self.device)

    def __len__(self) -> int:
        return len(self.source)

    def _draw_table(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, TABLE))
        return torch.rand(len(self), self.transform.draws, generator=generator)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        epochs, rows = torch.tensor(keys).unbind(1)
        draws = torch.empty(len(keys), self.transform.draws)
        for epoch in epochs.unique().tolist() if self.transform.draws else ():
            members = epochs == epoch
            draws[members] = self.draw_table(epoch)[rows[members]]
        indices = rows.to(self.device)
        outputs = self.outputs.rows(epochs.to(self.device), indices) if self.outputs else ()
        return self.transform(self.images[indices], draws), self.labels[indices], self.bad[indices], *outputs


def create_cached_loader(dataset: DeviceImageCache, sampler: EpochSampler, batch_size: int,
                         drop_last: bool = False) -> DataLoader:
    """Counterpart of `create_loader` for cached images: the main process fetches and augments whole batches."""
    return DataLoader(
        dataset, batch_sampler=BatchSampler(sampler, batch_size, drop_last), collate_fn=lambda batch: batch)
