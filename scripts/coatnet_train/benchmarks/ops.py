"""LightConv and DynamicConv timed at the shapes of the stages, against the floor of the machine."""
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from coatnet_train.benchmarks.config import (
    FORCED,
    HEAD_DIM,
    MAX_DYNAMIC_KERNEL,
    Backend,
    OpsSettings,
    Pass,
    check_ops,
)
from coatnet_train.benchmarks.models import check_machine
from coatnet_train.benchmarks.rows import NOT_MEASURED, write_rows
from coatnet_train.benchmarks.timing import (
    GRAPH,
    WALL_CLOCK,
    default_input_sets,
    measure_window,
    peak_memory,
    replay,
)
from coatnet_train.runtime.cli import one_line
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance
from coatnet_zoo.ops import dynamicconv2d, lightconv2d
from coatnet_zoo.ops.dispatch import INTERPRETED


class Row(NamedTuple):
    """One comparison of backends: operator, shape, kernel and pass."""
    op: Literal['light', 'dynamic']
    side: int
    channels: int
    kernel: int
    passes: Pass

    def __str__(self) -> str:
        side, kernel, passes = self.side, self.kernel, self.passes.replace('_', ' + ')
        return f'{self.op} {kernel}x{kernel}, {side}x{side}x{self.channels}, {passes}'


def rows_of(settings: OpsSettings) -> list[Row]:
    """All requested comparisons."""
    shapes = [tuple(map(int, shape.split('x'))) for shape in settings.shapes]
    ops = ('light', 'dynamic') if settings.op == 'both' else (settings.op,)
    return [Row(op, *shape, kernel, passes) for op in ops for shape in shapes for kernel in settings.kernels
            for passes in settings.passes if op == 'light' or kernel <= MAX_DYNAMIC_KERNEL]


class Ceilings(NamedTuple):
    """Peak rates of the machine."""
    bandwidth: float  # bytes read or written per second
    multiply_adds: float  # multiply-adds per second
    source: str  # origin of `multiply_adds`


def measure_ceilings(settings: OpsSettings) -> Ceilings:
    """Measure copy bandwidth and matrix product rate on random numbers; the fastest window counts."""
    on_cpu = settings.device == 'cpu'
    megabytes = 256 if on_cpu else 1024  # far more than any cache holds
    source = torch.rand(megabytes * 2**18, device=settings.device)
    copy = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: copy.copy_(source), settings)
    n, dtype = (2048, 'float32') if on_cpu else (8192, settings.dtype)
    matrix = torch.randn(n, n, device=settings.device, dtype=getattr(torch, dtype))
    product = torch.empty_like(matrix)
    seconds = fastest(lambda: torch.mm(matrix, matrix, out=product), settings)
    return Ceilings(bandwidth, n**3 / seconds, f'measured: a product of {n} x {n} matrices in {dtype}')


def fastest(call: Callable[[], object], settings: OpsSettings) -> float:
    call()
    return min(measure_window(call, settings.window, settings.device) for _ in range(settings.rounds))


def can_run(backend: Backend, settings: OpsSettings) -> bool:
    return backend not in ('triton', *FORCED) or (
        find_spec('triton') is not None and (settings.device != 'cpu' or INTERPRETED))


def operand_shape(row: Row, backend: Backend, batch: int) -> tuple[int, ...]:
    """Shape of the operand, the second input: the weight, or the logits of DynamicConv."""
    heads, K = row.channels // HEAD_DIM, row.kernel
    if backend == 'conv2d':
        return row.channels, 1, K, K
    return (heads, K, K) if row.op == 'light' else (batch, heads * K * K, row.side, row.side)


def function_of(row: Row, backend: Backend) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Function (x, operand) -> out that runs the row's operator with a backend."""
    if backend == 'conv2d':
        return lambda x, weight: F.conv2d(x, weight, padding=row.kernel // 2, groups=row.channels)
    kernel_size = row.kernel, row.kernel
    if backend in FORCED:
        rest = {'bias': None, 'normalize': 'softmax', 'dropconnect': 0., 'seed': None, 'kernels': backend}
        if row.op == 'light':
            from coatnet_zoo.ops.lightconv2d.kernels import lightconv2d_triton  # needs triton
            return partial(lightconv2d_triton, **rest)
        from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton
        return partial(dynamicconv2d_triton, kernel_size=kernel_size, **rest)
    function = lightconv2d if row.op == 'light' else dynamicconv2d
    fixed = {} if row.op == 'light' else {'kernel_size': kernel_size}
    if backend == 'compiled':
        return partial(torch.compile(function, fullgraph=True), backend='eager', **fixed)
    return partial(function, backend=backend, **fixed)


Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build(row: Row, backend: Backend, settings: OpsSettings, function: Function, number: int) -> Callable[[], object]:
    """Return a function that makes one call with its own inputs, drawn by the seed + `number`."""
    torch.manual_seed(settings.seed + number)
    like = dict(dtype=getattr(torch, settings.dtype), device=settings.device)
    x = torch.randn(settings.batch_size, row.channels, row.side, row.side, **like).contiguous(
        memory_format=torch.channels_last)
    operand = torch.randn(operand_shape(row, backend, settings.batch_size), **like)
    if row.op == 'dynamic' and backend != 'conv2d':  # logits come out of a convolution in channels_last
        operand = operand.contiguous(memory_format=torch.channels_last)
    if row.passes == 'forward':
        return torch.no_grad()(lambda: function(x, operand))
    grad_out = torch.randn_like(x)
    inputs = x.requires_grad_(), operand.requires_grad_()
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad_out)


class Timed(NamedTuple):
    """A backend ready for timing: `call` makes `sets` calls in turn, each with a peak allocation of `peak_mib`."""
    call: Callable[[], object]
    sets: int
    peak_mib: float | str


def prepare(row: Row, backend: Backend, settings: OpsSettings, ceilings: Ceilings) -> Timed | None:
    """Compile and capture the calls of a backend; None if it cannot run, with a printed reason if it fails."""
    if not can_run(backend, settings):
        return None
    nbytes = floor(row, backend, settings, ceilings)['bytes']
    # one set for naive: its intermediate tensors are far larger than its inputs
    sets = 1 if backend == 'naive' else settings.input_sets or default_input_sets(nbytes, settings.device)
    try:
        function = function_of(row, backend)
        calls = [build(row, backend, settings, function, number) for number in range(sets)]
        if settings.device != 'cpu':
            calls[0]()  # compiles, so that the peak does not include compilation
        peak = peak_memory(calls[0], settings.device)
        return Timed(replay(calls, settings.device), sets, NOT_MEASURED if peak is None else rounded(peak))
    except (RuntimeError, ValueError) as error:  # out of memory, or not supported by the kernels
        tqdm.write(f'{row}: {backend} is not measured: {one_line(error)}')
        return None


def rounded(value: float) -> float:
    return float(f'{value:.5g}')


def floor(row: Row, backend: Backend, settings: OpsSettings, ceilings: Ceilings) -> dict[str, float]:
    """Minimum bytes, multiply-adds and milliseconds of a call, and the size of its inputs, outputs and gradients."""
    elements, width = settings.batch_size * row.channels * row.side ** 2, getattr(torch, settings.dtype).itemsize
    image = elements * width
    operand = prod(operand_shape(row, backend, settings.batch_size)) * width
    traffic = held = 2 * image + operand  # x and the operand are read, the output is written
    reach = row.kernel // 2
    inside = sum(min(row.side, i + reach + 1) - max(0, i - reach) for i in range(row.side))  # taps not on the padding
    multiply_adds = settings.batch_size * row.channels * inside ** 2
    if row.passes == 'forward_backward':
        traffic += 3 * image + 2 * operand  # the output's gradient, x and the operand are read, their gradients written
        held += 2 * image + operand
        multiply_adds *= 3  # the gradients of x and of the operand take as many as the output
    bytes_ms = traffic / ceilings.bandwidth * 1e3
    multiply_adds_ms = multiply_adds / ceilings.multiply_adds * 1e3
    return dict(
        bytes=traffic, multiply_adds=multiply_adds, bytes_ms=rounded(bytes_ms),
        multiply_adds_ms=rounded(multiply_adds_ms), floor_ms=rounded(max(bytes_ms, multiply_adds_ms)),
        tensors_mib=rounded(held / 2**20))


def measure(row: Row, settings: OpsSettings, ceilings: Ceilings, bar: tqdm) -> list[dict]:
    """Measure a row; returns a dictionary for each backend."""
    torch._dynamo.reset()  # compile each shape separately, below the recompilation limit
    prepared = {name: prepare(row, name, settings, ceilings) for name in settings.backends}
    found = {name: timed for name, timed in prepared.items() if timed is not None}
    windows: dict[str, list[float]] = {backend: [] for backend in found}
    for index in range(settings.rounds):
        for backend in sorted(found, reverse=bool(index % 2)):  # alternate the order
            if index == 0 or backend != 'naive':
                seconds = measure_window(found[backend].call, settings.window, settings.device)
                windows[backend].append(seconds / found[backend].sets)
        bar.update()
    times = {backend: statistics.median(seconds) * 1e3 for backend, seconds in windows.items()}
    cells = []
    for backend in settings.backends:
        limits = floor(row, backend, settings, ceilings)
        ms, yardstick = times.get(backend), times.get('conv2d')
        cells.append(dict(
            **row._asdict(), heads=row.channels // HEAD_DIM, batch_size=settings.batch_size, dtype=settings.dtype,
            device=settings.device, threads=settings.threads, backend=backend,
            timer=WALL_CLOCK if settings.device == 'cpu' else GRAPH,
            input_sets=found[backend].sets if backend in found else NOT_MEASURED,
            ms=rounded(ms) if ms else NOT_MEASURED,
            ratio_to_conv2d=rounded(ms / yardstick) if ms and yardstick else NOT_MEASURED,
            percent_of_floor=rounded(100 * limits['floor_ms'] / ms) if ms else NOT_MEASURED,
            peak_mib=found[backend].peak_mib if backend in found else NOT_MEASURED, **limits,
            bandwidth_gb_per_s=rounded(ceilings.bandwidth / 1e9),
            peak_g_multiply_adds_per_s=rounded(ceilings.multiply_adds / 1e9), peak_source=ceilings.source))
    return cells


def shown(value: float | str, digits: int) -> str:
    return value if isinstance(value, str) else f'{value:.{digits}f}'


def render(row: Row, cells: list[dict]) -> str:
    columns = {'ms': 3, 'ratio_to_conv2d': 2, 'bytes_ms': 4, 'multiply_adds_ms': 4, 'percent_of_floor': 1,
               'peak_mib': 1, 'tensors_mib': 1}  # with decimals
    lines = [f'\n{row}', f'  {"":8s}{"".join(f"{name:>17s}" for name in columns)}']
    for cell in cells:
        values = (f'{shown(cell[name], digits):>17s}' for name, digits in columns.items())
        lines.append(f'  {cell["backend"]:8s}{"".join(values)}')
    return '\n'.join(lines)


def triton_version() -> str:
    return import_module('triton').__version__ if find_spec('triton') else 'not installed'


def main(settings: OpsSettings, store: Callable[[list[dict]], object] | None = None) -> list[dict]:
    """Measure and print row by row, and return the table, a dictionary for each row and backend.

    Args:
        settings: Rows and backends to time.
        store: Called with the cells of each row and their provenance as soon as they are measured.
    """
    check_ops(settings)
    check_machine(settings.device, amp=settings.dtype == 'bfloat16')
    if settings.batch_size is None:
        settings = replace(settings, batch_size=2 if settings.device == 'cpu' else 128)
    rows = rows_of(settings)
    torch.set_num_threads(settings.threads)
    origin = {**provenance(settings.device), 'triton': triton_version()}
    ceilings = measure_ceilings(settings)
    print(f'{origin["hardware"]}, batch {settings.batch_size}, {settings.dtype}')
    print(f'at most {ceilings.bandwidth / 1e9:.1f} GB/s (measured: a copy) and {ceilings.multiply_adds / 1e9:.1f} G '
          f'multiply-adds/s ({ceilings.source})')
    table: list[dict] = []
    with progress_bar(total=len(rows) * settings.rounds, unit='round', desc='benchmark ops') as bar:
        for row in rows:
            cells = measure(row, settings, ceilings, bar)
            tqdm.write(render(row, cells))
            table += [cell | origin for cell in cells]
            if store is not None:
                store(table[-len(cells):])
            if settings.results_file:  # after each row, so that an interrupted run keeps its measurements
                write_rows(Path(settings.results_file), table)
    target = dict(op='dynamic', side=28, channels=192, kernel=7, backend='compiled')  # target: at most 3.00
    ratios = {cell['passes']: cell['ratio_to_conv2d'] for cell in table if target.items() <= cell.items()}
    if ratios:
        print('\nTime of compiled dynamic 7x7, 28x28x192, over that of F.conv2d:', ', '.join(
            f'{passes.replace("_", " + ")} {shown(ratio, 2)}' for passes, ratio in ratios.items()))
    return table

