"""Kernels compiled without a GPU, by Triton's compiler and assembler, and the resources that they use.

As a script it compiles all of `BUILDS` and writes results/kernel_budgets.csv, the reference of test_kernel_budgets.py:
`PYTHONPATH=. python tests/ops/compiled.py`. Rows of other Triton versions are kept.
"""
import csv
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from coatnet_zoo.ops.band_ops import Launch, slots_of_span
from coatnet_zoo.ops.dynamicconv2d import band as dynamic_band
from coatnet_zoo.ops.dynamicconv2d import direct as dynamic_direct
from coatnet_zoo.ops.dynamicconv2d import projected_band
from coatnet_zoo.ops.lightconv2d import band as light_band
from coatnet_zoo.ops.lightconv2d import direct as light_direct
from coatnet_zoo.ops.lightconv2d import toeplitz

ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / 'results/kernel_budgets.csv'
TOOLS = Path(triton.__file__).parent / 'backends/nvidia/bin'
TYPES = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32', torch.int64: 'i64'}
OPTIONS = ('num_warps', 'num_stages', 'maxnreg', 'enable_fp_fusion')
BATCH = 128


class Usage(NamedTuple):
    """Resources of a compiled kernel: registers per thread, bytes of stack and local memory per thread, bytes of shared
    memory per program, instructions in total and in the longest loop; and whether every access to a matrix in global
    memory has the lanes of a warp along its last dimension."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    instructions: int
    loop: int
    lanes_inner: bool
    warps: int


def compile_for(arch: int, kernel: JITFunction, arguments: dict, options: dict) -> CompiledKernel:
    """Compile a kernel as a launch with these arguments would: ones are constants, multiples of 16 are marked."""
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name] = 'constexpr'
            constants[i,] = value
        elif isinstance(value, TensorDescriptor):
            types[parameter.name] = f'tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>'
        else:
            types[parameter.name] = (
                f'*{TYPES[value.dtype]}' if isinstance(value, torch.Tensor) else 'fp32' if isinstance(value, float)
                else 'i32' if abs(value) < 2 ** 31 else 'i64')
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[i,] = [['tt.divisibility', 16]]
    return triton.compile(ASTSource(kernel, types, constants, attributes), GPUTarget('cuda', arch, 32), options)


def usage(compiled: CompiledKernel) -> Usage:
    """Read the resources of a kernel from its machine code."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        Path(file.name).write_bytes(compiled.asm['cubin'])
        said = subprocess.run([TOOLS / 'cuobjdump', '-res-usage', file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / 'nvdisasm', '-c', file.name], capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r'REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)', said).groups())
    places, count, loop, end = {}, 0, 0, 0
    for line in code.splitlines():
        if label := re.match(r'\s*(\.L\w+):', line):
            places[label[1]] = count
        elif re.match(r'\s*/\*[0-9a-f]{4,}\*/\s', line):
            count += 1
            branch = re.search(r'BRA.*`\((\.L\w+)\)', line)
            # a branch back from behind the program's end belongs to a barrier's wait
            if branch and places.get(branch[1], -1) >= end:
                loop = max(loop, count - places[branch[1]])
            if re.search(r'\sEXIT\s', line):
                end = count
    ir = compiled.asm['ttgir']
    layouts = {match[1] for match in re.finditer(r'tt\.(?:load|store) .*tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>', ir)}
    inner = all(re.search(rf'^{layout} = .*order = \[1, 0\]', ir, re.MULTILINE) for layout in layouts)
    return Usage(compiled.metadata.name, registers, stack + local, compiled.metadata.shared, count, loop, inner,
                 compiled.metadata.num_warps)


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Usage]]:
    """Make launches compile only; yields a list that gets the resources of each kernel."""
    seen, launch = [], JITFunction.run

    def compile_instead(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        seen.append(usage(compile_for(arch, kernel, arguments, options)))
        assert grid[0] < 2 ** 31

    JITFunction.run = compile_instead
    try:
        yield seen
    finally:
        JITFunction.run = launch


def channels_last(size: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(BATCH, size, size, channels, dtype=dtype, device='meta').permute(0, 3, 1, 2)


def launch_direct(size: int, C: int, K: int, dtype: torch.dtype, p: float, head: int = 32) -> None:
    """Launch every kernel without tensor cores once, as in training, on tensors without data."""
    x, logits = channels_last(size, C, dtype), channels_last(size, C // head * K * K, dtype)
    weight, bias = torch.empty(C // head, K, K, device='meta'), torch.empty(C, device='meta')
    seed = torch.empty(1, dtype=torch.int64, device='meta') if p else None
    light_direct.launch_fwd(x, weight, bias, seed, p, True, transposed=False)
    light_direct.launch_fwd(x, weight, None, seed, p, True, transposed=True)
    light_direct.launch_bwd_weight(x, x, weight, seed, p, True)
    _, stats = dynamic_direct.launch_fwd(x, logits, (K, K), bias, seed, p, True)
    dynamic_direct.launch_bwd_input(x, logits, (K, K), stats, seed, p, True)
    dynamic_direct.launch_bwd_logits(x, x, logits, (K, K), stats, seed, p, True)


def launch_band(size: int, C: int, K: int, dtype: torch.dtype, p: float, head: int = 32, tma: bool = False) -> None:
    """Launch every kernel for tensor cores once, as in training, on tensors without data."""
    x, logits = channels_last(size, C, dtype), channels_last(size, C // head * K * K, dtype)
    seed = torch.empty(1, dtype=torch.int64, device='meta') if p else None
    weight, bias = torch.empty(C // head, K, K, device='meta'), torch.empty(C, dtype=dtype, device='meta')
    launch = Launch(tma=tma)
    many = dynamic_band.bounded(launch, seed)
    light_band.launch_fwd(x, weight, bias, seed, p, True, transposed=False, launch=launch)
    light_band.launch_bwd_weight(x, x, weight, seed, p, True, launch)
    _, stats = dynamic_band.launch_fwd(x, logits, (K, K), bias, seed, p, True, many)
    dynamic_band.launch_bwd_input(
        x, logits, (K, K), stats, seed, p, True, dynamic_band.launch_of_bwd_input(launch, head, seed))
    dynamic_band.launch_bwd_logits(
        x, x, logits, (K, K), stats, seed, p, True, dynamic_band.launch_of_bwd_logits(launch, head, slots_of_span(K)))


def launch_projected(
        size: int, C: int, K: int, dtype: torch.dtype, p: float, head: int = 32, tma: bool = False) -> None:
    """Launch the kernel that includes the projection, on tensors without data."""
    x = channels_last(size, C, dtype)
    projection = torch.empty(C // head * K * K, C, dtype=dtype, device='meta')
    seed = torch.empty(1, dtype=torch.int64, device='meta') if p else None
    projected_band.launch_fwd(x, projection, (K, K), None, seed, p, True, Launch(tma=tma))


def launch_toeplitz(size: int, C: int, K: int, dtype: torch.dtype, p: float, head: int = 32, tma: bool = False) -> None:
    """Launch LightConv's kernels for tensor cores and large K, on tensors without data; they use plain pointers."""
    x = channels_last(size, C, dtype)
    seed = torch.empty(1, dtype=torch.int64, device='meta') if p else None
    weight, bias = torch.empty(C // head, K, K, device='meta'), torch.empty(C, dtype=dtype, device='meta')
    toeplitz.launch_fwd(x, weight, bias, seed, p, True, transposed=False)
    toeplitz.launch_bwd_weight(x, x, weight, seed, p, True)


class Build(NamedTuple):
    """One set of launches whose resources are recorded."""

    arch: int
    size: int
    C: int
    K: int
    head: int
    dropconnect: float
    launch: Callable[..., None] = launch_band

    def __str__(self) -> str:
        """Name of the build, the same in every process, as pytest-xdist requires."""
        return (f'{self.launch.__name__}-sm_{self.arch}-{self.size}x{self.C}-K{self.K}-head{self.head}-'
                f'{self.dropconnect}')

    def usages(self) -> list[Usage]:
        with compiling_for(self.arch) as seen:
            self.launch(self.size, self.C, self.K, torch.bfloat16, self.dropconnect, self.head, tma=self.arch >= 90)
        return [used for used in seen if re.search('_band_|_toeplitz_(fwd|bwd)', used.kernel)]

    def outputs_a_turn(self, used: Usage) -> float:
        """Outputs (for the weight gradient: elements of grad) that a warp finishes in one iteration of the loop.

        A program of the band kernels handles a tile of 16 positions of a head per iteration. A Toeplitz
        program needs several iterations for its tiles, over slices, octets and windows of x; all of them lie inside a
        large image.
        """
        if 'toeplitz' not in used.kernel:
            return 16 * self.head / used.warps
        pairs, _, _, reach, reach_w = toeplitz.tiles(self.size, self.size, self.K, self.K)
        if 'fwd' in used.kernel:
            part, images = toeplitz.slice_of(pairs, reach), 256 // self.head
        else:
            part, images = pairs, max(1, 64 // self.head)
        turns = (2 * reach_w + 1) * -(-(pairs + 2 * reach) // part)
        return pairs * 16 * images * self.head / (turns * used.warps)

    def row(self, used: Usage) -> dict[str, str]:
        """Row of results/kernel_budgets.csv for a kernel."""
        return {
            'kernel': used.kernel, 'arch': f'sm_{self.arch}', 'shape': f'{self.size}x{self.size}x{self.C}',
            'kernel_size': str(self.K), 'head_dim': str(self.head), 'dropconnect': str(self.dropconnect),
            'triton': '.'.join(triton.__version__.split('.')[:2]),
            'instructions_per_output': f'{32 * used.loop / self.outputs_a_turn(used):.1f}',
            'registers': str(used.registers), 'spilled_bytes': str(used.spilled), 'shared_bytes': str(used.shared)}


BUILDS = [Build(90, 56, 96, 7, 32, 0.), Build(90, 14, 384, 7, 32, .1), Build(90, 28, 192, 3, 64, 0.),
          Build(90, 28, 192, 7, 64, 0.), Build(90, 28, 192, 7, 64, .1),
          Build(80, 28, 192, 7, 32, 0.), Build(80, 14, 384, 5, 16, 0.),
          Build(90, 56, 96, 7, 32, 0., launch_projected), Build(90, 28, 128, 3, 64, .1, launch_projected),
          Build(80, 56, 64, 5, 16, 0., launch_projected),
          Build(90, 56, 96, 13, 32, 0., launch_toeplitz), Build(90, 14, 384, 13, 32, .1, launch_toeplitz),
          Build(90, 28, 192, 31, 64, 0., launch_toeplitz), Build(90, 56, 96, 31, 32, 0., launch_toeplitz),
          Build(80, 56, 96, 31, 32, 0., launch_toeplitz)]


def read_budgets() -> list[dict[str, str]]:
    with BUDGETS.open(newline='') as file:
        return list(csv.DictReader(file))


def write_budgets() -> None:
    rows = [build.row(used) for build in BUILDS for used in build.usages()]
    kept = [row for row in read_budgets() if row['triton'] != rows[0]['triton']] if BUDGETS.exists() else []
    rows = sorted(kept + rows, key=lambda row: tuple(map(int, row['triton'].split('.'))))
    temporary = BUDGETS.with_suffix('.tmp')
    with temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(BUDGETS)


if __name__ == '__main__':
    write_budgets()
