"""Throughput and peak memory of models that take turns, stored after every round."""
import statistics
from collections.abc import Callable

import torch
from tqdm import tqdm

from coatnet_train.benchmarks.config import ModelPairSettings
from coatnet_train.benchmarks.models import build, images_per_second
from coatnet_train.benchmarks.rows import NOT_MEASURED
from coatnet_train.benchmarks.timing import peak_memory
from coatnet_train.runtime.cli import one_line

__all__ = ['measure_models']


def measure_models(names: tuple[str, ...], mode: str, timing: ModelPairSettings,
                   store: Callable[[list[dict]], object]) -> list[dict]:
    """Time models in turns, and return a row for each.

    Args:
        names: Names of the models.
        mode: 'inference' or 'training'.
        timing: Batch, size, precision, device and windows; its models are ignored.
        store: Called with all rows after each model is built and after each round.
    """
    steps, rows = {}, {}
    for name in names:
        rows[name] = dict(
            model=name, mode=mode, form='compiled' if timing.compile else 'eager',
            precision='bfloat16 autocast' if timing.amp else 'float32', batch_size=timing.batch_size,
            img_size=timing.img_size, device=timing.device, images_per_second=NOT_MEASURED, peak_mib=NOT_MEASURED,
            rounds=0)
        made: list[Callable[[], None]] = []

        def prepare(name: str = name, made: list = made) -> None:
            """Build the model and take three steps, so that the peak includes the weights."""
            made.append(build(timing, name, (), mode))
            for _ in range(3):
                made[0]()

        try:
            peak = peak_memory(prepare, timing.device)
        except RuntimeError as error:  # out of memory
            tqdm.write(f'{name}, {mode}: not measured: {one_line(error)}')
            continue
        if peak is not None:
            rows[name]['peak_mib'] = round(peak, 1)
        steps[name] = made[0]
        rows[name] |= dict(images_per_second=round(images_per_second(steps[name], timing), 2), rounds=1)
        store(list(rows.values()))
    windows: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(timing.rounds):
        for name in sorted(steps, reverse=bool(index % 2)):  # alternate the order
            windows[name].append(images_per_second(steps[name], timing))
            rows[name] |= dict(images_per_second=round(statistics.median(windows[name]), 2), rounds=index + 1)
        store(list(rows.values()))
    for row in rows.values():
        memory = row['peak_mib']
        tqdm.write(f'{row["model"]:32s} {row["form"]} {mode}, batch {row["batch_size"]} at {row["img_size"]}: '
                   f'{row["images_per_second"]} images/s, peak {memory}{"" if isinstance(memory, str) else " MiB"}')
    torch._dynamo.reset()
    return list(rows.values())
