"""Tables of GPU measurements by gpu_report.py and benchmark.py ops: a table for each card, and the targets."""
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coatnet_train.report.tables import NOT_MEASURED, read_csv, table

__all__ = ['gpu_checks', 'gpu_targets', 'models_gpu', 'ops_gpu']

GRAPH = 'CUDA graph'
BACKENDS = ('eager', 'compiled', 'triton', 'direct', 'band')  # columns of the tables, if measured
TIMERS = {GRAPH: 'replayed as a CUDA graph over several sets of inputs', 'wall clock': 'wall clock, launches included'}


def _rows(root: Path, kind: str) -> list[dict[str, str]]:
    """Rows of one kind of file for every card; old rows without a timer were timed by wall clock."""
    return [{'timer': 'wall clock'} | row for path in sorted((root / 'results').glob(f'{kind}_*.csv'))
            for row in read_csv(path) if row.get('device', 'cuda') == 'cuda']


def _grouped(rows: Sequence[dict[str, str]], *columns: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _number(text: str | None) -> float | None:
    return None if text in (None, '', NOT_MEASURED) else float(text)


def _shown(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f'{value:.{digits}f}'


def _operator_tables(rows: Sequence[dict[str, str]]) -> str:
    """Tables of times relative to `F.conv2d`, one for each machine, batch size, dtype, torch version and timer."""
    tables = []
    groups = _grouped(rows, 'hardware', 'batch_size', 'dtype', 'torch', 'timer')
    for (hardware, batch, dtype, torch, timer), cells in groups.items():
        lines = _grouped(cells, 'op', 'kernel', 'side', 'channels', 'passes')
        measured = {cell['backend'] for cell in cells}
        backends = [name for name in BACKENDS if name in measured]
        found = []
        for (op, kernel, side, channels, passes), line in lines.items():
            of = {cell['backend']: cell for cell in line}
            ratios = [_shown(_number(of[name]['ratio_to_conv2d']) if name in of else None) for name in backends]
            yardstick = _shown(_number(of['conv2d']['ms'])) if 'conv2d' in of else NOT_MEASURED
            floor = [_shown(_number(of.get('triton', {}).get('percent_of_floor')), 0)] if 'triton' in backends else []
            found.append([f'{op} {kernel} x {kernel}', f'{side} x {side} x {channels}', passes.replace('_', ' + '),
                          yardstick, *ratios, *floor])
        share = ['triton, % of its floor'] * ('triton' in measured)
        header = ['operator', 'map', 'pass', 'conv2d (ms)', *backends, *share]
        tables.append(f'{table(header, found)}\n\nTimes of `F.conv2d`, depthwise, and multiples of them: {hardware}, '
                      f'batch {batch}, {dtype}, torch {torch}; {TIMERS[timer]}.')
    return '\n\n'.join(tables)


def ops_gpu(root: Path) -> str:
    """Tables of the operators on every GPU with a results file; CUDA graph timings come first."""
    rows = sorted(_rows(root, 'ops'), key=lambda row: row['timer'] != GRAPH)
    return _operator_tables(rows) or 'The operators on a GPU: not measured.'


def models_gpu(root: Path) -> str:
    """Tables of throughput and memory of models on GPUs."""
    tables = []
    for (hardware, precision, batch, size), rows in _grouped(
            _rows(root, 'models'), 'hardware', 'precision', 'batch_size', 'img_size').items():
        found = [[f'`{row["model"]}`', row['mode'], row['form'], _shown(_number(row['images_per_second']), 0),
                  _shown(_number(row['peak_mib']), 0)] for row in rows]
        tables.append(table(['model', '', 'form', 'images/s', 'peak MiB'], found)
                      + f'\n\n{hardware}, {precision}, channels_last, batch {batch} at {size}, torch '
                        f'{rows[0]["torch"]}.')
    return '\n\n'.join(tables) or 'Models on a GPU: not measured.'


def gpu_checks(root: Path) -> str:
    """Tables of the outcome of each step of gpu_report.py on each card, with every failed check."""
    tables = []
    for (hardware,), rows in _grouped(_rows(root, 'checks'), 'hardware').items():
        steps = _grouped(rows, 'step')
        found = []
        for (name,), members in steps.items():
            end = next((row for row in members if row['check'] == 'step'), None)
            counts = [sum(row['result'] == verdict for row in members) for verdict in ('passed', 'failed', 'skipped')]
            found.append([f'`{name}`', end['result'] if end else NOT_MEASURED, *map(str, counts)])
        failed = [f'- `{row["step"]}`: {row["check"]}: {row["value"]}, at most {row["limit"]}; {row["detail"]}'
                  for row in rows if row['result'] == 'failed']
        tables.append(table(['step', 'ended', 'checks passed', 'failed', 'skipped'], found)
                      + f'\n\n{hardware}, torch {rows[-1]["torch"]}.' + ''.join(f'\n{line}' for line in failed))
    return '\n\n'.join(tables) or 'Steps of `make gpu`: not run.'


class Cells(NamedTuple):
    """Rows of one card by their keys: operators timed as CUDA graphs in bfloat16, and models."""

    ops: dict[tuple[str, ...], dict[str, str]]
    models: dict[tuple[str, ...], dict[str, str]]

    def figure(self, column: str, *key: str) -> float | None:
        return _number(self.ops.get(key, {}).get(column))

    def maps(self, op: str, kernel: str) -> Iterator[tuple[str, str]]:
        """(side, channels) of the maps on which an operator was timed."""
        return iter(dict.fromkeys(key[1:3] for key in self.ops if (key[0], key[3]) == (op, kernel)))


Figure = Callable[[Cells], float | None]


def floor_share(side: int, channels: int) -> Figure:
    """Percentage of the floor of DynamicConv 7 x 7 forward: 100 * floor / time."""
    return lambda cells: cells.figure('percent_of_floor', 'dynamic', str(side), str(channels), '7', 'forward', 'triton')


def backward_share(side: int, channels: int) -> Figure:
    """Percentage of the floor of the backward pass: time, bytes and multiply-adds are forward + backward minus forward.
    """
    def figure(cells: Cells) -> float | None:
        def less(column: str) -> float | None:
            both, forward = (cells.figure(column, 'dynamic', str(side), str(channels), '7', passes, 'triton')
                             for passes in ('forward_backward', 'forward'))
            return None if both is None or forward is None else both - forward

        ms, floor = less('ms'), [less('bytes_ms'), less('multiply_adds_ms')]
        return None if ms is None or None in floor else 100 * max(floor) / ms
    return figure


def speedup(op: str, kernel: int, rivals: tuple[str, ...]) -> Figure:
    """Time of the fastest rival over Triton's time, forward + backward; the minimum over the maps."""
    def figure(cells: Cells) -> float | None:
        found = []
        for place in cells.maps(op, str(kernel)):
            key = (op, *place, str(kernel), 'forward_backward')
            ours = cells.figure('ms', *key, 'triton')
            theirs = [ms for ms in (cells.figure('ms', *key, rival) for rival in rivals) if ms is not None]
            if ours is not None and theirs:
                found.append(min(theirs) / ours)
        return min(found, default=None)
    return figure


def memory(cells: Cells) -> float | None:
    """Peak memory of Triton's calls, inputs included, over the size of inputs, outputs and gradients; the maximum."""
    found = []
    for (*_, passes, backend), row in cells.ops.items():
        peak = _number(row['peak_mib'])
        if backend == 'triton' and peak is not None:
            image = 2 * int(row['batch_size']) * int(row['channels']) * int(row['side']) ** 2 / 2**20
            tensors = float(row['tensors_mib'])
            operand = tensors - 2 * image if passes == 'forward' else tensors / 2 - 2 * image
            inputs = image + operand + (image if passes == 'forward_backward' else 0)  # plus the output's gradient
            found.append((inputs + peak) / tensors)
    return max(found, default=None)


def throughput(model: str, against: str, mode: str) -> Figure:
    """Ratio of the images/s of two models, both in eager."""
    def figure(cells: Cells) -> float | None:
        ours, theirs = (_number(cells.models.get((name, mode, 'eager'), {}).get('images_per_second'))
                        for name in (model, against))
        return None if ours is None or theirs is None else ours / theirs
    return figure


# description, figure, and target: a minimum, or, if negative, minus a maximum
TARGETS: tuple[tuple[str, Figure, float], ...] = (
    ('DynamicConv 7 x 7 forward at 56 x 56 x 96, % of the floor', floor_share(56, 96), 60),
    ('the same at 14 x 14 x 384', floor_share(14, 384), 45),
    ('DynamicConv 7 x 7 backward at 56 x 56 x 96, % of the floor', backward_share(56, 96), 35),
    ('the same at 14 x 14 x 384', backward_share(14, 384), 35),
    ('DynamicConv 7 x 7 forward + backward, times as fast as the best torch form',
     speedup('dynamic', 7, ('eager', 'compiled')), 3),
    *((f'LightConv {kernel} x {kernel} forward + backward, times as fast as depthwise `F.conv2d`',
       speedup('light', kernel, ('conv2d',)), 2) for kernel in (7, 13, 31)),
    ('memory of the operators, multiple of inputs, outputs and gradients', memory, -1.1),
    ('`coatnet_0` over `coatnet_0_224`, inference', throughput('coatnet_0', 'coatnet_0_224', 'inference'), 1.5),
    ('the same, training', throughput('coatnet_0', 'coatnet_0_224', 'training'), 1.3),
    ('`lightconvnet_tiny` over `convnext_tiny`, inference',
     throughput('lightconvnet_tiny', 'convnext_tiny', 'inference'), 1),
    ('the same, training', throughput('lightconvnet_tiny', 'convnext_tiny', 'training'), 1),
)


def gpu_targets(root: Path) -> str:
    """Table of the targets for kernels and models, and the measured value on every card."""
    ops = [row for row in _rows(root, 'ops') if row['timer'] == GRAPH and row['dtype'] == 'bfloat16'
           and row['batch_size'] == '128']
    models = [row for row in _rows(root, 'models') if row['precision'] == 'bfloat16 autocast']
    cards = {}
    for hardware in dict.fromkeys(row['hardware'] for row in (*ops, *models)):
        cards[hardware] = Cells(
            {tuple(row[name] for name in ('op', 'side', 'channels', 'kernel', 'passes', 'backend')): row
             for row in ops if row['hardware'] == hardware},
            {tuple(row[name] for name in ('model', 'mode', 'form')): row
             for row in models if row['hardware'] == hardware})
    rows = []
    for what, figure, target in TARGETS:
        bound = f'at least {target:g}' if target > 0 else f'at most {-target:g}'
        values = [figure(cells) for cells in cards.values()] or [None]
        rows.append([what, bound, *(_judged(value, target) for value in values)])
    return (table(['bfloat16, batch 128', 'target', *(cards or ['measured'])], rows)
            + '\n\nOver several maps the worst one counts. The floor is the longer of bytes over the measured copy '
              'bandwidth and\nmultiply-adds over the measured rate of a matrix product; models are eager.')


def _judged(value: float | None, target: float) -> str:
    if value is None:
        return NOT_MEASURED
    met = value >= target if target > 0 else value <= -target
    return f'{value:.2f}, {"met" if met else "missed"}'
