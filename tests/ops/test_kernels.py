"""The Triton kernels: in Triton's interpreter, as operators of torch, and on a GPU."""
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', reason='needs the triton package')

import interpreted
from interpreted import Case

from coatnet_zoo.ops.band_ops import band_obstacle, takes_band
from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton
from coatnet_zoo.ops.lightconv2d.kernels import lightconv2d_triton

ROOT = Path(__file__).parents[2]


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')(test))


bf16 = torch.bfloat16


def in_interpreter(*arguments: str) -> str:
    """Run Python with these arguments and Triton's interpreter on the CPU; returns its output."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_match_the_reference_and_shifted_taps_do_not():
    assert in_interpreter('tests/ops/interpreted.py', 'quick').splitlines() == [
        *['light out x weight'] * 2, *['dynamic out x weight'] * 2, 'band light out x weight',
        'band dynamic out x weight', 'toeplitz light out x weight']


@pytest.mark.slow
def test_kernels_match_the_reference_on_larger_maps():
    assert in_interpreter('tests/ops/interpreted.py', 'slow') == ''


def channels_last(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device='meta').contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('x,logits,kernel,reason', [
    (channels_last(2, 64, 8, 8), channels_last(2, 98, 8, 8), (7, 7), ''),
    (channels_last(2, 64, 1, 1), channels_last(2, 9, 1, 1), (3, 3), ''),
    (channels_last(2, 64, 8, 8), channels_last(2, 98, 8, 8, dtype=torch.float32), (7, 7), 'one dtype'),
    (channels_last(2, 64, 8, 8, dtype=torch.float32), channels_last(2, 98, 8, 8, dtype=torch.float32), (7, 7),
     'float16 or bfloat16, got torch.float32'),
    (channels_last(2, 64, 8, 8), channels_last(2, 162, 8, 8), (9, 9), 'up to 7 x 7, got 9 x 9'),
    (channels_last(2, 64, 8, 8), channels_last(2, 72, 8, 8), (3, 3), 'heads of 16, 32, 64 channels, got 8'),
    (channels_last(2, 64, 8, 8).contiguous(), channels_last(2, 98, 8, 8), (7, 7), 'x must be dense in channels_last'),
    (channels_last(2, 64, 8, 8), channels_last(2, 98, 8, 8).contiguous(), (7, 7), 'logits must be dense'),
    (channels_last(1, 64, 8192, 8192), channels_last(1, 18, 8192, 8192), (3, 3), 'below 2.31 elements'),
])
def test_band_kernels_say_why_they_cannot_run(x, logits, kernel, reason):
    found = band_obstacle(x, kernel, logits.shape[1] // (kernel[0] * kernel[1]), logits)
    assert re.search(reason, found) if reason else found == ''
    assert takes_band('op', 'auto', found) == (not reason) and not takes_band('op', 'direct', found)
    if reason:
        with pytest.raises(ValueError, match=f"op: the band kernels cannot run: .*{reason}.*use kernels='auto'"):
            takes_band('op', 'band', found)


def test_kernels_refuse_an_unknown_name_and_plain_cpus():
    with pytest.raises(ValueError, match="kernels must be 'auto', 'band' or 'direct', got 'dense'"):
        takes_band('op', 'dense', '')
    with pytest.raises(RuntimeError, match=r'lightconv2d runs on CUDA tensors, .* got x on cpu; call .*eager'):
        lightconv2d_triton(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1), None, 'none', 0., None)


@pytest.mark.slow
def test_kernels_are_operators_of_torch():
    in_interpreter('-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
                   'tests/ops/interpreted_operators.py', 'tests/ops/interpreted_projection_op.py')


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
@pytest.mark.parametrize('launch', interpreted.LAUNCHES)
@pytest.mark.parametrize('case', interpreted.BAND_CASES + GPU_BAND_CASES)
def test_band_kernels_on_a_gpu(op, case, launch):
    assert interpreted.check_band(op, case, launch, 'cuda') == []


@needs_gpu
@pytest.mark.parametrize('op', ['light', 'dynamic'])
def test_an_image_above_2_31_elements(op):
    """The last corner agrees with that of a crop."""
    side, C, K = 8200, 32, 3
    crop = (..., slice(-20, None), slice(-20, None))
    generator = torch.Generator('cuda').manual_seed(0)
    x = torch.empty(1, side, side, C, dtype=bf16, device='cuda').permute(0, 3, 1, 2).normal_(generator=generator)
    assert x.numel() > 2 ** 31
    if op == 'light':
        weight = torch.randn(1, K, K, device='cuda', generator=generator)
        small = weight
        run = partial(lightconv2d_triton, bias=None, normalize='softmax', dropconnect=0., seed=None, kernels='direct')
    else:
        weight = torch.empty(1, side, side, K * K, dtype=bf16, device='cuda').permute(0, 3, 1, 2)
        weight.normal_(generator=generator)
        small = weight[crop]
        run = partial(
            dynamicconv2d_triton, kernel_size=(K, K), bias=None, normalize='softmax', dropconnect=0., seed=None,
            kernels='direct')
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
