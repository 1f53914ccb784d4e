"""Recipes compared on small image sets: rows, table and plot of compare_recipes.py."""
import json
import shutil
import statistics
from dataclasses import asdict
from itertools import chain, count, product
from pathlib import Path

import torch
from matplotlib.figure import Figure

from coatnet_train.experiments.compare_recipes_config import DEFAULTS, CompareRecipesSettings
from coatnet_train.experiments.small_sets import MAKERS
from coatnet_train.plotting.style import BLUE, DARK, GREY, clean_axes
from coatnet_train.runtime.accelerator import choose_device
from coatnet_train.runtime.cli import ConfigError, earlier_results
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.recipes import recipe_settings
from coatnet_train.training.run import finetune

__all__ = ['run']


def recipe_of(name: str, model: str) -> dict:
    """Settings of a recipe with --amp off, so that results do not depend on the CPU's bfloat16 support."""
    return {**({} if name == DEFAULTS else recipe_settings(name, model)), 'amp': False}


def train(settings: CompareRecipesSettings, data: Path, name: str, model: str, recipe: str, seed: int) -> dict:
    """Fine-tune one run and return its row: score after the last epoch, batch size and epochs."""
    experiment = f'{name}-{seed}-{model.split(".")[0]}-{recipe}'
    shutil.rmtree(Path(settings.output) / experiment, ignore_errors=True)
    summary = finetune(FinetuneSettings(**{
        **recipe_of(recipe, model), 'data_dir': str(data), 'model': model, 'pretrained': True,
        'img_size': MAKERS[name][1], 'val_interval': 2**31, 'device': settings.device, 'workers': settings.workers,
        'seed': seed, 'output': settings.output, 'experiment': experiment}))
    used = json.loads((Path(settings.output) / experiment / 'args.json').read_text())
    shutil.rmtree(Path(settings.output) / experiment)
    counts = {split: len(list((data / split).glob('*/*'))) for split in ('train', 'validation')}
    return dict(set=name, model=model, recipe=recipe, seed=seed, images=counts['train'],
                held_out=counts['validation'], batch_size=used['batch_size'], epochs=used['epochs'],
                top1=summary['top1'], loss=summary['loss'], train_seconds=round(summary['train_seconds'], 1))


def summarize(settings: CompareRecipesSettings, rows: list[dict]) -> dict:
    """Make the report: mean and deviation of top-1 (%) over the seeds by set, model and recipe, and all rows."""
    table: dict = {}
    for row in rows:
        cell = table.setdefault(row['set'], {}).setdefault(row['model'], {}).setdefault(row['recipe'], [])
        cell.append(row['top1'])
    for models in table.values():
        for cells in models.values():
            for recipe, top1 in cells.items():
                deviation = statistics.stdev(top1) if len(top1) > 1 else 'not measured'
                cells[recipe] = dict(top1=statistics.mean(top1), deviation=deviation, seeds=len(top1))
    kept = {name: value for name, value in asdict(settings).items() if name not in ('output', 'results_file')}
    recipes: dict = {}
    made = ((row['recipe'], row['model']) for row in rows)
    for recipe, model in chain(product(settings.recipes, settings.models), made):
        recipes.setdefault(recipe, {})[model] = recipe_of(recipe, model)
    return json.loads(json.dumps(dict(
        settings=kept, recipes=recipes, table=table, rows=rows, **provenance(str(choose_device(settings.device))))))


def check_same(settings: CompareRecipesSettings, earlier: dict) -> None:
    """Raise ConfigError if earlier rows were made by a recipe whose settings have changed since."""
    for recipe, models in earlier['recipes'].items():
        for model, before in models.items():
            after = json.loads(json.dumps(recipe_of(recipe, model)))
            if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
                raise ConfigError(f'--results-file {settings.results_file} holds rows of another --recipes {recipe}, '
                                  f'with other {", ".join(changed)}; give another file.')


def plot(report: dict) -> Figure:
    """Plot top-1 by set and model: a bar at the mean of each recipe, and a dot for each seed."""
    sets = report['table']
    figure = Figure(figsize=(3.6 * len(sets), 4), layout='constrained')
    colours = dict(zip(report['recipes'], chain((GREY, BLUE), (f'C{number}' for number in count(1))), strict=False))
    for axes, (name, models) in zip(figure.subplots(1, len(sets), squeeze=False).flat, sets.items(), strict=True):
        for place, (model, cells) in enumerate(models.items()):
            for shift, (recipe, cell) in enumerate(cells.items()):
                x = place + 0.8 * (shift + 0.5) / len(cells) - 0.4
                axes.bar(x, cell['top1'], 0.7 / len(cells), color=colours[recipe], label='' if place else recipe)
                seeds = [row['top1'] for row in report['rows']
                         if (row['set'], row['model'], row['recipe']) == (name, model, recipe)]
                axes.plot([x] * len(seeds), seeds, 'o', color=DARK, alpha=0.6, markersize=3.5)
        axes.set_xticks(range(len(models)), [model.split('.')[0] for model in models], fontsize=8)
        counts = [row['images'] for row in report['rows'] if row['set'] == name]
        axes.set(title=f'{name.replace("_", " ")}: {round(statistics.mean(counts))} images', ylim=(0, 100))
        clean_axes(axes)
    figure.axes[0].set_ylabel('top-1 on held-out training images (%)')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc='outside upper left', ncols=2)
    return figure


def run(settings: CompareRecipesSettings) -> dict:
    """Make the missing rows, and return the report."""
    torch.set_num_threads(settings.threads)
    path = Path(settings.results_file) if settings.results_file else None
    rows: list[dict] = []
    if path and (earlier := earlier_results(settings.results_file, 'recipes', 'table', 'rows')):
        check_same(settings, earlier)
        rows = earlier['rows']
    for seed in settings.seeds:
        for name in settings.sets:
            data = Path(settings.output) / f'{name}-{seed}'
            shutil.rmtree(data, ignore_errors=True)
            MAKERS[name][0](settings, data, seed)
            for model in settings.models:
                for recipe in settings.recipes:
                    done = [tuple(row[key] for key in ('set', 'model', 'recipe', 'seed')) for row in rows]
                    if (name, model, recipe, seed) in done:
                        continue
                    rows.append(train(settings, data, name, model, recipe, seed))
                    report = summarize(settings, rows)
                    rows[-1].update((fact, report[fact]) for fact in ('hardware', 'commit', 'date'))
                    if path:
                        write_json(path, summarize(settings, rows))
                        write_figure(path.with_suffix('.png'), plot(report))
    report = summarize(settings, rows)
    for name, models in report['table'].items():
        for model, cells in models.items():
            for recipe, cell in cells.items():
                deviation = '' if isinstance(cell['deviation'], str) else f' +- {cell["deviation"]:.1f}'
                print(f'{name:16} {model:36} {recipe:12} {cell["top1"]:6.1f} %{deviation}  ({cell["seeds"]} seeds)')
    return report
