"""Images that are decoded once and stay on the device as uint8: crop, flip, colours and erasing are computed there.

For many epochs on images no larger than the model takes, where a GPU would wait for PIL. Of larger ones the detail
that a crop would show is lost, and of wide ones the shape, as all are kept as squares. From these, crops and colours
are drawn as by RandomResizedCrop and ColorJitter, but every crop is bilinear and the colours change in one order.
Evaluation sees the images that it always sees.
"""
import math
from collections.abc import Callable

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import random_seed
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms.functional import normalize

from coatnet_train.data.dataset import IndexedImageDataset, check_labels, derive_seed
from coatnet_train.data.loader import EpochSampler, create_loader
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.progress import progress_bar

__all__ = [
    'Augmentation', 'DeviceImageCache', 'Normalize', 'adjust_colors', 'create_cached_loader', 'crop_and_flip',
    'draw_crops']

ASPECT = (3 / 4, 4 / 3)  # of a crop, width over height, as in RandomResizedCrop
READ_BATCH = 256  # images that are read together while decoding
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision's colour operations


class Normalize:
    """uint8 images (B, C, H, W) -> (x / 255 - mean) / std in float32, on a CPU to the bit as after ToTensor."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = mean, std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return normalize(images.float().div_(255), self.mean, self.std)


def draw_crops(count: int, scale: tuple[float, float], device: torch.device | str = 'cpu') -> torch.Tensor:
    """(left, top, width, height) of a crop for each of `count` square images, as fractions of its side: (count, 4).

    The first of ten draws that fits inside, else the whole image, as in RandomResizedCrop: the area is uniform in
    `scale`, the logarithm of width over height uniform from 3/4 to 4/3.
    """
    area = torch.empty(count, 10, device=device).uniform_(*scale)
    aspect = torch.empty(count, 10, device=device).uniform_(*map(math.log, ASPECT)).exp()
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    found = fits.any(1)
    width, height = (torch.where(found, side.gather(1, first).squeeze(1), 1) for side in (width, height))
    left, top = torch.rand(2, count, device=device)
    return torch.stack((left * (1 - width), top * (1 - height), width, height), 1)


def crop_and_flip(images: torch.Tensor, crops: torch.Tensor, flipped: torch.Tensor, size: int) -> torch.Tensor:
    """Crops (B, 4) of images (B, C, S, S), flipped left to right where `flipped` (B,) says so: (B, C, size, size)."""
    left, top, width, height = crops.unbind(1)
    zero, sign = torch.zeros_like(left), torch.where(flipped, -1., 1.)
    across = torch.stack((sign * width, zero, 2 * left + width - 1), 1)
    down = torch.stack((zero, height, 2 * top + height - 1), 1)
    finer = math.ceil(images.shape[-1] / size)  # so that a smaller image is an average, not a choice, of pixels
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

    Args:
        size: In pixels.
        mean, std: Of each channel, for images in 0 to 1.
        scale: Area of the random crop, as a fraction of the image.
        hflip: Probability of a horizontal flip.
        color_jitter: Brightness, contrast and saturation are scaled by factors up to this far from 1.
        reprob: Probability of random erasing, by timm's RandomErasing.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...], scale: tuple[float, float],
                 hflip: float, color_jitter: float, reprob: float):
        self.size, self.mean, self.std, self.scale = size, mean, std, scale
        self.hflip, self.color_jitter, self.reprob = hflip, color_jitter, reprob

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        count, device = len(images), images.device
        flipped = torch.rand(count, device=device) < self.hflip
        images = crop_and_flip(images.float().div_(255), draw_crops(count, self.scale, device), flipped, self.size)
        if self.color_jitter:
            images = adjust_colors(images, *torch.empty(3, count, device=device).uniform_(
                max(0, 1 - self.color_jitter), 1 + self.color_jitter))
        images = normalize(images, self.mean, self.std)
        return RandomErasing(self.reprob, mode='pixel', device=device)(images) if self.reprob else images


class DeviceImageCache(Dataset):
    """A list of (epoch, index) -> (images (B, C, H, W), labels (B,), bad (B,)), all on the device, after `load`.

    What is random follows from (seed, epoch, first index), whatever was drawn before.

    Args:
        source: Read once, in the order of the indices; its transform gives uint8 (C, S, S).
        transform: uint8 (B, C, S, S) -> float32 (B, C, H, W).
        device: Where the images stay.
        workers: Number of processes that read.
        quiet: Whether to leave the progress bar out.
    """

    def __init__(self, source: IndexedImageDataset, transform: Callable[[torch.Tensor], torch.Tensor],
                 device: torch.device, workers: int = 0, quiet: bool = False):
        self.source, self.dataset, self.seed = source, source.dataset, source.seed
        self.transform, self.device, self.workers, self.quiet = transform, device, workers, quiet

    def load(self) -> None:
        """Decode all images; raises ConfigError where the device has no room, or labels are no whole numbers."""
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
                check_labels(labels, 2**31)  # whether there are so many classes is known in training
                self.images[READ_BATCH * step:][:len(images)] = images.to(self.device)
                found.append((labels, bad))
                bar.update(len(images))
        self.labels, self.bad = (torch.cat(column).to(self.device) for column in zip(*found, strict=True))

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        indices = torch.tensor([index for _, index in keys], device=self.device)
        random_seed(derive_seed(self.seed, *keys[0]))
        return self.transform(self.images[indices]), self.labels[indices], self.bad[indices]


def create_cached_loader(dataset: DeviceImageCache, sampler: EpochSampler, batch_size: int,
                         drop_last: bool = False) -> DataLoader:
    """The loader of `create_loader` over cached images: the main process takes and augments a batch at once."""
    return DataLoader(
        dataset, batch_sampler=BatchSampler(sampler, batch_size, drop_last), collate_fn=lambda batch: batch)
