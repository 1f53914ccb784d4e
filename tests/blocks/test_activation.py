"""GELU and its inference form."""
import pytest
import torch
import torch.nn.functional as F

from coatnet_zoo.blocks.activation import GELU

FORMS = {'gelu_tanh': 'tanh', 'gelu': 'none'}


@pytest.mark.parametrize('act', FORMS)
@pytest.mark.parametrize('shape', [(3, 5), (2, 40, 33, 70), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_inplace_gelu_equals_gelu_and_overwrites(act, shape, memory_format):
    if len(shape) < 4 and memory_format == torch.channels_last:
        shape = (*shape, 2, 2)
    x = (torch.randn(shape, dtype=torch.float64) * 3).contiguous(memory_format=memory_format)
    expected = F.gelu(x, approximate=FORMS[act])
    inplace = GELU(act).fuse()
    y = x.clone(memory_format=torch.preserve_format)
    out = inplace(y)
    assert out.data_ptr() == y.data_ptr()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_inplace_gelu_takes_part_of_a_larger_tensor():
    base = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    kept, part = base.clone(), base[:, 1:4]
    expected = F.gelu(part, approximate='tanh')
    torch.testing.assert_close(GELU('gelu_tanh').fuse()(part), expected)
    assert torch.equal(base[:, 4:], kept[:, 4:]) and torch.equal(base[:, :1], kept[:, :1])


@pytest.mark.parametrize('act', FORMS)
def test_inplace_gelu_keeps_gradients(act):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GELU(act).fuse(), (x,))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('act', FORMS)
def test_inplace_gelu_in_half_precision(act, dtype):
    x = torch.randn(1000, dtype=dtype) * 4
    expected = F.gelu(x.double(), approximate=FORMS[act])
    error = (GELU(act).fuse()(x.clone()).double() - expected).abs().max()
    eager = (F.gelu(x, approximate=FORMS[act]).double() - expected).abs().max()
    assert error <= 2 * eager
