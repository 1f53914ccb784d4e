"""The fused kernel as a custom operator of torch; test_projected.py runs this file in Triton's interpreter."""
import pytest
import torch

from coatnet_zoo.ops import dynamicconv2d_projected
from coatnet_zoo.ops.dispatch import INTERPRETED
from coatnet_zoo.ops.dynamicconv2d import projected_kernels  # registers the operators

assert INTERPRETED, 'set TRITON_INTERPRET=1'
assert projected_kernels


def arguments() -> list[torch.Tensor]:
    x = torch.randn(1, 1, 2, 16, dtype=torch.float16).permute(0, 3, 1, 2)
    return [t.requires_grad_() for t in (x, torch.randn(3, 16).half(), torch.randn(16).half())]


@pytest.mark.parametrize('softmax,seed', [(True, True), (False, False)])
def test_opcheck(softmax, seed):
    x, projection, bias = arguments()
    rest = (torch.tensor([123456789012345]) if seed else None, .4 if seed else 0., softmax)
    torch.library.opcheck(torch.ops.coatnet_zoo.dynamicconv2d_projected.default, (x, projection, 1, 3, bias, *rest))
    x, projection, bias = (t.detach() for t in (x, projection, bias))
    torch.library.opcheck(torch.ops.coatnet_zoo.dynamicconv2d_projected_backward.default, (
        torch.randn_like(x), x, projection, 1, 3, bias, *rest, [True, True, False]))


def fused(x: torch.Tensor, projection: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return dynamicconv2d_projected(x, projection, (1, 3), bias, backend='triton')


def test_compiles_without_a_graph_break():
    tensors = arguments()
    out, expected = torch.compile(fused, fullgraph=True, backend='aot_eager')(*tensors), fused(*tensors)
    assert torch.equal(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.sin().sum(), tensors),
                            torch.autograd.grad(expected.sin().sum(), tensors), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_are_input_and_projection_alone():
    x, projection, _ = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        dynamicconv2d_projected(x, projection, (1, 3), backend='triton')
    assert saved == [x.shape, projection.shape]


def test_vmap_and_double_backward_refuse():
    x, projection, bias = arguments()
    with pytest.raises(NotImplementedError, match=r"dynamicconv2d_projected: .* no vmap; use backend='eager'"):
        torch.vmap(lambda x: fused(x, projection, bias))(x[None])
    grad, = torch.autograd.grad(fused(x, projection, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"dynamicconv2d_projected: .* no double backward"):
        torch.autograd.grad(grad.sum(), x)
