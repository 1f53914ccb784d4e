"""Set finished runs of finetune.py side by side: a table, their curves, and a file with both and where they come from.

    python scripts/compare.py output/imagenette_64/coatnet_pico_64 output/imagenette_64/convnextv2_femto \\
        --results-file results/imagenette_64_cpu.json
"""
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timm
import tyro
from files import write_figure, write_json
from matplotlib.figure import Figure
from provenance import provenance
from settings import SettingsError, end_with_sentence, one_line, parse_argument
from timm.models import resolve_model_input_args

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm

# What may differ between runs that are compared: who they are, not how they were trained.
OWN = {'model', 'model_kwargs', 'output', 'experiment', 'resume', 'workers', 'tracker', 'recovery_interval', 'device'}
COLOURS = '#2563eb', '#d97706', '#059669', '#7c3aed', '#6b7280'


@dataclass(frozen=True)
class Settings:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # Run folders.
    results_file: str = ''  # JSON to write, and a plot beside it as .png.


def read_run(folder: Path) -> dict:
    """Summary, settings and metrics of a run folder."""
    try:
        parts = {name: json.loads((folder / f'{name}.json').read_text()) for name in ('summary', 'args')}
        with (folder / 'metrics.csv').open(newline='', encoding='utf-8') as file:
            metrics = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise SettingsError(f'{folder} must be the folder of a finished run of finetune.py, but has no '
                            f'{Path(error.filename).name}; give another, or let it finish.') from error
    except (ValueError, TypeError, OSError) as error:
        raise SettingsError(f'{folder} must be the folder of a finished run of finetune.py, but cannot be read: '
                            f'{one_line(error)}; give another.') from error
    if not metrics or 'hardware' not in parts['summary']:
        raise SettingsError(f'{folder} must have an epoch in metrics.csv and hardware in summary.json, which older '
                            f'versions of finetune.py left out; train it again.')
    return parts | {'metrics': metrics}


def parameters(run: dict) -> int:
    """Parameters of the model that was trained."""
    args = run['args']
    img_size = resolve_model_input_args(args['model'], {'img_size': args['img_size']}).get('img_size')
    model = timm.create_model(
        args['model'], num_classes=run['summary']['num_classes'], img_size=img_size,
        **dict(map(parse_argument, args['model_kwargs'])))
    return sum(p.numel() for p in model.parameters())


def draw(runs: dict[str, dict]) -> Figure:
    """Held-out accuracy and loss over epochs."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    accuracy, loss = figure.subplots(1, 2)
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        epochs = [row['epoch'] for row in run['metrics']]
        accuracy.plot(epochs, [row['eval_top1'] for row in run['metrics']], '.-', color=colour, label=name)
        loss.plot(epochs, [row['eval_loss'] for row in run['metrics']], '.-', color=colour)
        loss.plot(epochs, [row['train_loss'] for row in run['metrics']], ':', color=colour)
    accuracy.set(xlabel='epoch', ylabel='held out, top-1 (%)', title='Accuracy')
    loss.set(xlabel='epoch', ylabel='cross-entropy (nats)', title='Loss held out; dotted, in training (augmented)')
    accuracy.legend(frameon=False)
    for axes in (accuracy, loss):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#e5e7eb')
        axes.set_axisbelow(True)
    return figure


def main(settings: Settings) -> dict:
    """Print the table, write the files, and return what they hold."""
    if not 2 <= len(settings.runs) <= len(COLOURS):
        raise SettingsError(f'RUNS must be two to {len(COLOURS)} run folders, got {len(settings.runs)}.')
    if settings.results_file and Path(settings.results_file).suffix != '.json':
        raise SettingsError(f'--results-file must end in .json, got {settings.results_file}.')
    runs = {Path(run).name: read_run(Path(run)) for run in settings.runs}
    if len(runs) < len(settings.runs):
        raise SettingsError(f'RUNS must differ in the names of their folders, got {" ".join(settings.runs)}.')
    first, *others = (run['args'] for run in runs.values())
    for other in others:
        if differing := sorted(name for name in first if name not in OWN and first[name] != other.get(name)):
            raise SettingsError(f'RUNS must share their recipe, but {", ".join(differing)} differ between '
                                f'{first["model"]} and {other["model"]}.')
    for name, run in runs.items():
        last, summary = run['metrics'][-1], run['summary']
        print(f'{name:28} top-1 after the last epoch {last["eval_top1"]:6.2f} %   best {summary["top1"]:6.2f} %')
    hardware = sorted({run['summary']['hardware'] for run in runs.values()})
    origin = provenance('cpu') | {'hardware': ' and '.join(hardware)}
    report = {'recipe': {key: value for key, value in first.items() if key not in OWN}, 'runs': {
        name: {'model_kwargs': run['args']['model_kwargs'], 'summary': run['summary'], 'metrics': run['metrics'],
               'parameters': parameters(run)}
        for name, run in runs.items()}, **origin}
    if settings.results_file:
        path = Path(settings.results_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_figure(path.with_suffix('.png'), draw(runs))
            write_json(path, report)
        except OSError as error:
            raise SettingsError(f'--results-file {path} cannot be written: {one_line(error)}; '
                                f'choose another.') from error
    return report


if __name__ == '__main__':
    end_with_sentence('compare.py', lambda: main(tyro.cli(Settings, description=__doc__)))
