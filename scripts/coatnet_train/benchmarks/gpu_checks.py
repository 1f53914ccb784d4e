"""Numerical checks of gpu_report.py: both operators against naive, an image above 2^31 elements, training steps."""
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm
from coatnet_train.benchmarks.config import FORCED
from coatnet_train.benchmarks.gpu_plan import Sizes
from coatnet_train.runtime.cli import one_line
from coatnet_zoo.ops.dynamicconv2d.eager import dynamicconv2d_eager
from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton
from coatnet_zoo.ops.dynamicconv2d.naive import dynamicconv2d_naive
from coatnet_zoo.ops.lightconv2d.eager import lightconv2d_eager
from coatnet_zoo.ops.lightconv2d.kernels import lightconv2d_triton
from coatnet_zoo.ops.lightconv2d.naive import lightconv2d_naive

__all__ = ['Check', 'check_large_image', 'check_operators', 'check_training']

FUNCTIONS = {'light': (lightconv2d_naive, lightconv2d_eager, lightconv2d_triton),
             'dynamic': (dynamicconv2d_naive, dynamicconv2d_eager, dynamicconv2d_triton)}
# maximum difference of a loss between two backends, as a fraction of the first loss
LOSS_TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}


class Check(NamedTuple):
    """One result: value and limit are numbers or '', detail is free text."""

    check: str
    result: str  # 'passed', 'failed', 'skipped', or a fact
    value: float | str = ''
    limit: float | str = ''
    detail: str = ''


def normal(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal random numbers (B, C, H, W) in channels_last memory format."""
    return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


def evaluate(op: str, function: Callable, x: torch.Tensor, operand: torch.Tensor, grad: torch.Tensor, kernel: int,
             **options: str) -> dict[str, torch.Tensor]:
    """Output 'out', gradient 'dx' of x, and gradient 'dw' of the operand (the weight or the logits)."""
    inputs = x.detach().requires_grad_(), operand.detach().requires_grad_()
    size = () if op == 'light' else ((kernel, kernel),)
    out = function(*inputs, *size, None, 'softmax', 0., None, **options)
    return {'out': out.detach(), **dict(zip(('dx', 'dw'), torch.autograd.grad(out, inputs, grad), strict=True))}


def distances(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """||found - exact|| / ||exact|| of every tensor."""
    return {name: ((found[name].double() - tensor).norm() / tensor.norm()).item() for name, tensor in exact.items()}


def judge(check: str, ours: dict[str, float], eager: dict[str, float], dtype: torch.dtype, detail: str) -> Check:
    """Check for the tensor with the largest distance relative to its limit.

    The limit is twice the distance of eager, or a few epsilons of the dtype if that is more.
    """
    # more in float32: the kernels use the GPU's approximate exp2 and division, eager does not
    eps = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    limits = {name: max(2 * eager[name], eps) for name in ours}
    worst = max(ours, key=lambda name: ours[name] / limits[name] if ours[name] == ours[name] else float('inf'))
    passed = all(ours[name] <= limits[name] for name in ours)  # NaN is not
    return Check(check, 'passed' if passed else 'failed', float(f'{ours[worst]:.3g}'), float(f'{limits[worst]:.3g}'),
                 f'{worst}; {detail}')


def float32_is_float32() -> None:
    """Disable TF32 for convolutions and matrix products, because eager in TF32 is no reference for float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def check_operators(sizes: Sizes, device: str) -> Iterator[Check]:
    """Compare output and gradients of every kernel choice with naive in float64, on inputs from a fresh random seed."""
    float32_is_float32()
    seed = int.from_bytes(os.urandom(4), 'little')
    for op in ('dynamic', 'light'):
        naive, eager, triton = FUNCTIONS[op]
        for number, (B, C, G, side, K) in enumerate(sizes.compared):
            for name in sizes.compared_dtypes:
                torch.manual_seed(seed + number)
                dtype, case = getattr(torch, name), f'{op} {K}x{K}, {B}x{side}x{side}x{C}, {name}'
                like = dict(dtype=dtype, device=device)
                x, grad = (normal(B, C, side, side, **like) for _ in range(2))
                operand = torch.randn(G, K, K, **like) if op == 'light' else normal(B, G * K * K, side, side, **like)
                try:
                    exact = evaluate(op, naive, x.double(), operand.double(), grad.double(), K)
                except torch.OutOfMemoryError:
                    yield Check(case, 'skipped', detail='naive in float64 is out of memory')
                    continue
                rival = distances(evaluate(op, eager, x, operand, grad, K), exact)
                for kernels in ('auto', *FORCED):
                    check = f'{case}, {kernels}'
                    try:
                        ours = evaluate(op, triton, x, operand, grad, K, kernels=kernels)
                    except ValueError as error:  # a case that the forced kernels do not support
                        yield Check(check, 'skipped', detail=one_line(error))
                        continue
                    yield judge(check, distances(ours, exact), rival, dtype, f'seed {seed}')


def check_large_image(side: int, device: str) -> Iterator[Check]:
    """Compare the last corner of an image (1, 32, side, side) in bfloat16 with naive in float64 on a crop.

    The gradient of the output is zero outside of the corner, so the crop also determines the gradient of LightConv's
    weight.
    """
    C, K, crop, inside = 32, 3, 6, 4
    elements = C * side * side
    corner = (..., slice(-crop, None), slice(-crop, None))
    for op in ('dynamic', 'light'):
        naive, eager, triton = FUNCTIONS[op]
        like = dict(dtype=torch.bfloat16, device=device)
        torch.manual_seed(0)
        x = torch.empty(1, side, side, C, **like).normal_().permute(0, 3, 1, 2)
        grad = torch.zeros(1, side, side, C, **like).permute(0, 3, 1, 2)
        grad[..., -inside:, -inside:].normal_()
        if op == 'light':
            operand = torch.randn(1, K, K, **like)
            small = operand
        else:
            operand = torch.empty(1, side, side, K * K, **like).normal_().permute(0, 3, 1, 2)
            small = operand[corner]
        try:
            ours = evaluate(op, triton, x, operand, grad, K)
        except torch.OutOfMemoryError:
            yield Check(f'{op} {K}x{K}, image of {elements} elements', 'skipped', detail='out of memory')
            continue

        def cut(found: dict[str, torch.Tensor], op: str = op) -> dict[str, torch.Tensor]:
            """Keep the values that the crop determines."""
            return {name: tensor if name == 'dw' and op == 'light' else tensor[..., -inside:, -inside:]
                    for name, tensor in found.items()}

        arguments = x[corner], small, grad[corner]
        exact = cut(evaluate(op, naive, *(tensor.double() for tensor in arguments), K))
        rival = distances(cut(evaluate(op, eager, *arguments, K)), exact)
        yield judge(f'{op} {K}x{K}, image of {elements} elements', distances(cut(ours), exact), rival,
                    torch.bfloat16, 'above 2^31' if elements > 2**31 else 'below 2^31')


@contextmanager
def forced_backend(backend: str) -> Iterator[list[str]]:
    """Force a backend for all operators of the package; yields a list that gets the chosen backend of each call."""
    calls: list[str] = []
    found = [module for name, module in list(sys.modules.items())
             if name.startswith('coatnet_zoo.ops.') and hasattr(module, 'choose_backend')]
    original = found[0].choose_backend

    def choose(requested: str | None, *arguments: object) -> str:
        calls.append(original(backend, *arguments))
        return calls[-1]

    for module in found:
        module.choose_backend = choose
    try:
        yield calls
    finally:
        for module in found:
            module.choose_backend = original


def losses(name: str, sizes: Sizes, device: str, dtype: str, backend: str) -> list[float]:
    """Losses of the first training steps on eight random batches in turn, with the given backend for L and D.

    The optimizer is SGD, because AdamW amplifies rounding where a gradient is nearly zero.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, img_size=sizes.step_size, **sizes.step_kwargs)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = [(normal(sizes.step_batch, 3, sizes.step_size, sizes.step_size, dtype=torch.float32, device=device),
                torch.randint(10, (sizes.step_batch,), device=device)) for _ in range(8)]
    found = []
    with forced_backend(backend) as calls:
        for step in range(sizes.steps):
            images, labels = batches[step % len(batches)]
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    if set(calls) != {backend}:
        raise RuntimeError(f'{name} was to run with the backend {backend!r}, but its operators ran with {set(calls)}.')
    return torch.stack(found).tolist()


def check_training(sizes: Sizes, device: str) -> Iterator[Check]:
    """Compare the losses of the same training steps in eager and Triton; the maximum difference has LOSS_TOLERANCE."""
    float32_is_float32()
    for name in sizes.step_models:
        for dtype, limit in LOSS_TOLERANCE.items():
            eager, triton = (losses(name, sizes, device, dtype, backend) for backend in ('eager', 'triton'))
            value = max(abs(ours - theirs) for ours, theirs in zip(triton, eager, strict=True)) / eager[0]
            passed = value <= limit and all(loss == loss for loss in triton)
            yield Check(f'{name}, {sizes.steps} training steps, {dtype}', 'passed' if passed else 'failed',
                        float(f'{value:.3g}'), limit, f'loss {eager[0]:.4f} to {eager[-1]:.4f} eager, {triton[-1]:.4f} '
                                                      f'triton; largest difference over the first loss')
