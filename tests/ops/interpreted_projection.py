"""`dynamicconv2d_projected` in one kernel against the reference implementation, on any device.

`test_projected.py` runs it as a script on a CPU, under TRITON_INTERPRET=1, and imports the same cases on a GPU.
Arguments: 'cases' or 'large'; 'shifted' moves each tap by one slot and prints the tensors that exceed the tolerance.
"""
import sys
from functools import partial
from typing import NamedTuple

import torch
from interpreted import bf16, distance, f16, shifted_column

from coatnet_zoo.ops import band_ops, dynamicconv2d_projected
from coatnet_zoo.ops.dispatch import INTERPRETED
from coatnet_zoo.ops.dynamicconv2d import band, projected_band
from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton

LAUNCHES = band_ops.Launch(tma=False, strips=1), band_ops.Launch(tma=True, strips=3)


class Case(NamedTuple):
    """One comparison. scale: standard deviation of the logits."""

    B: int
    C: int
    G: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    dtype: torch.dtype = f16
    normalize: str = 'softmax'
    dropconnect: float = 0.
    bias: bool = True
    scale: float = 1.


CASES = [
    Case(1, 32, 1, (7, 7), (7, 7)),
    Case(1, 48, 3, (3, 9), (5, 5), bf16, dropconnect=.3),
    Case(1, 64, 2, (5, 9), (3, 3), bf16, normalize='none', bias=False),
    Case(1, 96, 3, (1, 5), (7, 7), bf16),
    Case(2, 64, 1, (5, 1), (3, 5), dropconnect=.5, normalize='none'),
    Case(1, 32, 2, (4, 7), (1, 1), bf16, dropconnect=.1),
]
LARGE = [  # in float16: the interpreter truncates to bfloat16, which adds up in large sums
    Case(1, 96, 3, (14, 14), (7, 7), dropconnect=.1),
    Case(1, 64, 2, (15, 15), (5, 5)),
    Case(1, 32, 1, (7, 7), (5, 7), scale=8.),
    Case(1, 128, 2, (9, 17), (3, 3), scale=4.),
    Case(2, 32, 2, (9, 17), (7, 3), normalize='none'),
]
GPU_CASES = [
    Case(8, 96, 3, (56, 56), (7, 7), bf16, dropconnect=.1),
    Case(8, 128, 4, (28, 28), (7, 7), bf16, scale=4.),
    Case(4, 64, 4, (31, 45), (5, 7)),
    Case(4, 128, 2, (14, 14), (3, 3), normalize='none'),
]


def inputs_of(case: Case, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs (x, projection, bias) by name, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    (H, W), taps = case.size, case.kernel[0] * case.kernel[1]
    inputs = {'x': torch.randn(case.B, H, W, case.C, generator=generator).permute(0, 3, 1, 2),
              'projection': torch.randn(case.G * taps, case.C, generator=generator) * case.scale / case.C ** .5}
    if case.bias:
        inputs['bias'] = torch.randn(case.C, generator=generator)
    grad = torch.randn(case.B, H, W, case.C, generator=generator).permute(0, 3, 1, 2)
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}, grad.to(device, case.dtype)


def evaluate(case: Case, backend: str, inputs: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradient of every input."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    torch.manual_seed(1)  # the seed of the masks
    out = dynamicconv2d_projected(
        **inputs, kernel_size=case.kernel, normalize=case.normalize, dropconnect=case.dropconnect, training=True,
        backend=backend)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad)
    return {'out': out.detach(), **dict(zip(inputs, gradients, strict=True))}


def check(case: Case, launch: band_ops.Launch, device: str = 'cpu') -> list[str]:
    """Names of the tensors that exceed the tolerance: twice eager's distance from the float64 reference, or 2 ulp."""
    for kernels in (band, projected_band):
        kernels.default_launch = lambda x: launch
    inputs, grad = inputs_of(case, device)
    expected = evaluate(case, 'naive', {name: t.double() for name, t in inputs.items()}, grad.double())
    rival = evaluate(case, 'eager', inputs, grad)
    ours = evaluate(case, 'triton', inputs, grad)
    for kernels in (band, projected_band):
        kernels.default_launch = band_ops.default_launch
    wrong = []
    for name, exact in expected.items():
        assert ours[name].shape == exact.shape and ours[name].dtype == case.dtype, (case, name)
        assert ours[name].isfinite().all(), (case, name)
        if name in ('out', 'x'):
            assert ours[name].permute(0, 2, 3, 1).is_contiguous(), (case, name)
        ulp = torch.finfo(case.dtype).eps * 2 ** exact.abs().max().log2().floor().item()
        if not distance(ours[name], exact) <= max(2 * distance(rival[name], exact), 2 * ulp):
            wrong.append(name)
    return wrong


def check_rounding(device: str = 'cpu') -> None:
    """Logits that are not rounded make the output more accurate than that of two steps on tensor cores."""
    case = Case(1, 32, 1, (7, 7), (7, 7), scale=16.)
    inputs, _ = inputs_of(case, device)
    run = partial(dynamicconv2d_projected, kernel_size=case.kernel)
    exact = run(**{name: tensor.double() for name, tensor in inputs.items()}, backend='naive')
    logits = torch.einsum('bchw,nc->bnhw', inputs['x'].double(), inputs['projection'].double()).to(case.dtype)
    two = dynamicconv2d_triton(
        inputs['x'], logits.contiguous(memory_format=torch.channels_last), case.kernel, inputs['bias'], 'softmax', 0.,
        None, kernels='band')
    ours, theirs = ((out.double() - exact).norm() for out in (run(**inputs, backend='triton'), two))
    assert ours < .5 * theirs, (ours, theirs)


def check_mask() -> None:
    """The DropConnect mask is that of the other backends, read from the output for ones."""
    x = torch.ones(2, 9, 5, 32, dtype=f16).permute(0, 3, 1, 2)
    projection = torch.full((2, 32), 1 / 32, dtype=f16)
    for p in (.1, .9):
        outs = []
        for backend in ('naive', 'triton'):
            torch.manual_seed(5)
            outs.append(dynamicconv2d_projected(
                x, projection, (1, 1), normalize='none', dropconnect=p, training=True, backend=backend))
        assert torch.equal(*outs) and 0 < (outs[0] == 0).float().mean() < 1


def check_edges() -> None:
    """An empty batch, gradients of some inputs only, and autocast with float32 weights."""
    for B in (0, 1):
        x = torch.randn(B, 3, 3, 32).permute(0, 3, 1, 2)
        projection = torch.randn(9, 32)
        for needs in ((True, False), (False, True)):
            inputs = [t.clone().requires_grad_(need) for t, need in zip((x, projection), needs, strict=True)]
            with torch.autocast('cpu', bf16):
                out = dynamicconv2d_projected(*inputs, (3, 3), backend='triton')
            assert out.shape == x.shape and out.dtype == bf16
            grad, = torch.autograd.grad(out.float().square().sum(), [t for t in inputs if t.requires_grad])
            assert grad.dtype == torch.float32 and bool(grad.any()) == (B > 0)


if __name__ == '__main__':
    torch.set_num_threads(1)
    assert INTERPRETED, 'set TRITON_INTERPRET=1'
    for i, case in enumerate(CASES if sys.argv[1] == 'cases' else LARGE):
        wrong = check(case, LAUNCHES[i % 2])
        assert not wrong, f'{case}: {wrong} are further from the reference than the tolerance allows'
    if sys.argv[1] == 'cases':
        check_rounding()
        check_mask()
        check_edges()
        band_ops.tap_column = shifted_column
        print(*check(CASES[0], LAUNCHES[0]))
