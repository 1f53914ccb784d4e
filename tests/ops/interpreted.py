"""Every kernel of `lightconv2d` and `dynamicconv2d` against the reference implementation, on any device.

`test_kernels.py` runs it as a script with the name of a part on a CPU, under TRITON_INTERPRET=1, and imports the same
cases on a GPU. With `--shifted` one tap of each kernel reads one position too far, and the tensors that exceed the
tolerance are printed.
"""
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from triton import jit
from triton import language as tl

from coatnet_zoo.ops import band_ops, dynamicconv2d, lightconv2d
from coatnet_zoo.ops.dispatch import INTERPRETED
from coatnet_zoo.ops.dropconnect import _mix, draw_seed
from coatnet_zoo.ops.dynamicconv2d import band as dynamic_band
from coatnet_zoo.ops.dynamicconv2d import direct as dynamic_direct
from coatnet_zoo.ops.dynamicconv2d.eager import dynamicconv2d_eager
from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton
from coatnet_zoo.ops.dynamicconv2d.naive import dynamicconv2d_naive
from coatnet_zoo.ops.lightconv2d import band as light_band
from coatnet_zoo.ops.lightconv2d import direct as light_direct
from coatnet_zoo.ops.lightconv2d import toeplitz
from coatnet_zoo.ops.lightconv2d.eager import lightconv2d_eager
from coatnet_zoo.ops.lightconv2d.kernels import lightconv2d_triton
from coatnet_zoo.ops.lightconv2d.naive import lightconv2d_naive
from coatnet_zoo.ops.triton_ops import dropconnect_factor

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """One comparison.

    weight: dtype of weight, logits and bias. scale: factor on weights and logits. kernels: kernels to force.
    """

    B: int
    C: int
    G: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    dtype: torch.dtype = f32
    weight: torch.dtype | None = None
    normalize: str = 'softmax'
    dropconnect: float = 0.
    layout: str = 'channels_last'
    bias: bool = True
    scale: float = 1.
    only: str = ''
    kernels: str = 'auto'


CASES = [
    Case(2, 32, 1, (14, 14), (3, 3)),
    Case(1, 64, 2, (7, 7), (7, 7), bf16, f32, dropconnect=.3),
    Case(2, 6, 3, (7, 9), (5, 5), normalize='none', dropconnect=.3, layout='sliced'),
    Case(1, 9, 3, (15, 15), (3, 3), f16, layout='contiguous', bias=False),
    Case(2, 1, 1, (15, 7), (1, 7), bf16, dropconnect=.1),
    Case(1, 4, 4, (7, 9), (7, 1), bf16, normalize='none', layout='sliced'),
    Case(1, 32, 1, (14, 15), (1, 1), f16, layout='contiguous'),
    Case(1, 32, 1, (5, 4), (13, 13), f16, f32, dropconnect=.3, kernels='direct'),
    Case(1, 16, 1, (4, 5), (31, 31), layout='sliced', only='light'),
    Case(1, 3, 1, (7, 9), (31, 1), bf16, f32, only='light'),
    Case(1, 4, 2, (9, 9), (13, 13), only='light'),
    Case(1, 48, 2, (5, 18), (3, 5), bf16, layout='expanded'),
    Case(1, 40, 1, (3, 33), (5, 3), normalize='none', layout='contiguous'),
    Case(1, 160, 1, (3, 3), (3, 3)),
    Case(1, 32, 1, (7, 7), (3, 3), scale=1e4),
    Case(1, 8, 2, (7, 7), (5, 5), f16, scale=1e4, dropconnect=.5),
]

# on tensor cores: maps that do not fill a tile, and every head width and kernel size
band = partial(Case, kernels='band')
BAND_CASES = [
    band(1, 32, 1, (7, 7), (7, 7), bf16),
    band(1, 16, 1, (14, 14), (7, 7), f16, dropconnect=.3),
    band(1, 32, 1, (15, 15), (5, 5), f16, normalize='none', dropconnect=.1),
    band(1, 32, 1, (9, 17), (3, 3), f16, bias=False),
    band(2, 64, 1, (3, 9), (7, 7), bf16),
    band(1, 96, 3, (1, 5), (7, 7), f16),
    band(1, 32, 2, (5, 1), (7, 1), bf16, dropconnect=.5),
    band(1, 32, 1, (7, 10), (3, 5), bf16, normalize='none'),
    band(1, 32, 1, (6, 10), (1, 1), f16),
    band(1, 32, 2, (7, 7), (7, 7), bf16, scale=1e4),
    band(1, 32, 1, (7, 7), (7, 3), f16, layout='expanded'),
]

# larger kernels on tensor cores; the first is for the fast tests
large = partial(Case, kernels='band', only='light')
TOEPLITZ_CASES = [
    large(1, 32, 1, (7, 7), (13, 13), bf16, f32, dropconnect=.3),
    large(3, 32, 2, (14, 14), (13, 13), f16, dropconnect=.3),
    large(1, 32, 1, (15, 15), (9, 9), f16, normalize='none'),
    large(1, 32, 1, (9, 17), (13, 13), bf16, bias=False),
    large(2, 96, 3, (1, 5), (31, 31), f16),
    large(1, 64, 1, (40, 9), (31, 11), f16),
    large(2, 32, 1, (5, 40), (1, 31), f16, layout='expanded'),
    large(1, 16, 1, (18, 17), (31, 31), f16),
    large(1, 32, 1, (18, 9), (15, 3), bf16, scale=30.),
]


def laid_out(shape: tuple[int, int, int, int], layout: str, generator: torch.Generator) -> torch.Tensor:
    """Normal random numbers (B, C, H, W) with the strides of `layout`."""
    B, C, H, W = shape
    if layout == 'expanded':
        return torch.randn(B, C, 1, 1, generator=generator).expand(shape)
    if layout == 'sliced':
        return torch.randn(B + 1, H + 1, 2 * W, C + 3, generator=generator)[1:, 1:, ::2, 2:-1].permute(0, 3, 1, 2)
    x = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last) if layout == 'channels_last' else x


def moved(x: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Convert x to a dtype and device, with the same strides."""
    base = torch.empty(0, dtype=dtype, device=device)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return base.set_(storage.to(device, dtype).untyped_storage(), x.storage_offset(), x.size(), x.stride())


def operands(op: str, case: Case, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Inputs (x, weight or logits, bias) by name, gradient of the output, and seed (None without DropConnect)."""
    generator = torch.Generator().manual_seed(1)
    (H, W), (Kh, Kw) = case.size, case.kernel
    step = 2 if case.layout == 'sliced' else 1
    weight = (torch.randn(case.G, Kh, Kw * step, generator=generator)[..., ::step] if op == 'light' else
              laid_out((case.B, case.G * Kh * Kw, H, W), case.layout.replace('expanded', 'channels_last'), generator))
    inputs = {'x': laid_out((case.B, case.C, H, W), case.layout.replace('expanded', 'channels_last'), generator),
              'weight': weight.mul_(case.scale)}
    if case.bias:
        inputs['bias'] = torch.randn(case.C * step, generator=generator)[::step]
    inputs = {name: moved(tensor, case.dtype if name == 'x' else case.weight or case.dtype, device)
              for name, tensor in inputs.items()}
    grad = moved(laid_out((case.B, case.C, H, W), case.layout, generator), case.dtype, device)
    seed = torch.tensor([0x123456789abcdef], device=device) if case.dropconnect else None
    return inputs, grad, seed


def evaluate(op: str, case: Case, function, inputs: dict[str, torch.Tensor], grad: torch.Tensor,
             seed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The output and the gradient of every input."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    x, weight, bias = inputs['x'], inputs['weight'], inputs.get('bias')
    if op == 'light':
        out = function(x, weight, bias, case.normalize, case.dropconnect, seed)
    else:
        out = function(x, weight, case.kernel, bias, case.normalize, case.dropconnect, seed)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad)
    return {'out': out.detach(), **dict(zip(inputs, gradients, strict=True))}


def distance(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    return (tensor.double() - exact).abs().max().item()


def check(op: str, case: Case, device: str = 'cpu', twice: bool = True) -> list[str]:
    """Names of the tensors that exceed the tolerance.

    The tolerance on the distance from the float64 reference is the larger of twice eager's distance and some ulp of the
    largest value. Also asserts shapes, dtypes, strides, finite values, and with `twice` identical bits in a second run.
    """
    naive, eager, triton = {
        'light': (lightconv2d_naive, lightconv2d_eager, lightconv2d_triton),
        'dynamic': (dynamicconv2d_naive, dynamicconv2d_eager, dynamicconv2d_triton)}[op]
    triton = partial(triton, kernels=case.kernels)
    inputs, grad, seed = operands(op, case, device)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    expected = evaluate(op, case, naive, wide, grad.double(), seed)
    rival = evaluate(op, case, eager, inputs, grad, seed)
    ours = evaluate(op, case, triton, inputs, grad, seed)
    again = evaluate(op, case, triton, inputs, grad, seed) if twice else ours
    wrong = []
    for name, exact in expected.items():
        assert ours[name].shape == exact.shape and ours[name].dtype == rival[name].dtype, (op, case, name)
        assert torch.equal(ours[name], again[name]), f'{op} {case}: {name} differs between two runs'
        assert ours[name].isfinite().all(), (op, case, name)
        if name in ('out', 'x'):
            assert ours[name].permute(0, 2, 3, 1).is_contiguous(), (op, case, name)
        ulp = torch.finfo(ours[name].dtype).eps * 2 ** exact.abs().max().log2().floor().item()
        # a sum of thousands of products, which almost cancel in the gradient of the softmax
        ulps = 16 if op == 'light' and name == 'weight' else 2
        if ours[name].dtype == torch.float32:
            ulps = max(ulps, 4)  # eager's sum over taps, by embedding_bag, rounds less than a loop over taps
        if not distance(ours[name], exact) <= max(2 * distance(rival[name], exact), ulps * ulp):
            wrong.append(name)
    return wrong


LAUNCHES = band_ops.Launch(tma=False, strips=1), band_ops.Launch(tma=True, strips=3)


def check_band(op: str, case: Case, launch: band_ops.Launch, device: str = 'cpu') -> list[str]:
    """`check` of the band kernels with these launch settings."""
    for kernels in (light_band, dynamic_band):
        kernels.default_launch = lambda x: launch
    wrong = check(op, case, device, twice=device != 'cpu')  # the interpreter always has the same order
    for kernels in (light_band, dynamic_band):
        kernels.default_launch = band_ops.default_launch
    return wrong


@jit
def shifted(u, K):
    """`offset`, plus one for the last tap."""
    return u - K // 2 + u // (K - 1)


@jit
def shifted_column(s, px):
    """`tap_column`, plus one slot."""
    return (s - px + 1) & 7


@jit
def shifted_slot_column(v, px):
    """`slot_column`, plus one slot."""
    return (v + px + 1) & 7


@jit
def shifted_columns_between(slot, position):
    """`columns_between`, plus one."""
    return slot % 8 - position % 8 + 1


@jit
def shifted_column_of_slot(dv, position):
    """`column_of_slot`, plus one."""
    return dv + position % 8 + 1


def print_shifted() -> None:
    """Print which tensors the tolerance refuses when the last row and column of taps look one position too far."""
    for kernels in (light_direct, dynamic_direct):
        kernels.offset = shifted
    for op in ('light', 'dynamic'):
        for case in (Case(1, 32, 1, (5, 5), (3, 3)), Case(1, 4, 2, (5, 7), (5, 5), bf16)):
            print(op, *check(op, case, twice=False))
    band_ops.tap_column = shifted_column
    light_band.slot_column = shifted_slot_column
    for op in ('light', 'dynamic'):
        print('band', op, *check(op, BAND_CASES[0], twice=False))
    toeplitz.columns_between = shifted_columns_between
    toeplitz.column_of_slot = shifted_column_of_slot
    print('toeplitz light', *check('light', TOEPLITZ_CASES[0], twice=False))


@jit
def factors(index_ptr, seed_ptr, out_ptr, threshold, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    factor = dropconnect_factor(tl.load(index_ptr + i), tl.load(seed_ptr), threshold, scale)
    tl.store(out_ptr + i, factor)


def check_mask() -> None:
    """The DropConnect mask is that of eager, read from the output for ones; the hash is also checked beyond 2^32."""
    seed = draw_seed(torch.device('cpu'))
    ones = torch.ones(2, 3, 5, 7)
    for p in (.1, .5, .9):
        ours = dynamicconv2d_triton(ones, ones, (1, 1), None, 'none', p, seed)
        assert torch.equal(ours, dynamicconv2d_naive(ones, ones, (1, 1), None, 'none', p, seed))
        wide = torch.ones(2, 3, 9, 32, dtype=f16).permute(0, 3, 1, 2)
        single = torch.ones(2, 2, 3, 9, dtype=f16).contiguous(memory_format=torch.channels_last)
        ours = dynamicconv2d_triton(wide, single, (1, 1), None, 'none', p, seed, kernels='band')
        assert torch.equal(ours, dynamicconv2d_naive(wide, single, (1, 1), None, 'none', p, seed))
        for kernels, dtype, K in (('direct', f32, 5), ('band', f16, 5), ('band', f16, 9)):
            point = torch.zeros(1, K, K, 32, dtype=dtype).permute(0, 3, 1, 2)
            point[..., K // 2, K // 2] = 1
            weight = torch.ones(2, K, K)
            ours = lightconv2d_triton(point, weight, None, 'none', p, seed, kernels)
            assert torch.equal(ours, lightconv2d_naive(point, weight, None, 'none', p, seed)), (kernels, K)

    index = torch.arange(64) * 0x3456789ab
    out = torch.empty(64)
    factors[1,](index, seed, out, 2 ** 31, 1., N=64)
    h = _mix((index ^ seed) & 0xffffffff)
    assert torch.equal(out, (_mix(h ^ (index >> 32) ^ (seed >> 32)) >= 2 ** 31).float())


def check_infinite_logits() -> None:
    """Taps that are switched off by logits of -inf, a whole kernel row of them first."""
    generator = torch.Generator().manual_seed(0)
    for kernels, dtype in (('direct', f32), ('band', f16)):
        x, logits = (torch.randn(1, 3, 5, n, generator=generator).to(dtype).permute(0, 3, 1, 2) for n in (32, 9))
        logits[:, :3] = float('-inf')
        ours = dynamicconv2d_triton(x, logits, (3, 3), None, 'softmax', 0., None, kernels=kernels)
        expected = dynamicconv2d_naive(x.double(), logits.double(), (3, 3), None, 'softmax', 0., None)
        assert distance(ours, expected) <= 4 * torch.finfo(dtype).eps, kernels


def check_edges() -> None:
    """Empty batches, gradients of some inputs only, and the compiler over the interpreted kernels."""
    for B in (0, 2):
        x, weight, logits = torch.randn(B, 4, 3, 3), torch.randn(2, 3, 3), torch.randn(B, 18, 3, 3)
        calls = {'light': lambda x, w: lightconv2d(x, w, backend='triton'),
                 'dynamic': lambda x, w: dynamicconv2d(x, w, (3, 3), backend='triton')}
        for op, w in (('light', weight), ('dynamic', logits)):
            for needs in ((True, False), (False, True), (True, True)):
                inputs = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)]
                out = calls[op](*inputs)
                assert out.shape == x.shape
                grads = torch.autograd.grad(out.square().sum(), [t for t in inputs if t.requires_grad])
                with torch.autocast('cpu', torch.bfloat16):
                    assert calls[op](*inputs).dtype == torch.bfloat16
                compiled = torch.compile(calls[op], fullgraph=True, backend='aot_eager')(*inputs)
                again = torch.autograd.grad(compiled.square().sum(), [t for t in inputs if t.requires_grad])
                assert torch.equal(compiled, out) and all(map(torch.equal, grads, again))


def check_wide() -> None:
    """The int64 code for images of 2^31 elements and more, forced on small images."""
    for kernels in (light_direct, dynamic_direct):
        kernels.needs_int64 = lambda *tensors: True
    for op in ('light', 'dynamic'):
        for case in (Case(2, 32, 1, (7, 9), (3, 3), dropconnect=.1), Case(1, 6, 3, (5, 5), (3, 5), bf16)):
            assert check(op, case, twice=False) == [], (op, case)


def check_far() -> None:
    """The gradient of LightConv's weight for offsets above 2^31 elements, in a sparse memory-mapped file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 3, generator=generator)
    x, grad = (torch.randn(3, 3, 4, 32, generator=generator).to(f16).permute(0, 3, 1, 2) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        memory = torch.from_file(str(Path(folder) / 'far'), shared=True, size=2 ** 31 + 2 ** 20, dtype=f16)
        far = memory.as_strided(x.shape, (2 ** 30 + 512, 1, 4 * 32, 32))  # the third image
        rows = memory.as_strided((1, 32, 3, 4), (1, 1, 2 ** 30 + 512, 32))  # the third row
        for name, run in (('direct', light_direct.launch_bwd_weight), ('toeplitz', toeplitz.launch_bwd_weight),
                          ('band', partial(light_band.launch_bwd_weight, launch=LAUNCHES[0])),
                          ('band, copy engine', partial(light_band.launch_bwd_weight, launch=LAUNCHES[1]))):
            expected = run(grad, x, weight, None, 0., True)
            assert expected.abs().max() > 0
            assert torch.equal(run(grad, far.copy_(x), weight, None, 0., True), expected), name
            assert torch.equal(run(far.copy_(grad), x, weight, None, 0., True), expected), name
        x, grad = x[:1], grad[:1]
        expected = light_direct.launch_bwd_weight(grad, x, weight, None, 0., True)
        assert torch.equal(light_direct.launch_bwd_weight(grad, rows.copy_(x), weight, None, 0., True), expected)
        assert torch.equal(light_direct.launch_bwd_weight(rows.copy_(grad), x, weight, None, 0., True), expected)


def is_quick(case: Case) -> bool:
    """Whether the interpreter takes no more than a second or two for it."""
    numbers, taps = case.B * case.C * case.size[0] * case.size[1], case.kernel[0] * case.kernel[1]
    return numbers <= 2000 and numbers * taps <= 16_000 * (1 + 7 * (case.kernels == 'band'))


def run_part(part: str) -> None:
    """'quick', or 'slow' with the cases that take more than seconds."""
    slow = part == 'slow'
    for case in CASES:
        for op in ('light', 'dynamic'):
            if case.only in ('', op) and is_quick(case) != slow:
                wrong = check(op, case, twice=slow and case.kernel == (3, 3))  # these reach each direct kernel
                assert not wrong, f'{op} {case}: {wrong} are further from the reference than the tolerance allows'
    for (i, case), (j, op) in product(enumerate(BAND_CASES), enumerate(('light', 'dynamic'))):
        if is_quick(case) != slow:
            wrong = check_band(op, case, LAUNCHES[(i + j) % 2])
            assert not wrong, f'band {op} {case}: {wrong} are further from the reference than the tolerance allows'
    for case in TOEPLITZ_CASES[1:] if slow else TOEPLITZ_CASES[:1]:
        wrong = check('light', case, twice=False)
        assert not wrong, f'toeplitz {case}: {wrong} are further from the reference than the tolerance allows'
    if slow:
        check_edges()
        check_far()
        check_wide()
    else:
        check_mask()
        check_infinite_logits()
        print_shifted()  # the last, as it leaves the kernels changed


if __name__ == '__main__':
    torch.set_num_threads(1)
    assert INTERPRETED, 'set TRITON_INTERPRET=1'
    run_part(sys.argv[1])
