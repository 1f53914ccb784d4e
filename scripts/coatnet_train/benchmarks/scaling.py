"""Inference time of models over image sizes, and the exponent a of time ~ pixels^a."""
import statistics
from contextlib import nullcontext
from dataclasses import asdict
from itertools import cycle
from math import log
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from coatnet_train.benchmarks.config import ModelPairSettings, ScalingSettings, check_scaling
from coatnet_train.benchmarks.models import build, check_machine, images_per_second
from coatnet_train.plotting.style import BLUE, DARK, GREY, clean_axes
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.files import write_file, write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance


def measure(settings: ScalingSettings) -> dict[str, dict[int, float]]:
    """Milliseconds per image by model and size; raises ConfigError for a size that a model does not take."""
    timing = {size: ModelPairSettings(
        model='', against='', batch_size=settings.batch_size, img_size=size, threads=settings.threads,
        window=settings.window, amp=settings.amp, compile=settings.compile, device=settings.device, seed=settings.seed,
    ) for size in settings.sizes}
    steps = {}
    for name in settings.models:
        for size in settings.sizes:
            try:
                steps[name, size] = build(timing[size], name, (), 'inference')
            except ValueError as error:  # a size that the model does not take
                raise ConfigError(f'--sizes {size}: {name}: {error}') from error
    windows: dict[tuple[str, int], list[float]] = {turn: [] for turn in steps}
    with progress_bar(total=len(steps) * (settings.rounds + 1), unit='window', desc='benchmark scaling') as bar:
        for step in steps.values():
            step(), step()
            bar.update()
        for index in range(settings.rounds):
            for name, size in sorted(steps, reverse=bool(index % 2)):  # alternate the order
                windows[name, size].append(1e3 / images_per_second(steps[name, size], timing[size]))
                bar.update()
    return {name: {size: statistics.median(windows[name, size]) for size in sorted(set(settings.sizes))}
            for name in settings.models}


def exponent(times: dict[int, float]) -> float:
    """Exponent a of time ~ pixels^a, by least squares on the logarithms."""
    return statistics.linear_regression([log(size ** 2) for size in times], [log(ms) for ms in times.values()]).slope


def draw(models: dict[str, dict], path: Path, title: str) -> None:
    """Write a log-log plot of time over pixels, in which an exponent is a slope."""
    figure = Figure(figsize=(7, 5), layout='constrained')
    axes = figure.subplots()
    styles = cycle((color, line) for line in ('.-', '.--', '.:') for color in (BLUE, GREY, DARK))
    for (name, row), (color, line) in zip(models.items(), styles, strict=False):
        pixels = [int(size) ** 2 for size in row['times_ms']]
        label = f'{name}: pixels$^{{{row["exponent"]:.2f}}}$'
        axes.loglog(pixels, list(row['times_ms'].values()), line, color=color, label=label)
    axes.set_xticks(pixels, [f'{size}²' for size in row['times_ms']])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set(xlabel='pixels', ylabel='ms an image', title=title)
    clean_axes(axes)
    axes.legend(frameon=False)
    write_file(path, lambda temporary: figure.savefig(temporary, format='png', dpi=150))


def main(settings: ScalingSettings) -> dict:
    """Measure, print and return the results."""
    check_scaling(settings)
    check_machine(settings.device, settings.models, settings.amp)
    torch.set_num_threads(settings.threads)
    # no dynamic-shape graphs, which would be other code, and a recompile limit for every model at every size
    compiling = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=len(settings.models) * len(settings.sizes) + 1,
    ) if settings.compile else nullcontext()
    with compiling:
        times = measure(settings)
    models = {
        name: dict(times_ms={str(size): round(ms, 3) for size, ms in row.items()}, exponent=round(exponent(row), 3))
        for name, row in times.items()}
    report = dict(
        settings={key: value for key, value in asdict(settings).items() if key != 'results_file'},
        models=models, **provenance(settings.device))
    print(f'\nms an image, batch {settings.batch_size}, {report["hardware"]}')
    print(f'  {"":28s}{"".join(f"{size:10d}" for size in sorted(set(settings.sizes)))}  exponent')
    for name, row in models.items():
        print(f'  {name:28s}{"".join(f"{ms:10.2f}" for ms in row["times_ms"].values())}{row["exponent"]:10.2f}')
    if settings.results_file:
        file = Path(settings.results_file)
        write_json(file, report)
        draw(models, file.with_suffix('.png'), f'Inference, batch {settings.batch_size}, {report["hardware"]}')
    return report
