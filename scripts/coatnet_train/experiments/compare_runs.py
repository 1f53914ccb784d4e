"""Comparison of finished runs: shared and differing settings, curves, and the report."""
import csv
import json
from pathlib import Path

import timm
from matplotlib.figure import Figure

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm
from coatnet_train.plotting.style import BLUE, GREEN, ORANGE, PURPLE, SLATE, clean_axes, use_integer_epochs
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import upgrade_fields

__all__ = ['name_runs', 'run']

# Settings that may differ between compared runs: they identify a run or its machine, not its recipe.
OWN = {
    'model', 'model_kwargs', 'output', 'experiment', 'resume', 'workers', 'tracker', 'recovery_interval', 'device',
    'amp_if_native', 'last_epoch', 'dataset_download'}
COLOURS = BLUE, ORANGE, GREEN, PURPLE, SLATE


def name_runs(folders: tuple[Path, ...]) -> list[str]:
    """Shortest path endings that distinguish the folders; raises ConfigError for a folder given twice."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ConfigError(f'RUNS must be different folders, got {" ".join(map(str, folders))}; leave out what is '
                          f'named twice.')
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def different_settings(runs: dict[str, dict]) -> dict[str, list]:
    """Settings outside of OWN that differ, each with its value in every run (None if missing)."""
    every = [run['args'] for run in runs.values()]
    shared = {name: None for args in every for name in args if name not in OWN}
    values = {name: [args.get(name) for args in every] for name in shared}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def read_run(folder: Path) -> dict:
    """Read summary, settings, metrics and number of parameters of a run; raises ConfigError if it is not finished."""
    try:
        parts = {name: json.loads((folder / f'{name}.json').read_text()) for name in ('summary', 'args')}
        parts['args'] = upgrade_fields(parts['args'])
        with (folder / 'metrics.csv').open(newline='', encoding='utf-8') as file:
            metrics = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise ConfigError(f'{folder} must be the folder of a finished run of finetune.py, but has no '
                          f'{Path(error.filename).name}; give another, or let it finish.') from error
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f'{folder} must be the folder of a finished run of finetune.py, but cannot be read: '
                          f'{one_line(error)}; give another.') from error
    if not metrics or 'hardware' not in parts['summary']:
        raise ConfigError(f'{folder} must have an epoch in metrics.csv and hardware in summary.json, which older '
                          f'versions of finetune.py left out; train it again.')
    return parts | {'metrics': metrics, 'parameters': parameters(folder)}


def parameters(folder: Path) -> int:
    """Number of parameters of the trained model; raises ConfigError if it cannot be built from config.json."""
    try:
        model = timm.create_model(f'local-dir:{folder}')
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f'{folder}: its config.json does not give the model that was trained: {one_line(error)}; '
                          f'give another folder.') from error
    return sum(p.numel() for p in model.parameters())


def draw(runs: dict[str, dict]) -> Figure:
    """Plot held-out accuracy, and held-out and training loss, over epochs."""
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
        use_integer_epochs(axes)
        clean_axes(axes)
    return figure


def run(folders: tuple[str, ...], results_file: str = '', allow_different: bool = False) -> dict:
    """Print the table, write the files, and return what they hold.

    Args:
        folders: Run folders, at most as many as COLOURS.
        results_file: JSON to write, with a plot beside it.
        allow_different: Also compare runs with different recipes.

    Raises ConfigError for folders that are not finished runs, different recipes, or files that cannot be written.
    """
    folders = tuple(map(Path, folders))
    runs = {name: read_run(folder) for name, folder in zip(name_runs(folders), folders, strict=True)}
    different = different_settings(runs)
    lines = [f'{name}: {" | ".join(map(str, values))}' for name, values in different.items()]
    if different and not allow_different:
        raise ConfigError(f'RUNS must share their recipe, but of {" | ".join(runs)} differ {", ".join(lines)}; '
                          f'train them alike, or add --allow-different.')
    if different:
        print(f'NOT of one recipe: {" | ".join(runs)}', *lines, sep='\n  ')
    width = max(28, *map(len, runs))
    for name, run in runs.items():
        last, summary = run['metrics'][-1], run['summary']
        print(f'{name:{width}} top-1 after the last epoch {last["eval_top1"]:6.2f} %   best {summary["top1"]:6.2f} %')
    hardware = sorted({run['summary']['hardware'] for run in runs.values()})
    origin = provenance('cpu') | {'hardware': ' and '.join(hardware)}
    first = next(iter(runs.values()))['args']
    shared = {key: value for key, value in first.items() if key not in OWN and key not in different}
    report = {'recipe': shared, **({'different': different} if different else {}), 'runs': {
        name: {'model_kwargs': run['args']['model_kwargs'], 'summary': run['summary'], 'metrics': run['metrics'],
               'parameters': run['parameters']}
        for name, run in runs.items()}, **origin}
    if results_file:
        path = Path(results_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_figure(path.with_suffix('.png'), draw(runs))
            write_json(path, report)
        except OSError as error:
            raise ConfigError(f'--results-file {path} cannot be written: {one_line(error)}; '
                              f'choose another.') from error
    return report
