"""Cost of a training step with stored teacher outputs relative to one with labels alone."""
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.models import save_for_hf

from coatnet_train.benchmarks.config import DistillationSettings, check_distillation
from coatnet_train.benchmarks.models import check_machine
from coatnet_train.benchmarks.timing import synchronize
from coatnet_train.runtime.accelerator import create_accelerator
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.run import create_trainer
from coatnet_train.training.teach_config import TeachSettings
from coatnet_train.training.teaching import teach
from coatnet_train.training.trainer import Trainer

IMAGE_SIZE = 64  # height and width of the files, as in Tiny-ImageNet
IMAGES_PER_CLASS = 4


def write_images(folder: Path, classes: int) -> list[str]:
    """Write JPEG files of noise into train/ and validation/, and return the class names."""
    rng, names = np.random.default_rng(0), [f'{number:05}' for number in range(classes)]
    for split, count in (('train', IMAGES_PER_CLASS), ('validation', 1)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.jpg')
    return names


def batches_of(trainer: Trainer) -> Iterator[list[torch.Tensor]]:
    """Endless batches, epoch after epoch."""
    while True:
        trainer.progress.batch = 0
        yield from trainer.remaining_batches()
        trainer.progress.epoch += 1


def measure(trainer: Trainer, batches: Iterator, steps: int, device: str) -> float:
    """Seconds of a step including image loading: CPU time of this process on a CPU, wall time on a GPU."""
    clock = time.process_time if device == 'cpu' else time.perf_counter
    synchronize(device)
    begun = clock()
    for _ in range(steps):
        images, targets, _, *stored = next(batches)
        trainer.train_step(images, targets, *stored)
    synchronize(device)
    return (clock() - begun) / steps


def prepare(settings: DistillationSettings, folder: Path, accelerator: Accelerator) -> dict[str, Trainer]:
    """Trainers on the same images by name: labels alone, all logits of a teacher, and its `top_k` largest logits."""
    names = write_images(folder / 'data', settings.classes)
    torch.manual_seed(settings.seed)
    (folder / 'teacher').mkdir()
    save_for_hf(timm.create_model('test_vit', num_classes=settings.classes), folder / 'teacher',
                {'label_names': names}, safe_serialization=True)
    shared = dict(data_dir=str(folder / 'data'), img_size=settings.img_size, cache_images=settings.cache_images,
                  interpolation='bicubic', workers=0, device=settings.device, seed=settings.seed)
    plain = FinetuneSettings(
        **shared, model=settings.model, batch_size=settings.batch_size, epochs=1000, output=str(folder),
        warmup_epochs=0.)
    trainers = {}
    for name, top_k in (('labels', None), ('all_logits', None), (f'top_{settings.top_k}', settings.top_k)):
        run_settings = replace(plain, experiment=name)
        if name != 'labels':
            stored = teach(TeachSettings(
                **shared, teacher=f'local-dir:{folder / "teacher"}', teacher_img_size=settings.img_size,
                views=settings.views, top_k=top_k, output=str(folder / f'outputs_{name}')))
            run_settings = replace(run_settings, teacher_outputs=str(folder / f'outputs_{name}'))
            assert stored['complete']
        trainers[name], _, _ = create_trainer(run_settings, accelerator, folder / name, None)
        trainers[name].task.train()
    return trainers


def main(settings: DistillationSettings) -> dict:
    """Measure, print and return the results."""
    check_distillation(settings)
    check_machine(settings.device, (settings.model,))
    torch.set_num_threads(settings.threads)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = prepare(settings, Path(folder), create_accelerator(settings.device))
        batches = {name: batches_of(trainer) for name, trainer in trainers.items()}
        for round_ in progress_bar(range(settings.rounds + 1), unit='round', desc='benchmark distillation'):
            for name in sorted(trainers, reverse=bool(round_ % 2)):  # alternate the order
                found = measure(trainers[name], batches[name], settings.steps, settings.device)
                if round_:  # the first round warms up
                    seconds.setdefault(name, []).append(found)
        for trainer in trainers.values():
            trainer.bar.close()
    results = {}
    for name, found in seconds.items():
        quartiles = statistics.quantiles([value / plain - 1 for value, plain in zip(
            found, seconds['labels'], strict=True)], n=4)
        results[name] = dict(
            seconds_per_step=statistics.median(found),
            over_labels=statistics.median(found) / statistics.median(seconds['labels']) - 1,
            over_labels_of_a_round=dict(zip(('q1', 'median', 'q3'), quartiles, strict=True)))
    report = dict(
        settings={key: value for key, value in asdict(settings).items() if key != 'results_file'},
        clock='CPU time of the process' if settings.device == 'cpu' else 'wall time', results=results,
        rounds=seconds, **provenance(settings.device))
    for name, row in results.items():
        print(f'{name:12} {row["seconds_per_step"] * 1e3:9.2f} ms a step  {100 * row["over_labels"]:+6.2f} %  '
              f'(of a round {100 * row["over_labels_of_a_round"]["median"]:+.2f} %)')
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
