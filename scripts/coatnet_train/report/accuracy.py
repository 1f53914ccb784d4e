"""Tables of accuracy: few labels, few images, other sizes, layouts, initialisation, training, the demo."""
from pathlib import Path

from coatnet_train.report.tables import NOT_MEASURED, hardware_of, read_json, spread, table, threads_of

__all__ = ['ablation', 'demo', 'robustness', 'small_data', 'training', 'transfer', 'weight_init']


def transfer(root: Path) -> str:
    """Table of few-label accuracy: fine-tuned, linear probe, and random start."""
    rows, images, origins = [], [], {}
    for file in sorted((root / 'results').glob('transfer_*.json')):
        report = read_json(file)
        settings, data = report['settings'], Path(report['settings']['data_dir']).name
        updates, size = ', '.join(map(str, settings['updates'])), settings['img_size'] or 'their own'
        origins[f'{data} at size {size}, updates: {updates}; {hardware_of(report["rows"])}'] = None
        for method, cells in report['table'].items():
            found = [cells.get(str(fraction)) for fraction in settings['fractions']]
            rows.append([f'`{settings["model"]}`', data, method, *(
                spread(cell) + (f' ({cell["subsets"]})' if cell else '') for cell in found)])
        if len({name for cells in report['table'].values() for name in cells}) > 1:  # not a single column of dots
            images.append(f'![Top-1 over the fraction of labels](../results/{file.stem}.png)')
    if not rows:
        return 'Transfer to few labels: not measured.'
    fractions = [f'{100 * fraction:g} % of the labels' for fraction in settings['fractions']]
    return (table(['weights', 'data', 'method', *fractions], rows)
            + '\n\nTop-1 (%) after the last epoch, mean and deviation over the draws (as many as in brackets).\n'
            + '\n'.join(f'{origin}.' for origin in origins) + '\n\n' + '\n'.join(images))


def small_data(root: Path) -> str:
    """Table of the recipes of finetune.py on few images."""
    file = root / 'results' / 'small_data_cpu.json'
    if not file.exists():
        return 'Recipes on few images: not measured.'
    report = read_json(file)
    rows, settings = [], report['settings']
    for name, models in report['table'].items():
        counts = sorted({row['images'] for row in report['rows'] if row['set'] == name})
        images = str(counts[0]) if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
        rows += [[name.replace('_', ' '), images, f'`{model}`',
                  *(spread(cells.get(recipe)) for recipe in settings['recipes'])] for model, cells in models.items()]
    seeds = min(cell['seeds'] for models in report['table'].values() for cells in models.values()
                for cell in cells.values())  # fewer than in the settings where rows are still missing
    recipes = [recipe if recipe == 'defaults' else f'`{recipe}`' for recipe in settings['recipes']]
    return (table(['images of', 'to train on', 'weights', *recipes], rows)
            + f'\n\nTop-1 (%) on other training images after the last epoch, mean and deviation over '
              f'{seeds} seed{"s" * (seeds > 1)}, each with images of its own;\n{report["hardware"]}, '
              f'{threads_of(settings["threads"])}.')


def robustness(root: Path) -> str:
    """Table of accuracy at other sizes and on corrupted images, without retraining."""
    file = root / 'results' / 'robustness_tin200_cpu.json'
    if not file.exists():
        return 'Other sizes and corrupted images: not measured.'
    report = read_json(file)
    rows = [[f'`{name}`', *(f'{top1:.2f}' for top1 in row.values())] for name, row in report['top1'].items()]
    return (table(['top-1 (%)', *next(iter(report['top1'].values()))], rows)
            + '\n\nOn the validation split of what the weights were trained on: whole images resized; at the size '
              'of the\nweights, JPEG at quality 30, Gaussian blur of radius 1 pixel, noise of deviation 0.1.\n\n'
              f'![Top-1 over size and under corruption](../results/{file.stem}.png)')


def ablation(root: Path) -> str:
    """Table of layouts and switches, with a column for each recipe under which they were trained."""
    files = {file: read_json(file) for file in sorted((root / 'results').glob('ablation_imagenette_64*.json'))}
    if not files:
        return 'Layouts and switches: not measured.'
    reports = sorted(files.values(), key=lambda report: report['settings']['epochs'])
    names = dict.fromkeys(name for report in reports for name, _ in sorted(
        report['rows'].items(), key=lambda item: -item[1]['top1']))
    rows = []
    for name in names:
        found = [report['rows'].get(name) for report in reports]
        row = next(row for row in found if row)
        speeds = [row['images_per_second'] for row in found if row and not isinstance(row['images_per_second'], str)]
        rows.append([f'`{name}`', *(spread(row, 'standard_error') for row in found), f'{row["parameters"] / 1e6:.2f}',
                     f'{row["multiply_adds"] / 1e6:.0f}', f'{speeds[0]:.0f}' if speeds else NOT_MEASURED])
    notes = []
    for report in reports:
        settings = report['settings']
        seeds = sorted({len(row['runs']) for row in report['rows'].values()})
        runs = [run for row in report['rows'].values() for run in row['runs']]
        hardware = hardware_of([run if 'hardware' in run else report for run in runs])
        notes.append(f'{settings["epochs"]} epochs in {"bfloat16" if settings["amp"] else "float32"}: '
                     f'{" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} '
                     f'seed{"s" * (seeds[-1] > 1)} a row, {hardware}.')
    single = '\nA row with one seed has no standard error: a point or two may be chance.' if any(
        len(row['runs']) == 1 for report in reports for row in report['rows'].values()) else ''
    return (table(['row', *(f'top-1 (%), {report["settings"]["epochs"]} epochs' for report in reports),
                   'parameters (M)', 'multiply-adds (M)', 'images/s'], rows)
            + f'\n\nImagenette at {reports[0]["settings"]["img_size"]} px, random start, top-1 of the last epoch, mean '
              'and standard error over the seeds.\n' + '\n'.join(notes) + single + '\n\n'
            + '\n'.join(f'![Top-1 of every row](../results/{file.stem}.png)' for file in files))


def weight_init(root: Path) -> str:
    """Table of initialisation schemes of a narrow model, by learning rate."""
    files = [read_json(file) for file in (root / 'results').glob('weight_init_*.json')]
    reports = sorted(files, key=lambda report: report['settings']['lr'])
    if not reports:
        return 'Initialisation schemes: not measured.'
    settings = reports[0]['settings']
    rows = [[f'`{name.partition("weight_init=")[2]}`', *(
        spread(report['rows'].get(name), 'standard_error', digits=2) for report in reports)]
        for name in reports[0]['rows']]
    return (table(['`weight_init`', *(f'top-1 (%), lr {report["settings"]["lr"]:g}' for report in reports)], rows)
            + f'\n\n`{settings["model"]}` at {settings["img_size"]} px after {settings["epochs"]} epochs, mean and '
              f'standard error of {len(settings["seeds"])} seeds, {hardware_of(reports)}.\n{reports[0]["note"]}.')


def training(root: Path) -> str:
    """Table of runs under one recipe from random weights."""
    file = root / 'results' / 'imagenette_64_cpu.json'
    if not file.exists():
        return 'Training side by side: not measured.'
    report = read_json(file)
    rows = [
        [f'`{name}`', f'{run["metrics"][-1]["eval_top1"]:.2f}', f'{run["summary"]["top1"]:.2f}',
         f'{run["parameters"] / 1e6:.2f}']
        for name, run in report['runs'].items()]
    recipe = report['recipe']
    return (table(['model', 'top-1 of the last epoch (%)', 'of the best epoch', 'parameters (M)'], rows)
            + f'\n\nImagenette at {recipe["img_size"]} px, random start, {recipe["epochs"]} epochs, '
              f'seed {recipe["seed"]}, one run each,\n{report["hardware"]}, 1 thread. A point or two may be chance.\n\n'
              f'![Held-out accuracy and loss over epochs](../results/{file.stem}.png)')


def demo(root: Path) -> str:
    """Table of the demo's accuracy after each epoch."""
    file = root / 'results' / 'demo_cpu.json'
    if not file.exists():
        return f'Accuracy and time of the demo: {NOT_MEASURED}.'
    report = read_json(file)
    rows = [[start, *(f'{top1:.1f}' for top1 in after)] for start, after in report['top1'].items()]
    return (table(['after epoch', *map(str, range(1, report['epochs'] + 1))], rows)
            + f'\n\nAccuracy (%) on held-out digits, {report["images"]} in all, by `{report["model"]}`, seed '
              f'{report["seed"]}; the demo takes\nthe best epoch by the same digits. {report["seconds"]:.0f} s on '
              f'{threads_of(report["threads"])} of {report["hardware"]}.')
