"""The Triton kernels as custom operators of torch; test_kernels.py runs this file in Triton's interpreter."""
import pytest
import torch

from coatnet_zoo.ops.dispatch import INTERPRETED
from coatnet_zoo.ops.dynamicconv2d.kernels import dynamicconv2d_triton
from coatnet_zoo.ops.lightconv2d.kernels import lightconv2d_triton

assert INTERPRETED, 'set TRITON_INTERPRET=1'


# tiny sizes: the interpreter takes milliseconds a step, and opcheck calls an operator dozens of times

def light_arguments(seed: bool = False) -> tuple:
    x, weight, bias = torch.randn(2, 2, 2, 3), torch.randn(1, 1, 3), torch.randn(2)
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    return x, weight, bias, torch.tensor([123456789012345]) if seed else None, .4 if seed else 0.


def dynamic_arguments(seed: bool = False) -> tuple:
    x, _, bias, *rest = light_arguments(seed)
    return x, torch.randn(2, 3, 2, 3).requires_grad_(), 1, 3, bias, *rest


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


def both(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (lightconv2d_triton(x, weight, bias, 'softmax', 0., None)
            + dynamicconv2d_triton(x, logits, (1, 3), bias, 'none', 0., None))


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
                    + ops.dynamicconv2d(x, logits, 1, 3, bias, None, 0., False)[0])

    batch = torch.export.Dim('batch')
    program = torch.export.export(Both(), tuple(tensors), dynamic_shapes=({0: batch}, None, {0: batch}, None))
    x, weight, logits, bias = tensors
    three = (x[:1].repeat(3, 1, 1, 1), weight, logits[:1].repeat(3, 1, 1, 1), bias)
    assert torch.equal(program.module()(*three), both(*three))
    assert 'coatnet_zoo.dynamicconv2d' in program.graph_module.code


def test_vmap_and_double_backward_refuse(tensors):
    x, weight, logits, bias = tensors
    calls = {'lightconv2d': lambda x: lightconv2d_triton(x, weight, bias, 'softmax', 0., None),
             'dynamicconv2d': lambda x: dynamicconv2d_triton(x, logits, (1, 3), bias, 'softmax', 0., None)}
    for op, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{op}: .* no vmap; use backend='eager'"):
            torch.vmap(call)(x[None])
        grad, = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{op}: .* no double backward; use backend='eager'"):
            torch.autograd.grad(grad.sum(), x)
