"""Training of layouts and switches under one recipe: runs, table and plot of ablation.py."""
import csv
import json
import shutil
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from coatnet_train.benchmarks import models as benchmark_models
from coatnet_train.benchmarks.config import ModelPairSettings
from coatnet_train.experiments.ablation_config import GRIDS, AblationSettings
from coatnet_train.models.model_size import model_size
from coatnet_train.plotting.style import BLUE, GREY, clean_axes
from coatnet_train.runtime.accelerator import choose_device
from coatnet_train.runtime.cli import ConfigError, changed_flags, check_output, earlier_results, parse_argument
from coatnet_train.runtime.files import write_file, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.run import finetune


def model_kwargs(settings: AblationSettings, row: str) -> tuple[str, ...]:
    """Model arguments of a row, as key=value."""
    layout, *switches = row.split()
    return (*settings.model_kwargs, f'layout={layout}', *switches)


def check_same(settings: AblationSettings, earlier: dict) -> None:
    """Raise ConfigError if earlier runs were made under other settings."""
    names = ('model', 'model_kwargs', 'img_size', 'epochs', 'batch_size', 'lr', 'amp')
    changed = changed_flags(settings, earlier, names)
    if changed:
        raise ConfigError(f'--results-file {settings.results_file} holds runs made under other settings: '
                          f'{"; ".join(changed)}. Give another file, and another --output.')


def train(settings: AblationSettings, row: str, seed: int) -> dict:
    """Train one run, or resume an interrupted one; returns its last epoch."""
    experiment = ''.join(c if c.isalnum() else '-' for c in row.replace('"', '')) + f'-seed{seed}'
    run_dir = Path(settings.output) / experiment
    check_output(run_dir)
    finetune(FinetuneSettings(
        data_dir=settings.data_dir, model=settings.model, img_size=settings.img_size, epochs=settings.epochs,
        model_kwargs=model_kwargs(settings, row),
        batch_size=settings.batch_size, lr=settings.lr, scale=(0.35, 1.0), color_jitter=0.0, amp=settings.amp,
        warmup_epochs=min(1.0, settings.epochs),
        device=settings.device, workers=settings.workers, seed=seed, output=settings.output,
        experiment=experiment, resume='auto'))
    if settings.results_file:
        metrics = Path(settings.results_file).with_suffix('') / f'{experiment}.csv'
        metrics.parent.mkdir(exist_ok=True)
        write_file(metrics, partial(shutil.copyfile, run_dir / 'metrics.csv'))
    with (run_dir / 'metrics.csv').open(newline='', encoding='utf-8') as file:
        last = list(csv.DictReader(file))[-1]
    return dict(seed=seed, top1=float(last['eval_top1']), loss=float(last['eval_loss']), epochs=int(last['epoch']))


def summarize(settings: AblationSettings, runs: dict[str, list[dict]]) -> dict:
    """Make the report: mean top-1, its standard error (with two seeds or more) and the model size of each row."""
    table = {}
    for row, found in runs.items():
        if not found:
            continue
        parameters, multiply_adds, _ = model_size(
            settings.model, img_size=settings.img_size, num_classes=10,
            **dict(map(parse_argument, model_kwargs(settings, row))))
        top1 = [run['top1'] for run in found]
        table[row] = dict(
            top1=statistics.mean(top1), runs=found, parameters=parameters, multiply_adds=multiply_adds,
            standard_error=statistics.stdev(top1) / len(top1) ** .5 if len(top1) > 1 else 'not measured',
            images_per_second='not measured')
    kept = {name: value for name, value in asdict(settings).items() if name not in ('data_dir', 'output')}
    kept['seeds'] = sorted({run['seed'] for found in runs.values() for run in found} | set(settings.seeds))
    return dict(settings=kept, rows=table, **provenance(str(choose_device(settings.device))))


def measure_speed(settings: AblationSettings, rows: list[str]) -> dict[str, float]:
    """Images/s of every row in inference form: the rows take turns, and the median window counts."""
    device = str(choose_device(settings.device))
    timing = ModelPairSettings(
        model=settings.model, against=settings.model, batch_size=settings.batch_size, img_size=settings.img_size,
        threads=settings.threads, amp=settings.amp, device=device)
    steps = {row: benchmark_models.build(
        timing, settings.model,  model_kwargs(settings, row), 'inference') for row in rows}
    windows: dict[str, list[float]] = {row: [] for row in rows}
    for index in range(timing.rounds + 1):
        for row, step in steps.items():
            throughput = benchmark_models.images_per_second(step, timing)
            if index:  # the first round warms up
                windows[row].append(throughput)
    return {row: round(statistics.median(throughputs), 1) for row, throughputs in windows.items()}


def plot(report: dict, path: Path) -> None:
    """Write a plot of the top-1 of every row: a dot for each run, a bar at the mean."""
    rows = report['rows']
    names = sorted(rows, key=lambda row: rows[row]['top1'])
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(names)), layout='constrained')
    axes = figure.subplots()
    for y, name in enumerate(names):
        top1 = [run['top1'] for run in rows[name]['runs']]
        color = BLUE if ' ' not in name else GREY
        axes.plot(top1, [y] * len(top1), 'o', color=color, alpha=0.55, markersize=5)
        axes.plot([rows[name]['top1']] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(names)), [name.replace('"', '') for name in names], family='monospace')
    settings = report['settings']
    axes.set(xlabel='top-1 on the validation split (%)',
             title=f'{settings["model"]} at {settings["img_size"]} px, {settings["epochs"]} epochs')
    clean_axes(axes, 'x')
    write_file(path, lambda temporary: figure.savefig(temporary, format='png', dpi=130))


def write_report(settings: AblationSettings, report: dict) -> None:
    for row, cells in report['rows'].items():
        error, throughput = cells['standard_error'], cells['images_per_second']
        print(f'{row:28s} {cells["top1"]:6.2f} % {"" if isinstance(error, str) else f"+- {error:.2f}":8s}'
              f'{cells["parameters"] / 1e6:7.2f} M {cells["multiply_adds"] / 1e6:8.1f} M   {throughput} images/s')
    if settings.results_file:
        write_json(Path(settings.results_file), report)
        plot(report, Path(settings.results_file).with_suffix('.png'))


def run(settings: AblationSettings) -> dict:
    """Train the missing runs, or with --speed time the rows of a report, and return the report."""
    torch.set_num_threads(settings.threads)
    rows = settings.rows or GRIDS[settings.grid]
    if settings.speed:
        report = json.loads(Path(settings.results_file).read_text())
        for row, throughput in measure_speed(settings, list(report['rows'])).items():
            report['rows'][row]['images_per_second'] = throughput
        report['speed'] = dict(batch_size=settings.batch_size, threads=settings.threads, amp=settings.amp,
                               **provenance(str(choose_device(settings.device))))
        write_report(settings, report)
        return report
    earlier = earlier_results(settings.results_file, 'settings', 'rows') if settings.results_file else None
    runs: dict[str, list[dict]] = {row: [] for row in rows}
    if earlier:
        check_same(settings, earlier['settings'])
        runs |= {row: cells['runs'] for row, cells in earlier['rows'].items()}
    report = summarize(settings, runs)
    for seed in settings.seeds:
        for row in rows:
            if any(run['seed'] == seed for run in runs[row]):
                continue
            runs[row].append(train(settings, row, seed))
            report = summarize(settings, runs)
            runs[row][-1].update((fact, report[fact]) for fact in ('hardware', 'commit', 'date'))
            write_report(settings, report)
    return report
