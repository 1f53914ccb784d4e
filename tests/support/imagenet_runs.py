"""Generated images of ImageNet's classes, models with random weights, and the steps of timm's validate.py."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_input_data_config
from timm.models import save_for_hf
from timm.utils import AverageMeter, accuracy

import eval_imagenet

SYNSETS = ImageNetInfo('imagenet-1k').label_names()


def write_images(folder: Path, classes, each: int = 2, seed: int = 0) -> Path:
    """Write noisy images of many colours and sizes, so that a random model's predictions differ between them."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((rng.integers(40, 60), rng.integers(40, 60)), Image.BICUBIC)
            image.save(folder / name / f'{index}.png')
    return folder


def random_model(randomize, name: str = 'test_resnet', seed: int = 0, **arguments) -> torch.nn.Module:
    model = randomize(timm.create_model(name, **arguments), seed).eval()
    model.get_classifier().weight.data *= 10  # confident predictions, which differ between images
    return model


def write_fine_tune(folder: Path, randomize, labels: list[str]) -> tuple[str, torch.nn.Module]:
    model = random_model(randomize, num_classes=len(labels))
    model.pretrained_cfg = model.pretrained_cfg | {'input_size': (3, 32, 32), 'num_classes': len(labels)}
    save_for_hf(model, str(folder), {'label_names': labels}, safe_serialization=True)
    return f'local-dir:{folder}', model


def run(settings: eval_imagenet.EvaluationSettings, **changes) -> dict:
    """Evaluate and return the only row."""
    row, = eval_imagenet.main(dataclasses.replace(settings, **changes))
    return row


def timm_logits(model: torch.nn.Module, folder: Path | str, arguments: dict, *, use_train_size: bool = False,
                prefetch: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits, labels and file names by the steps of timm's validate.py."""
    data_config = resolve_input_data_config(model, arguments, use_test_size=not use_train_size)
    dataset = create_dataset(
        '', root=str(folder), split='validation', input_img_mode='RGB' if data_config['input_size'][0] == 3 else 'L')
    loader = create_loader(
        dataset, input_size=data_config['input_size'], batch_size=8, use_prefetcher=prefetch, num_workers=0,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        crop_pct=data_config['crop_pct'], crop_mode=data_config['crop_mode'], device=torch.device('cpu'))
    with torch.inference_mode():
        pairs = [(model(images), labels) for images, labels in loader]
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    return logits, labels, dataset.filenames(basename=True)


def timm_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Loss, top-1 and top-5 by the meters of timm's validate.py, batch by batch."""
    meters = {name: AverageMeter() for name in ('loss', 'top1', 'top5')}
    for output, target in zip(logits.split(8), labels.split(8), strict=True):
        top1, top5 = accuracy(output, target, topk=(1, 5))
        loss = torch.nn.functional.cross_entropy(output, target)
        for meter, value in zip(meters.values(), (loss, top1, top5), strict=True):
            meter.update(value.item(), len(output))
    return {name: meter.avg for name, meter in meters.items()}


def assert_scores(row: dict, logits: torch.Tensor, labels: torch.Tensor) -> None:
    for name, value in timm_scores(logits, labels).items():
        assert row[name] == pytest.approx(value, rel=2e-5, abs=1e-4), name
