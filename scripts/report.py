"""Fill the tables of README.md and MODEL_CARD.md from the files under results/.

    python scripts/report.py            rewrite the tables
    python scripts/report.py --count    count parameters and multiply-adds anew first, into results/models.json
    python scripts/report.py --check    exit with 1 if a table is not what the files say
"""
import csv
import json
import re
import statistics
import sys
from pathlib import Path

from coatnet_train.runtime.cli import run_cli, tyro
from coatnet_train.runtime.files import write_file, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'results'
RELEASES = ROOT / 'coatnet_zoo' / 'weights' / 'releases.json'
DOCUMENTS = ('README.md', 'MODEL_CARD.md', 'scripts/launch/README.md')
NOT_MEASURED = 'not measured'
# epochs and images of the CoAtNet paper's runs: appendix A.2, and the sizes of ImageNet-1k and of its 21k set
PAPER_RUNS = {'ImageNet-1k, 300 epochs': (300, 1_281_167), 'ImageNet-21k, 90 epochs': (90, 14_197_122)}
# the small models of the zoo and timm's of like size, which are to be trained alike on Tiny-ImageNet-200
COMPARED_MODELS = (
    'coatnet_pico_64', 'lightconvnet_pico_64', 'dynamicconvnet_pico_64', 'coatnet_pico_ccdd_64', 'convnextv2_femto',
    'resnet18', 'coatnet_pico_rw_224')


def count_models() -> dict:
    """Parameters and multiply-adds of every name of the zoo, at its own image size, on the meta device."""
    import coatnet_zoo  # these take seconds, and only --count needs them
    from coatnet_train.models.model_size import model_size
    from coatnet_train.runtime.provenance import provenance

    counts = {}
    for name in coatnet_zoo.list_models():
        parameters, multiply_adds, model = model_size(name, num_classes=1000)  # whatever is released for it
        counts[name] = dict(
            layout=model.cfg.layout, parameters=parameters, multiply_adds=multiply_adds, img_size=model.img_size[0],
            strides=[level['reduction'] for level in model.feature_info])
    return dict(models=counts, **provenance('cpu'))


def table(header: list[str], rows: list[list[str]]) -> str:
    alignment = ['-:' if any(c.isdigit() for c in cell[:1]) else '-' for cell in rows[0]]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, alignment, *rows))


def model_table() -> str:
    """The models by size."""
    counts = json.loads((RESULTS / 'models.json').read_text())['models']
    rows = [
        [f'`{name}`', row['layout'], f'{row["parameters"] / 1e6:.2f}', f'{row["multiply_adds"] / 1e9:.2f}',
         str(row['img_size']), ' '.join(map(str, row['strides']))]
        for name, row in sorted(counts.items(), key=lambda item: item[1]['parameters'])]
    header = ['name', 'layout', 'parameters (M)', 'multiply-adds (G)', 'image size', 'strides of the features']
    return table(header, rows) + '\n\nEach with 1000 classes.'


def weights() -> str:
    """The released weights, from coatnet_zoo/weights/releases.json."""
    releases = json.loads(RELEASES.read_text(encoding='utf-8'))
    if not releases:
        return ('No weights are released yet: models start from random initialisation, or from weights of your own, '
                'and\n`pretrained=True` says so. Accuracy, robustness and biases: not measured.')
    rows = []
    for name, entry in sorted(releases.items()):
        release, metrics, link = entry['release'], entry['release']['metrics'], entry['repo']
        places = ['the package'] * bool(entry['packaged']) + [f'[{link}](https://huggingface.co/{link})'] * bool(link)
        rows.append([
            f'`{name}`', *(NOT_MEASURED if metrics[key] is None else f'{metrics[key]:.2f}' for key in ('top1', 'top5')),
            release['evaluated_on'], release['trained_on'] or 'not stated',
            NOT_MEASURED if release['hours'] is None else f'{release["hours"]:.1f} h on {release["hardware"]}',
            f'{entry["size"] / 1e6:.1f}', ', '.join(places),
            release['license_name'] or entry['pretrained_cfg']['license'], f'`{entry["sha256"][:12]}`'])
    header = ['name', 'top-1 (%)', 'top-5 (%)', 'measured on', 'trained on', 'training', 'MB', 'comes with', 'licence']
    return table([*header, 'sha256'], rows)


def preview_results() -> str:
    """Top-1 of each run on Tiny-ImageNet-200 after its last epoch, and of eval_imagenet.py on the validation split."""
    def reached(column: str, *patterns: str) -> str:
        found = [list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))[-1]
                 for pattern in patterns for path in sorted(RESULTS.glob(pattern))]
        if not found:
            return NOT_MEASURED
        top1, details = [float(row[column]) for row in found], []
        if len(top1) > 1:
            details += [f'{min(top1):.2f} to {max(top1):.2f}', f'{len(top1)} seeds']
        if epochs := sorted({row['epoch'] for row in found if 'epoch' in row}):
            details += [f'{" and ".join(epochs)} epochs']
        return f'{statistics.mean(top1):.2f}' + (f' ({", ".join(details)})' if details else '')

    def previewed(name: str, file: str, column: str = 'eval_top1') -> str:
        return reached(column, f'tin200_preview/{name}/{file}', f'tin200_preview/{name}-seed*/{file}')

    others = {folder.name.split('-seed')[0] for folder in (RESULTS / 'tin200_preview').glob('*')} - set(COMPARED_MODELS)
    rows = [[f'`{name}`', previewed(name, 'metrics.csv'), previewed(name, 'metrics_more.csv'),
             previewed(name, 'validation.csv', 'top1'), reached('eval_top1', f'tin200/{name}-seed*/metrics.csv')]
            for name in (*COMPARED_MODELS, *sorted(others))]
    return table(['top-1 (%) on 2,000 images held out of train', 'after `tin200_preview`',
                  'then `tin200_preview_more`', 'that, on the validation split', '`tin200`, on a GPU'], rows)


def transfer() -> str:
    """Few labels: fine-tuned, probed, and from random weights."""
    rows, images, origins = [], [], {}
    for file in sorted(RESULTS.glob('transfer_*.json')):
        report = json.loads(file.read_text())
        settings, data = report['settings'], Path(report['settings']['data_dir']).name
        updates, size = ', '.join(map(str, settings['updates'])), settings['img_size'] or 'their own'
        hardware = ' and '.join(sorted({row['hardware'] for row in report['rows']}))
        origins[f'{data} at size {size}, updates: {updates}; {hardware}'] = None
        for method, cells in report['table'].items():
            found = [cells.get(str(fraction)) for fraction in settings['fractions']]
            rows.append([f'`{settings["model"]}`', data, method, *(
                NOT_MEASURED if cell is None else f'{cell["top1"]:.1f}' + (
                    '' if isinstance(cell['deviation'], str) else f' ± {cell["deviation"]:.1f}')
                + f' ({cell["subsets"]})' for cell in found)])
        if len({name for cells in report['table'].values() for name in cells}) > 1:  # not a single column of dots
            images.append(f'![Top-1 over the share of labels](results/{file.stem}.png)')
    if not rows:
        return 'Transfer to few labels: not measured.'
    fractions = [f'{100 * fraction:g} % of the labels' for fraction in settings['fractions']]
    return (table(['weights', 'data', 'method', *fractions], rows)
            + '\n\nTop-1 (%) after the last epoch, mean and deviation over the draws (as many as in brackets).\n'
            + '\n'.join(f'{origin}.' for origin in origins) + '\n\n' + '\n'.join(images))


def small_data() -> str:
    """Recipes of finetune.py on few images."""
    file = RESULTS / 'small_data_cpu.json'
    if not file.exists():
        return 'Recipes on few images: not measured.'
    report = json.loads(file.read_text())
    rows, recipes = [], report['settings']['recipes']
    for name, models in report['table'].items():
        counts = sorted({row['images'] for row in report['rows'] if row['set'] == name})
        images = str(counts[0]) if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
        rows += [[name.replace('_', ' '), images, f'`{model}`', *(
            NOT_MEASURED if (cell := cells.get(recipe)) is None else f'{cell["top1"]:.1f}' + (
                '' if isinstance(cell['deviation'], str) else f' ± {cell["deviation"]:.1f}')
            for recipe in recipes)] for model, cells in models.items()]
    return (table(['images of', 'to train on', 'weights', *(f'`{recipe}`' if recipe != 'defaults' else recipe
                                                           for recipe in recipes)], rows)
            + f'\n\nTop-1 (%) on other training images after the last epoch, mean and deviation over '
              f'{len(report["settings"]["seeds"])} seeds, each with images of its own;\n{report["hardware"]}, '
              f'{report["settings"]["threads"]} thread{"s" * (report["settings"]["threads"] > 1)}.')


def robustness() -> str:
    """Other sizes and corrupted images, without retraining."""
    file = RESULTS / 'robustness_tin200_cpu.json'
    if not file.exists():
        return 'Other sizes and corrupted images: not measured.'
    report = json.loads(file.read_text())
    rows = [[f'`{name}`', *(f'{top1:.2f}' for top1 in row.values())] for name, row in report['top1'].items()]
    return (table(['top-1 (%)', *next(iter(report['top1'].values()))], rows)
            + '\n\nOn the validation split of what the weights were trained on: whole images resized; at the size '
              'of the\nweights, JPEG at quality 30, Gaussian blur of radius 1 pixel, noise of deviation 0.1.\n\n'
              f'![Top-1 over size and under corruption](results/{file.stem}.png)')


def speed() -> str:
    """Every benchmark that was recorded."""
    rows, origins = [], {}
    for file in sorted(RESULTS.glob('benchmark_*.json')):
        report = json.loads(file.read_text())
        settings = report['settings']
        origin = f'{report["hardware"]}, {settings["threads"]} thread{"s" * (settings["threads"] > 1)}, batch ' \
                 f'{settings["batch_size"]} at {settings["img_size"]}, torch {report["torch"]}, timm {report["timm"]}'
        origins.setdefault(origin, None)
        for mode, row in report['results'].items():
            names = [f'`{" ".join((settings[side], *settings[f"{side}_kwargs"]))}`' for side in ('model', 'against')]
            throughput, memory = row['images_per_second'], row['peak_memory_mib']
            rows.append([
                f'{mode}{", compiled" * settings["compile"]}', *names, f'{row["ratio"]:.2f}',
                *(f'{throughput[side]:.2f}' for side in throughput),
                *(m if isinstance(m, str) else f'{m:.0f}' for m in memory.values())])
    if not rows:
        return 'Speed: not measured.'
    rows.sort(key=lambda row: row[0])
    header = ['', 'model', 'against', 'ratio', 'images/s', 'images/s of the other', 'peak MiB', 'peak MiB of the other']
    return table(header, rows) + f'\n\nMeasured on: {"; ".join(origins)}. On a GPU: not measured.'


def scaling() -> str:
    """Time over image size."""
    file = RESULTS / 'scaling_cpu.json'
    if not file.exists():
        return 'Time over image size: not measured.'
    report = json.loads(file.read_text())
    sizes = [str(size) for size in report['settings']['sizes']]
    rows = [
        [f'`{name}`', *(f'{row["times_ms"][size]:.0f}' for size in sizes), f'{row["exponent"]:.2f}']
        for name, row in report['models'].items()]
    return (table(['milliseconds at', *sizes, '1.00 is linear in pixels'], rows)
            + f'\n\nOne image, {report["hardware"]}, {report["settings"]["threads"]} thread.')


def ops() -> str:
    """The 7 x 7 operators beside a depthwise convolution of the same shape."""
    file = RESULTS / 'ops_cpu.csv'
    if not file.exists():
        return 'Speed of the operators: not measured.'
    with file.open(newline='', encoding='utf-8') as lines:
        cells = [cell for cell in csv.DictReader(lines) if cell['kernel'] == '7']
    grouped: dict[tuple[str, ...], dict[str, dict]] = {}
    for cell in cells:
        size = f'{cell["side"]} x {cell["side"]} x {cell["channels"]}'
        row = grouped.setdefault((cell['op'], size, cell['passes'].replace('_', ' + ')), {})
        row[cell['backend']] = cell
    backends = ('eager', 'compiled', 'triton')
    rows = [
        [*key, f'{float(row["conv2d"]["ms"]):.2f}', *(
            ratio if ratio == 'not measured' else f'{float(ratio):.2f}'
            for ratio in (row[backend]['ratio_to_conv2d'] for backend in backends))]
        for key, row in grouped.items()]
    one = cells[0]
    return (table(['operator, 7 x 7', 'map', 'pass', 'conv2d (ms)', *backends], rows)
            + f'\n\nTimes of `F.conv2d`, depthwise, and multiples of them: {one["hardware"]}, {one["threads"]} thread, '
              f'batch {one["batch_size"]}, {one["dtype"]}, torch {one["torch"]}.')


def ablation() -> str:
    """Layouts and switches under one recipe."""
    file = RESULTS / 'ablation_imagenette_64_cpu.json'
    if not file.exists():
        return 'Layouts and switches: not measured.'
    report = json.loads(file.read_text())
    settings = report['settings']
    seeds = {len(row['runs']) for row in report['rows'].values()}
    rows = [
        [f'`{name}`', f'{row["top1"]:.1f}' + ('' if isinstance(row['standard_error'], str) else
                                              f' ± {row["standard_error"]:.1f}'),
         f'{row["parameters"] / 1e6:.2f}', f'{row["multiply_adds"] / 1e6:.0f}',
         throughput if isinstance(throughput := row['images_per_second'], str) else f'{throughput:.0f}']
        for name, row in sorted(report['rows'].items(), key=lambda item: -item[1]['top1'])]
    counted = f'{min(seeds)} seed{"s" * (min(seeds) > 1)} a row'
    noise = ' With one seed, no gap here has a standard error: a point or two may be chance.' if min(seeds) == 1 else ''
    return (table(['row', 'top-1 (%)', 'parameters (M)', 'multiply-adds (M)', 'images/s'], rows)
            + f'\n\nImagenette at {settings["img_size"]} px, random start, {settings["epochs"]} epochs,\n{counted}, '
              f'top-1 of the last epoch, {report["hardware"]}.{noise}\n\n'
              f'![Top-1 of every row](results/{file.stem}.png)')


def training() -> str:
    """Runs under one recipe from random weights."""
    file = RESULTS / 'imagenette_64_cpu.json'
    if not file.exists():
        return 'Training side by side: not measured.'
    report = json.loads(file.read_text())
    rows = [
        [f'`{name}`', f'{run["metrics"][-1]["eval_top1"]:.2f}', f'{run["summary"]["top1"]:.2f}',
         f'{run["parameters"] / 1e6:.2f}']
        for name, run in report['runs'].items()]
    recipe = report['recipe']
    return (table(['model', 'top-1 of the last epoch (%)', 'of the best epoch', 'parameters (M)'], rows)
            + f'\n\nImagenette at {recipe["img_size"]} px, random start, {recipe["epochs"]} epochs, '
              f'seed {recipe["seed"]}, one run each,\n{report["hardware"]}, 1 thread. A point or two may be chance.\n\n'
              f'![Held-out accuracy and loss over epochs](results/{file.stem}.png)')


def loader() -> str:
    """Images a second that are read, and that are trained on."""
    file = RESULTS / 'loader_cpu.json'
    if not file.exists():
        return 'Reading of images: not measured.'
    report = json.loads(file.read_text())
    rates, settings = report['images_per_second'], report['settings']
    return (table(list(rates), [[f'{rate:.0f}' for rate in rates.values()]])
            + f'\n\nImages/s read by that many processes and, on one thread, trained on by `{settings["model"]}` at '
              f'64 px; {report["hardware"]}.')


def compute_budget() -> str:
    """Cost of the paper's recipes for each CoAtNet: memory of the state, and time from every recorded throughput."""
    measured = {}
    for file in sorted(RESULTS.glob('benchmark_*.json')):
        report = json.loads(file.read_text())
        speed, settings = report['results'].get('training'), report['settings']
        if speed and not settings['model_kwargs']:
            device = report['hardware'] + (', 1 thread' if settings['device'] == 'cpu' else '')
            rate, memory = (speed[key]['model'] for key in ('images_per_second', 'peak_memory_mib'))
            measured.setdefault(settings['model'], {}).setdefault(device, (rate, memory))
    rows = []
    models = json.loads((RESULTS / 'models.json').read_text())['models']
    for name in ('coatnet_0', 'coatnet_1', 'coatnet_2', 'coatnet_3', 'coatnet_4', 'coatnet_5'):
        state = f'{models[name]["parameters"] * 16 / 2**30:.1f}'
        for device, (rate, memory) in measured.get(name, {}).items():
            hours = [epochs * images / rate / 3600 for epochs, images in PAPER_RUNS.values()]
            rows.append([f'`{name}`', state, device, f'{rate:.2f}', f'{memory:.0f}', *(f'{h:,.0f}' for h in hours),
                         f'{hours[0] / 24 / 8:,.0f}'])
        if name not in measured:
            rows.append([f'`{name}`', state, *['not measured'] * 6])
    header = ['model', 'state GiB', 'device', 'images/s in training', 'peak MiB',
              *(f'device hours, {name}' for name in PAPER_RUNS), 'days with 8 devices, ImageNet-1k']
    return table(header, rows) + (
        '\n\nState is weights, gradients and AdamW in float32, 16 bytes a parameter. Device hours are epochs times\n'
        'images over images/s; times the price of an hour they are the cost. On GPUs: not measured. A row more is\n'
        '`python scripts/benchmark.py --model NAME --against OTHER --device cuda --amp --modes training\n'
        '--results-file results/benchmark_NAME_gpu.json`.')


def demo() -> str:
    """Accuracy of the demo after each epoch."""
    file = RESULTS / 'demo_cpu.json'
    if not file.exists():
        return 'Accuracy and time of the demo: not measured.'
    report = json.loads(file.read_text())
    rows = [[way, *(f'{top1:.1f}' for top1 in after)] for way, after in report['top1'].items()]
    return (table(['after epoch', *map(str, range(1, report['epochs'] + 1))], rows)
            + f'\n\nAccuracy (%) on held-out digits, {report["images"]} in all, by `{report["model"]}`, seed '
              f'{report["seed"]}; the demo takes\nthe best epoch by the same digits. {report["seconds"]:.0f} s on '
              f'{report["threads"]} threads of {report["hardware"]}.')


# Tables by the name of the markers around them, <!-- NAME --> and <!-- /NAME -->.
SECTIONS = dict(
    weights=weights, previews=preview_results, transfer=transfer, small_data=small_data, robustness=robustness,
    family=model_table, speed=speed, scaling=scaling, ops=ops, ablation=ablation, training=training, loader=loader,
    budget=compute_budget, demo=demo)


def render(text: str) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> made anew."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if pattern.search(text):
            content = section()
            text = pattern.sub(lambda match, content=content: f'{match[1]}{content}\n{match[2]}', text)
    return text


def main(count: bool = False, check: bool = False) -> int:
    """Rewrite or check the tables; returns the exit code."""
    if count:
        write_json(RESULTS / 'models.json', count_models())
    stale = []
    for name in DOCUMENTS:
        old = (ROOT / name).read_text()
        new = render(old)
        if new != old:
            stale.append(name)
            if not check:
                write_file(ROOT / name, lambda temporary, new=new: temporary.write_text(new))
    if check and stale:
        print(f'{", ".join(stale)} does not show what results/ says; run python scripts/report.py.')
    return int(check and bool(stale))


if __name__ == '__main__':
    run_cli('report.py', lambda: sys.exit(tyro.cli(main, description=__doc__)))
