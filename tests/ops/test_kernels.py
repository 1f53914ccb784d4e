"""The Triton kernels: in Triton's interpreter, as operators of torch, and on a GPU."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='needs the triton package')

import interpreted
from interpreted import Case

from coatnet_zoo.ops.dynamicconv2d import kernels as dynamic_kernels
from coatnet_zoo.ops.lightconv2d import kernels as light_kernels

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
bf16 = torch.bfloat16


def in_interpreter(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests/ops/interpreted.py'), *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_keep_to_the_definition():
    assert in_interpreter() == 'ok\n'


def test_the_yardstick_sees_one_shifted_tap():
    assert in_interpreter('--shifted').splitlines() == [
        *['light out x weight'] * 2, *['dynamic out x weight'] * 2, 'band light out x weight',
        'band dynamic out x weight']


# As operators of torch, on a CPU without the interpreter, where eager computes them.

def light_arguments(seed: bool = False) -> tuple:
    x, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(3, 3, 5), torch.randn(6)
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    return x, weight, bias, torch.tensor([123456789012345]) if seed else None, .4 if seed else 0.


def dynamic_arguments(seed: bool = False) -> tuple:
    x, _, bias, *rest = light_arguments(seed)
    return x, torch.randn(2, 45, 5, 7).requires_grad_(), 3, 5, bias, *rest


def plain(values) -> list:
    return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('seed', [True, False])
def test_opcheck(seed, softmax):
    ops = torch.ops.coatnet_zoo
    x, *_ = light = (*light_arguments(seed), softmax)
    torch.library.opcheck(ops.lightconv2d.default, light)
    torch.library.opcheck(
        ops.lightconv2d_backward.default, plain((torch.randn_like(x), *light, [True, True, False])))

    x, logits, Kh, Kw, bias, *rest = dynamic = (*dynamic_arguments(seed), softmax)
    torch.library.opcheck(ops.dynamicconv2d.default, dynamic)
    _, stats = ops.dynamicconv2d(*dynamic)
    torch.library.opcheck(ops.dynamicconv2d_backward.default, plain(
        (torch.randn_like(x), x, logits, Kh, Kw, bias, stats, *rest, [False, True, True])))


@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('seed', [True, False])
def test_gradients_in_torch_are_those_of_finite_differences(seed, softmax):
    light, dynamic = light_arguments(seed), dynamic_arguments(seed)
    for operator, arguments in (
            (light_kernels.lightconv2d, light), (lambda *a: dynamic_kernels.dynamicconv2d(*a)[0], dynamic)):
        arguments = [a.detach()[..., :4, :4].double().requires_grad_() if isinstance(a, torch.Tensor) and a.ndim == 4
                     else a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                     else a for a in arguments]
        assert torch.autograd.gradcheck(lambda *a, f=operator: f(*a, softmax), arguments, fast_mode=True)


def both(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (light_kernels.triton(x, weight, bias, 0., None, 'softmax')
            + dynamic_kernels.triton(x, logits, (3, 5), bias, 'none', 0., None))


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    x, weight, bias, *_ = light_arguments()
    return [x, weight, dynamic_arguments()[1], bias]


@pytest.mark.parametrize('dynamic', [None, True])
def test_compiles_without_a_graph_break(tensors, dynamic):
    out = torch.compile(both, fullgraph=True, backend='aot_eager', dynamic=dynamic)(*tensors)
    expected = both(*tensors)
    assert torch.equal(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.sin().sum(), tensors),
                            torch.autograd.grad(expected.sin().sum(), tensors), strict=True):
        assert torch.equal(ours, theirs)


def test_exports_as_an_operator(tensors):
    class Both(torch.nn.Module):
        def forward(self, x, weight, logits, bias):
            ops = torch.ops.coatnet_zoo
            return (ops.lightconv2d(x, weight, bias, None, 0., True)
                    + ops.dynamicconv2d(x, logits, 3, 5, bias, None, 0., False)[0])

    batch = torch.export.Dim('batch')
    program = torch.export.export(Both(), tuple(tensors), dynamic_shapes=({0: batch}, None, {0: batch}, None))
    x, weight, logits, bias = tensors
    three = (x[:1].repeat(3, 1, 1, 1), weight, logits[:1].repeat(3, 1, 1, 1), bias)
    assert torch.equal(program.module()(*three), both(*three))
    assert 'coatnet_zoo.dynamicconv2d' in program.graph_module.code


def test_vmap_and_double_backward_refuse(tensors):
    x, weight, logits, bias = tensors
    calls = {'lightconv2d': lambda x: light_kernels.triton(x, weight, bias, 0., None, 'softmax'),
             'dynamicconv2d': lambda x: dynamic_kernels.triton(x, logits, (3, 5), bias, 'softmax', 0., None)}
    for op, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{op}: .* no vmap; use backend='eager'"):
            torch.vmap(call)(x[None])
        grad, = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op}: .* no double backward; use backend='eager'"):
            torch.autograd.grad(grad.sum(), x)


# On a GPU.

GPU_CASES = [
    Case(8, 96, 3, (56, 56), (7, 7), bf16, torch.float32, dropconnect=.1),
    Case(8, 192, 6, (28, 28), (3, 3), torch.float16),
    Case(4, 384, 12, (14, 14), (13, 13), bf16, normalize='none'),
    Case(4, 96, 3, (56, 56), (31, 31), bf16, torch.float32, only='light'),
    Case(4, 120, 5, (33, 57), (5, 7), layout='sliced'),
    Case(3, 256, 2, (17, 9), (3, 3), layout='contiguous'),
]
GPU_BAND_CASES = [
    interpreted.band(8, 96, 3, (56, 56), (7, 7), bf16, dropconnect=.1),
    interpreted.band(8, 192, 6, (28, 28), (7, 7), bf16),
    interpreted.band(8, 384, 12, (14, 14), (7, 7), torch.float16),
    interpreted.band(4, 384, 24, (14, 14), (3, 3), bf16),
    interpreted.band(4, 256, 4, (31, 45), (5, 7), torch.float16, normalize='none'),
    interpreted.band(2, 96, 3, (56, 56), (7, 7), torch.float16, scale=30.),
]


@needs_gpu
@pytest.mark.parametrize('op', ['light', 'dynamic'])
@pytest.mark.parametrize('case', interpreted.CASES + GPU_CASES)
def test_on_a_gpu(op, case):
    if case.only in ('', op):
        assert interpreted.check(op, case, 'cuda') == []


@needs_gpu
@pytest.mark.parametrize('op', ['light', 'dynamic'])
@pytest.mark.parametrize('case', interpreted.BAND_CASES + GPU_BAND_CASES)
def test_band_kernels_on_a_gpu(op, case):
    assert interpreted.check_band(op, case, 'cuda') == []


@needs_gpu
@pytest.mark.parametrize('op', ['light', 'dynamic'])
def test_an_image_above_2_31_elements(op):
    """Its last corner is that of a crop."""
    side, C, K = 8200, 32, 3
    crop = (..., slice(-20, None), slice(-20, None))
    generator = torch.Generator('cuda').manual_seed(0)
    x = torch.empty(1, side, side, C, dtype=bf16, device='cuda').permute(0, 3, 1, 2).normal_(generator=generator)
    assert x.numel() > 2 ** 31
    if op == 'light':
        weight = torch.randn(1, K, K, device='cuda', generator=generator)
        small = weight
        run = partial(light_kernels.triton, bias=None, dropconnect=0., seed=None, normalize='softmax')
    else:
        weight = torch.empty(1, side, side, K * K, dtype=bf16, device='cuda').permute(0, 3, 1, 2)
        weight.normal_(generator=generator)
        small = weight[crop]
        run = partial(
            dynamic_kernels.triton, kernel_size=(K, K), bias=None, normalize='softmax', dropconnect=0., seed=None)
    inputs = [x.requires_grad_(), weight.requires_grad_(op == 'dynamic')]
    small = [x[crop].detach().requires_grad_(), small.detach().requires_grad_(op == 'dynamic')]
    out, expected = run(*inputs), run(*small)
    inside = (..., slice(-18, None), slice(-18, None))
    assert torch.equal(out[inside], expected[inside])
    needed = 2 if op == 'dynamic' else 1
    ours = torch.autograd.grad(out, inputs[:needed], x.detach())
    theirs = torch.autograd.grad(expected, small[:needed], small[0].detach())
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[inside], other[inside])
