"""LightConv and DynamicConv timed over the shapes of the stages, beside the floor that the machine allows."""
import csv
import io
import statistics
import time
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

from coatnet_train.benchmarks.config import HEAD_DIM, MAX_DYNAMIC_KERNEL, Backend, OpsSettings, Pass, check_ops
from coatnet_train.benchmarks.models import check_machine, synchronize
from coatnet_train.runtime.files import write_file
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance
from coatnet_zoo.ops import dynamicconv2d, lightconv2d

NOT_MEASURED = 'not measured'


class Row(NamedTuple):
    """One comparison."""
    op: Literal['light', 'dynamic']
    side: int
    channels: int
    kernel: int
    passes: Pass

    def __str__(self) -> str:
        side, kernel, passes = self.side, self.kernel, self.passes.replace('_', ' + ')
        return f'{self.op} {kernel}x{kernel}, {side}x{side}x{self.channels}, {passes}'


def rows_of(settings: OpsSettings) -> list[Row]:
    """Every requested comparison."""
    shapes = [tuple(map(int, shape.split('x'))) for shape in settings.shapes]
    ops = ('light', 'dynamic') if settings.op == 'both' else (settings.op,)
    return [Row(op, *shape, kernel, passes) for op in ops for shape in shapes for kernel in settings.kernels
            for passes in settings.passes if op == 'light' or kernel <= MAX_DYNAMIC_KERNEL]


class Ceilings(NamedTuple):
    """What the machine can do at most."""
    bandwidth: float  # bytes read or written a second
    multiply_adds: float  # a second, in float32
    source: str  # where `multiply_adds` comes from


def measure_ceilings(settings: OpsSettings) -> Ceilings:
    """Both by the fastest of the windows: a busy moment must not lower a ceiling."""
    megabytes = 256 if settings.device == 'cpu' else 1024  # far more than any cache holds
    source = torch.ones(megabytes * 2**18, device=settings.device)
    copy = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: copy.copy_(source), settings)
    properties = torch.cuda.get_device_properties() if settings.device != 'cpu' else None
    if clock := getattr(properties, 'clock_rate', 0):  # kHz
        lanes = 128 if (properties.major, properties.minor) >= (8, 6) else 64
        units = properties.multi_processor_count
        return Ceilings(bandwidth, units * lanes * clock * 1e3,
                        f'datasheet figure: {units} SMs x {lanes} lanes x {clock / 1e6:.2f} GHz')
    n = 2048
    matrix, product = (torch.ones(n, n, device=settings.device) for _ in range(2))
    seconds = fastest(lambda: torch.mm(matrix, matrix, out=product), settings)
    return Ceilings(bandwidth, n**3 / seconds, f'measured: a product of {n} x {n} matrices')


def fastest(call: Callable[[], object], settings: OpsSettings) -> float:
    call()
    return min(measure_window(call, settings.window, settings.device) for _ in range(settings.rounds))


def measure_window(call: Callable[[], object], window: float, device: str) -> float:
    """Seconds a call takes over a window of at least one."""
    calls, batch, start = 0, 1, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < window:
        for _ in range(batch):
            call()
        synchronize(device)
        calls += batch
        # a GPU is waited for only now and then, so that the next call is in its queue before one ends
        batch = 1 if device == 'cpu' else min(2 * batch, 64)
    return (time.perf_counter() - start) / calls


def can_run(row: Row, backend: Backend, settings: OpsSettings) -> bool:
    return backend != 'triton' or (settings.device != 'cpu' and find_spec('triton') is not None)


def operand_shape(row: Row, backend: Backend, batch: int) -> tuple[int, ...]:
    """Of the weight or the logits, the second input."""
    heads, K = row.channels // HEAD_DIM, row.kernel
    if backend == 'conv2d':
        return row.channels, 1, K, K
    return (heads, K, K) if row.op == 'light' else (batch, heads * K * K, row.side, row.side)


def function_of(row: Row, backend: Backend) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, operand) -> out."""
    if backend == 'conv2d':
        return lambda x, weight: F.conv2d(x, weight, padding=row.kernel // 2, groups=row.channels)
    function = lightconv2d if row.op == 'light' else dynamicconv2d
    fixed = {} if row.op == 'light' else {'kernel_size': (row.kernel, row.kernel)}
    if backend == 'compiled':
        return partial(torch.compile(function, fullgraph=True), backend='eager', **fixed)
    return partial(function, backend=backend, **fixed)


def build(row: Row, backend: Backend, settings: OpsSettings) -> Callable[[], object]:
    """Return a function that makes one call."""
    torch.manual_seed(settings.seed)
    function, like = function_of(row, backend), dict(dtype=getattr(torch, settings.dtype), device=settings.device)
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


def peak_memory(call: Callable[[], object], device: str) -> float | str:
    """MiB that a call allocates at its peak on top of its inputs, on a GPU."""
    if device == 'cpu':
        return NOT_MEASURED
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize(device)
    return rounded((torch.cuda.max_memory_allocated() - before) / 2**20)


def rounded(value: float) -> float:
    return float(f'{value:.5g}')


def floor(row: Row, backend: Backend, settings: OpsSettings, ceilings: Ceilings) -> dict[str, float]:
    """Least bytes, multiply-adds and milliseconds of a call, and the size of its inputs, outputs and gradients."""
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
    """The cells of a row, a dictionary for each backend."""
    torch._dynamo.reset()  # each shape compiles anew, and none counts towards the limit of recompilations
    calls = {name: build(row, name, settings) for name in settings.backends if can_run(row, name, settings)}
    memory = {}
    for backend, call in calls.items():
        call()  # compiles
        memory[backend] = peak_memory(call, settings.device)
    windows: dict[str, list[float]] = {backend: [] for backend in calls}
    for index in range(settings.rounds):
        for backend in sorted(calls, reverse=bool(index % 2)):  # none always comes after the same other
            if index == 0 or backend != 'naive':
                windows[backend].append(measure_window(calls[backend], settings.window, settings.device))
        bar.update()
    times = {backend: statistics.median(seconds) * 1e3 for backend, seconds in windows.items()}
    cells = []
    for backend in settings.backends:
        limits = floor(row, backend, settings, ceilings)
        ms, yardstick = times.get(backend), times.get('conv2d')
        cells.append(dict(
            **row._asdict(), heads=row.channels // HEAD_DIM, batch_size=settings.batch_size, dtype=settings.dtype,
            device=settings.device, threads=settings.threads, backend=backend,
            ms=rounded(ms) if ms else NOT_MEASURED,
            ratio_to_conv2d=rounded(ms / yardstick) if ms and yardstick else NOT_MEASURED,
            percent_of_floor=rounded(100 * limits['floor_ms'] / ms) if ms else NOT_MEASURED,
            peak_mib=memory.get(backend, NOT_MEASURED), **limits,
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


def write_table(path: Path, table: list[dict], origin: dict[str, str]) -> None:
    """Write the CSV, in which every line says where it comes from."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*table[0], *origin], lineterminator='\n')
    writer.writeheader()
    writer.writerows({**cell, **origin} for cell in table)
    write_file(path, lambda temporary: temporary.write_text(text.getvalue(), encoding='utf-8'))


def triton_version() -> str:
    return import_module('triton').__version__ if find_spec('triton') else 'not installed'


def main(settings: OpsSettings) -> list[dict]:
    """Measure and print row by row, and return the table, a dictionary for each row and backend."""
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
          f'multiply-adds/s in float32 ({ceilings.source})')
    table: list[dict] = []
    with progress_bar(total=len(rows) * settings.rounds, unit='round', desc='benchmark ops') as bar:
        for row in rows:
            cells = measure(row, settings, ceilings, bar)
            tqdm.write(render(row, cells))
            table += cells
            if settings.results_file:  # after each row: a run that is stopped leaves what it has measured
                write_table(Path(settings.results_file), table, origin)
    target = dict(op='dynamic', side=28, channels=192, kernel=7, backend='compiled')  # is to stay within 3.00
    ratios = {cell['passes']: cell['ratio_to_conv2d'] for cell in table if target.items() <= cell.items()}
    if ratios:
        print('\nTime of compiled dynamic 7x7, 28x28x192, over that of F.conv2d:', ', '.join(
            f'{passes.replace("_", " + ")} {shown(ratio, 2)}' for passes, ratio in ratios.items()))
    return table

