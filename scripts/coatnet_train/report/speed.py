"""Tables of time and memory: models, operators, image sizes, image loading, the paper's recipes."""
from pathlib import Path

from coatnet_train.report.tables import NOT_MEASURED, read_csv, read_json, table, threads_of

__all__ = ['budget', 'inference_form', 'kernel_budgets', 'loader', 'make_times', 'ops', 'runtimes', 'scaling', 'speed']

# epochs and images of the CoAtNet paper's runs: appendix A.2, and the sizes of ImageNet-1k and ImageNet-21k
PAPER_RUNS = {'ImageNet-1k, 300 epochs': (300, 1_281_167), 'ImageNet-21k, 90 epochs': (90, 14_197_122)}


def speed(root: Path) -> str:
    """Table of all pairs of models that were timed against each other."""
    rows, origins, devices = [], {}, set()
    for file in sorted((root / 'results').glob('benchmark_*.json')):
        report = read_json(file)
        settings = report['settings']
        devices.add(settings['device'])
        origins.setdefault(
            f'{report["hardware"]}, {threads_of(settings["threads"])}, batch {settings["batch_size"]} at '
            f'{settings["img_size"]}, torch {report["torch"]}, timm {report["timm"]}', None)
        for mode, row in report['results'].items():
            names = [f'`{" ".join((settings[side], *settings[f"{side}_kwargs"]))}`' for side in ('model', 'against')]
            if settings['img_size'] != 224:
                names[0] += f' at {settings["img_size"]} px'
            throughput, memory = row['images_per_second'], row['peak_memory_mib']
            rows.append([
                f'{mode}{", compiled" * settings["compile"]}', *names, f'{row["ratio"]:.2f}',
                *(f'{throughput[side]:.2f}' for side in throughput),
                *(m if isinstance(m, str) else f'{m:.0f}' for m in memory.values())])
    if not rows:
        return 'Speed: not measured.'
    rows.sort(key=lambda row: row[0])
    header = ['', 'model', 'against', 'ratio', 'images/s', 'images/s of the other', 'peak MiB', 'peak MiB of the other']
    missing = '' if 'cuda' in devices else ' On a GPU: not measured.'
    return table(header, rows) + f'\n\nMeasured on: {"; ".join(origins)}.{missing}'


def inference_form(root: Path) -> str:
    """Table of the inference form and its variants, each with one optimisation changed."""
    file = root / 'results' / 'inference_form_cpu.json'
    if not file.exists():
        return 'Optimisations of the inference form: not measured.'
    report = read_json(file)
    variants = [name for name in report['rows'][0]['of_package'] if name != 'package']
    rows = [[f'`{row["model"]}`', str(row['batch_size']), f'{row["cpu_ms"]["package"]:.0f}',
             *(f'{row["of_package"][name]:.2f} ({" to ".join(f"{edge:.2f}" for edge in row["quartiles"][name])})'
               for name in variants)] for row in report['rows']]
    return (table(['model', 'batch', 'CPU ms', *variants], rows)
            + f'\n\nCPU time of a batch, and multiples of it with another form (quartiles in brackets); '
              f'{report["hardware"]}.')


def runtimes(root: Path) -> str:
    """Table of the inference form in every runtime, relative to the first model in eager."""
    file = root / 'results' / 'runtimes_cpu.json'
    if not file.exists():
        return 'The inference form in other runtimes: not measured.'
    report = read_json(file)
    names, rows, yardsticks = report['settings']['runtimes'], [], {}
    for row in report['rows']:
        yardstick = yardsticks.setdefault(row['batch_size'], row['ms']['eager'])
        times = [row['ms'][name] for name in names]
        rows.append([f'`{row["model"]}`', str(row['batch_size']), *(
            ms if ms == NOT_MEASURED else f'{ms:.0f} ({ms / yardstick:.2f})' for ms in times)])
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    settings = report['settings']
    return (table(['model', 'batch', *names], rows)
            + f'\n\nMilliseconds a batch at {settings["img_size"]} px, and in brackets multiples of eager '
              f'`{settings["models"][0]}`; {report["hardware"]}, {threads_of(settings["threads"])}, '
              f'torch {report["torch"]}, {versions}.')


def scaling(root: Path) -> str:
    """Table of time over image size."""
    file = root / 'results' / 'scaling_cpu.json'
    if not file.exists():
        return 'Time over image size: not measured.'
    report = read_json(file)
    sizes = [str(size) for size in report['settings']['sizes']]
    rows = [
        [f'`{name}`', *(f'{row["times_ms"][size]:.0f}' for size in sizes), f'{row["exponent"]:.2f}']
        for name, row in report['models'].items()]
    return (table(['milliseconds at', *sizes, '1.00 is linear in pixels'], rows)
            + f'\n\nOne image, {report["hardware"]}, {threads_of(report["settings"]["threads"])}.')


def ops(root: Path) -> str:
    """Table of the 7 x 7 operators on a CPU, relative to a depthwise convolution of the same shape."""
    file = root / 'results' / 'ops_cpu.csv'
    return _ops_table(file, ('eager', 'compiled')) if file.exists() else 'Speed of the operators: not measured.'


def _ops_table(file: Path, backends: tuple[str, ...]) -> str:
    cells = [cell for cell in read_csv(file) if cell['kernel'] == '7']
    grouped: dict[tuple[str, ...], dict[str, dict]] = {}
    for cell in cells:
        size = f'{cell["side"]} x {cell["side"]} x {cell["channels"]}'
        row = grouped.setdefault((cell['op'], size, cell['passes'].replace('_', ' + ')), {})
        row[cell['backend']] = cell
    rows = [
        [*key, f'{float(row["conv2d"]["ms"]):.2f}', *(
            ratio if ratio == NOT_MEASURED else f'{float(ratio):.2f}'
            for ratio in (row[backend]['ratio_to_conv2d'] if backend in row else NOT_MEASURED for backend in backends))]
        for key, row in grouped.items()]
    one = cells[0]
    where = one['hardware'] + (f', {threads_of(one["threads"])}' if one['device'] == 'cpu' else '')
    return (table(['operator, 7 x 7', 'map', 'pass', 'conv2d (ms)', *backends], rows)
            + f'\n\nTimes of `F.conv2d`, depthwise, and multiples of them: {where}, batch {one["batch_size"]}, '
              f'{one["dtype"]}, torch {one["torch"]}.')


def kernel_budgets(root: Path) -> str:
    """Table of instructions, registers and memory of the band kernels at one shape, compiled without a GPU."""
    file = root / 'results' / 'kernel_budgets.csv'
    if not file.exists():
        return 'Machine code of the band kernels: not measured.'
    cells = [cell for cell in read_csv(file) if cell['shape'] == '56x56x96' and cell['arch'] == 'sm_90']
    rows = [
        [f'`{cell["kernel"].strip("_").removesuffix("_kernel")}`', cell['kernel_size'], cell['triton'],
         cell['instructions_per_output'], cell['registers'], cell['spilled_bytes'], cell['shared_bytes']]
        for cell in cells]
    header = ['kernel', 'K', 'Triton', 'instructions per output', 'registers', 'spilled bytes', 'shared bytes']
    return (table(header, rows)
            + f'\n\nsm_90, map 56 x 56 x 96, kernels K x K, heads of {cells[0]["head_dim"]} channels; more shapes are '
              f'in results/kernel_budgets.csv.')


def loader(root: Path) -> str:
    """Table of image throughput: reading by several numbers of workers, and training."""
    file = root / 'results' / 'loader_cpu.json'
    if not file.exists():
        return 'Reading of images: not measured.'
    report = read_json(file)
    rates, settings = report['images_per_second'], report['settings']
    return (table(list(rates), [[f'{rate:.0f}' for rate in rates.values()]])
            + f'\n\nImages/s read by that many processes and, on one thread, trained on by `{settings["model"]}` at '
              f'64 px; {report["hardware"]}.')


def budget(root: Path) -> str:
    """Table of the cost of the paper's recipes for each CoAtNet: state memory, and time from measured throughput."""
    measured: dict[str, dict] = {}
    for file in sorted((root / 'results').glob('benchmark_*.json')):
        report = read_json(file)
        training, settings = report['results'].get('training'), report['settings']
        if training and not settings['model_kwargs']:
            device = report['hardware'] + (', 1 thread' if settings['device'] == 'cpu' else '')
            rate, memory = (training[key]['model'] for key in ('images_per_second', 'peak_memory_mib'))
            measured.setdefault(settings['model'], {}).setdefault(device, (rate, memory))
    rows = []
    models = read_json(root / 'results' / 'models.json')['models']
    for name in ('coatnet_0', 'coatnet_1', 'coatnet_2', 'coatnet_3', 'coatnet_4', 'coatnet_5'):
        state = f'{models[name]["parameters"] * 16 / 2**30:.1f}'
        for device, (rate, memory) in measured.get(name, {}).items():
            hours = [epochs * images / rate / 3600 for epochs, images in PAPER_RUNS.values()]
            rows.append([f'`{name}`', state, device, f'{rate:.2f}', f'{memory:.0f}', *(f'{h:,.0f}' for h in hours),
                         f'{hours[0] / 24 / 8:,.0f}'])
        if name not in measured:
            rows.append([f'`{name}`', state, *[NOT_MEASURED] * 6])
    header = ['model', 'state GiB', 'device', 'images/s in training', 'peak MiB',
              *(f'device hours, {name}' for name in PAPER_RUNS), 'days with 8 devices, ImageNet-1k']
    return table(header, rows) + (
        '\n\nState is weights, gradients and AdamW in float32, 16 bytes a parameter. Device hours are epochs times\n'
        'images over images/s; times the price of an hour they are the cost. For another row:\n'
        '`python scripts/benchmark.py --model NAME --against OTHER --device cuda --amp --modes training\n'
        '--results-file results/benchmark_NAME_gpu.json`.')


def make_times(root: Path) -> str:
    """Table of the make targets timed by tests/time_targets.py."""
    file = root / 'results' / 'make_cpu.json'
    if not file.exists():
        return f'`make test`, `make demo`: {NOT_MEASURED}.'
    report, rows = read_json(file), []
    for target, row in report['targets'].items():
        made = report['made'][target]
        rows.append([f'`make {target}`', f'{row["seconds"] / 60:.1f}', str(row['passed'] or ''), str(row['cores']),
                     made['hardware'], made['date']])
    return table(['command', 'minutes', 'tests passed', 'cores', 'hardware', 'date'], rows)
