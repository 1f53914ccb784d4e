"""The reference implementation against the paper's formula and band matrix, and eager against the reference."""
import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from coatnet_zoo.ops import dynamicconv2d, lightconv2d

EAGER = importlib.import_module('coatnet_zoo.ops.dynamicconv2d.eager')  # attributes are the functions
EXACT = dict(rtol=0, atol=1e-12)


def rand(*shape: int, dtype=torch.float64, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


# The paper's operators on a sequence, positions i from 1 to n, channels c from 1 to d, taps j from 1 to k.

def paper(x: torch.Tensor, kernel_at, heads: int, k: int) -> torch.Tensor:
    """sum_j softmax(W)_j x[i + j - ceil((k + 1) / 2), c], W = kernel_at(b, i, ceil(c H / d)), for x (B, n, d)."""
    batch, n, d = x.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for i in range(1, n + 1):
            for c in range(1, d + 1):
                weights = softmax(kernel_at(b, i, math.ceil(c * heads / d)))
                for j in range(1, k + 1):
                    at = i + j - math.ceil((k + 1) / 2)
                    if 1 <= at <= n:
                        out[b, i - 1, c - 1] += weights[j - 1] * x[b, at - 1, c - 1]
    return out


def band_matrix(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The paper's implementation of both: kernels (B, H, n, k), expanded to a band matrix, times x (B, n, d)."""
    B, heads, n, k = kernels.shape
    d = x.shape[2]
    band = x.new_zeros(B * heads, n, n + k - 1)
    band.as_strided((B * heads, n, k), (n * (n + k - 1), n + k, 1)).copy_(kernels.reshape(B * heads, n, k))
    band = band.narrow(2, (k - 1) // 2, n)  # (B H, n, n): row i has the weights of all positions for output i
    columns = x.view(B, n, heads, d // heads).permute(0, 2, 1, 3).reshape(B * heads, n, d // heads)
    return (band @ columns).view(B, heads, n, d // heads).permute(0, 2, 1, 3).reshape(B, n, d)


@pytest.mark.parametrize('backend', ['naive', 'eager'])
@pytest.mark.parametrize('heads,d,k,n', [(1, 4, 3, 6), (2, 6, 5, 7), (4, 4, 7, 3), (3, 6, 1, 2)])
def test_a_sequence_is_the_papers_lightconv(heads, d, k, n, backend):
    x, weight = rand(2, n, d), rand(heads, k)
    by_hand = paper(x, lambda b, i, h: weight[h - 1].tolist(), heads, k)
    out = lightconv2d(x.transpose(1, 2)[:, :, None], weight[:, None], backend=backend)
    torch.testing.assert_close(out[:, :, 0].transpose(1, 2), by_hand, **EXACT)
    band = band_matrix(x, weight.softmax(1)[None, :, None].expand(2, heads, n, k))
    torch.testing.assert_close(band, by_hand, **EXACT)


@pytest.mark.parametrize('backend', ['naive', 'eager'])
@pytest.mark.parametrize('heads,d,k,n', [(1, 4, 3, 6), (2, 6, 5, 7), (4, 4, 7, 3), (3, 6, 1, 2)])
def test_a_sequence_is_the_papers_dynamicconv(heads, d, k, n, backend):
    x, project = rand(2, n, d), rand(d, heads * k)
    logits = x @ project  # W_i = Linear(x_i), (2, n, heads k)
    by_hand = paper(x, lambda b, i, h: logits[b, i - 1, (h - 1) * k:h * k].tolist(), heads, k)
    out = dynamicconv2d(
        x.transpose(1, 2)[:, :, None], logits.transpose(1, 2)[:, :, None], (1, k), backend=backend)
    torch.testing.assert_close(out[:, :, 0].transpose(1, 2), by_hand, **EXACT)
    band = band_matrix(x, logits.view(2, n, heads, k).softmax(3).transpose(1, 2))
    torch.testing.assert_close(band, by_hand, **EXACT)


def test_two_dimensions_by_unfolding():
    """An independent form in two dimensions: gather every window, then weight it."""
    x, logits, weight = rand(2, 6, 5, 4), rand(2, 3 * 15, 5, 4), rand(3, 3, 5)
    windows = F.unfold(x, (3, 5), padding=(1, 2)).view(2, 3, 2, 15, 5, 4)
    dynamic = (windows * logits.view(2, 3, 1, 15, 5, 4).softmax(3)).sum(3).view(2, 6, 5, 4)
    light = (windows * weight.view(1, 3, 1, 15, 1, 1).softmax(3)).sum(3).view(2, 6, 5, 4)
    torch.testing.assert_close(dynamicconv2d(x, logits, (3, 5), backend='naive'), dynamic, **EXACT)
    torch.testing.assert_close(lightconv2d(x, weight, backend='naive'), light, **EXACT)


@st.composite
def operands(draw) -> dict:
    heads, per_head = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    odd = st.integers(0, 3).map(lambda n: 2 * n + 1)
    return dict(
        B=draw(st.integers(0, 2)), C=heads * per_head, H=draw(st.integers(1, 12)), W=draw(st.integers(1, 12)), G=heads,
        kernel=(draw(odd), draw(odd)), bias=draw(st.booleans()), normalize=draw(st.sampled_from(['softmax', 'none'])),
        dropconnect=draw(st.sampled_from([0., .3])), strides=draw(st.sampled_from(['nchw', 'nhwc', 'sliced'])))


def laid_out(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The same values with other strides, as a leaf of autograd."""
    if strides == 'nhwc':
        x = x.contiguous(memory_format=torch.channels_last)
    elif strides == 'sliced':
        x = torch.cat([x, x], 3)[:, :, :, ::2].clone().repeat(1, 1, 1, 2)[..., :x.shape[3]]
    return x.requires_grad_()


def agree(op, tensors: list[torch.Tensor]) -> None:
    """Assert that output and all gradients of eager and naive agree in float64."""
    seen = []
    for backend in ('naive', 'eager'):
        torch.manual_seed(1)
        out = op(backend)
        assert out.is_contiguous(memory_format=torch.channels_last) or backend == 'naive' or 0 in out.shape
        seen.append((out, torch.autograd.grad(out, tensors, torch.cos(torch.arange(out.numel())).view_as(out).to(out))))
    torch.testing.assert_close(seen[1][0], seen[0][0], **EXACT)
    for ours, theirs in zip(seen[1][1], seen[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@settings(max_examples=60, deadline=None)
@given(operands())
def test_eager_lightconv_matches_the_reference(a):
    x = laid_out(rand(a['B'], a['C'], a['H'], a['W']), a['strides'])
    weight = rand(a['G'], *a['kernel'], grad=True)
    bias = rand(a['C'], grad=True) if a['bias'] else None
    agree(lambda backend: lightconv2d(
        x, weight, bias, normalize=a['normalize'], dropconnect=a['dropconnect'], training=True, backend=backend),
          [x, weight] + ([bias] if a['bias'] else []))


@pytest.mark.parametrize(('H', 'W', 'kernel'), [(9, 8, (3, 5)), (1, 3, (1, 7)), (5, 5, (1, 1)), (2, 6, (7, 5))])
def test_the_forms_of_eager_dynamicconv_agree(H, W, kernel):
    def summed(x, kernels, kernel_size):
        return EAGER.shifted_sum(x, EAGER.by_tap(kernels), kernel_size)

    x, kernels = rand(2, H, W, 3, 4, grad=True), rand(2, H, W, 3, kernel[0] * kernel[1], grad=True)
    forms = [form(x, kernels, kernel) for form in (
        summed, EAGER.weighted_bags, EAGER.band_product, EAGER.WeightedSum.apply)]
    weight = torch.randn_like(forms[0])
    expected = torch.autograd.grad(forms[0], (x, kernels), weight)
    for form in forms[1:]:
        torch.testing.assert_close(form, forms[0], **EXACT)
        torch.testing.assert_close(torch.autograd.grad(form, (x, kernels), weight), expected, **EXACT)


@pytest.mark.parametrize(('H', 'W', 'kernel', 'learns', 'form'), [
    (12, 12, 7, True, 'band_product'), (13, 12, 7, True, 'weighted_bags'), (12, 12, 7, False, 'weighted_bags'),
    (8, 8, 1, False, 'band_product'), (13, 5, 3, False, 'weighted_bags')])
def test_small_maps_take_the_band_matrix(H, W, kernel, learns, form, monkeypatch):
    taken = []

    def noting(name: str):
        run = getattr(EAGER, name)
        return lambda *args: (taken.append(name), run(*args))[1]

    for name in ('band_product', 'weighted_bags', 'shifted_sum'):
        monkeypatch.setattr(EAGER, name, noting(name))
    call = functools.partial(dynamicconv2d, kernel_size=(kernel, kernel), backend='eager')
    x, logits = rand(1, 2, H, W, grad=learns), rand(1, kernel ** 2, H, W)
    call(x, logits)
    assert taken == [form]
    if form == 'weighted_bags':  # graphs hold no bags
        traced = torch.jit.trace(lambda x, logits: call(x, logits), (x, logits), check_trace=False)
        assert taken[1:] == ['shifted_sum'] and 'embedding_bag' not in str(traced.graph)


@settings(max_examples=60, deadline=None)
@given(operands())
def test_eager_dynamicconv_matches_the_reference(a):
    x = laid_out(rand(a['B'], a['C'], a['H'], a['W']), a['strides'])
    logits = laid_out(rand(a['B'], a['G'] * a['kernel'][0] * a['kernel'][1], a['H'], a['W']), a['strides'])
    bias = rand(a['C'], grad=True) if a['bias'] else None
    agree(lambda backend: dynamicconv2d(
        x, logits, a['kernel'], bias, normalize=a['normalize'], dropconnect=a['dropconnect'], training=True,
        backend=backend),
        [x, logits] + ([bias] if a['bias'] else []))


@pytest.mark.parametrize('kernel', [(31, 31), (1, 31), (13, 13)], ids=str)
def test_large_kernels_reach_beyond_the_map(kernel):
    x, weight = rand(1, 4, 7, 6, grad=True), rand(2, *kernel, grad=True)
    agree(lambda backend: lightconv2d(x, weight, backend=backend), [x, weight])
    logits = rand(1, 2 * kernel[0] * kernel[1], 7, 6, grad=True)
    agree(lambda backend: dynamicconv2d(x, logits, kernel, backend=backend), [x, logits])


def test_channels_of_a_head_lie_together():
    """Channel c belongs to head c // (C // G), not c % G as in one of the paper's two implementations."""
    x = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
    x[:, :, 1, 1] = 1
    weight = torch.full((2, 3, 3), -1e9, dtype=torch.float64)
    weight[0, 0, 0] = weight[1, 2, 2] = 0  # head 0 reads from the upper left, head 1 from the lower right
    for backend in ('naive', 'eager'):
        out = lightconv2d(x, weight, backend=backend)
        assert out.nonzero().tolist() == [[0, 0, 2, 2], [0, 1, 2, 2], [0, 2, 0, 0], [0, 3, 0, 0]]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('backend', ['naive', 'eager'])
def test_halves_are_summed_in_float32(dtype, backend):
    """Sums of 961 or 49 equal values, which would stop growing in half precision."""
    x = torch.full((1, 2, 31, 31), 1.01, dtype=dtype)
    weight, logits = torch.ones(1, 31, 31, dtype=dtype), torch.ones(1, 1, 31, 31, dtype=dtype)
    out = lightconv2d(x, weight, normalize='none', backend=backend)
    assert out.dtype == dtype and out[0, 0, 15, 15].item() == pytest.approx(
        961 * x[0, 0, 0, 0].item(), rel=2e-5 + torch.finfo(dtype).eps)
    logits = torch.ones(1, 49, 31, 31, dtype=dtype)
    out = dynamicconv2d(x, logits, (7, 7), normalize='none', backend=backend)
    assert out.dtype == dtype and out[0, 0, 15, 15].item() == pytest.approx(
        49 * x[0, 0, 0, 0].item(), rel=2e-5 + torch.finfo(dtype).eps)


@pytest.mark.parametrize('backend', ['naive', 'eager'])
def test_huge_logits_stay_finite(backend):
    x = rand(1, 2, 5, 5, dtype=torch.float32)
    logits = rand(1, 2 * 9, 5, 5, dtype=torch.float32) * 1e4
    assert dynamicconv2d(x, logits, (3, 3), backend=backend).isfinite().all()
    assert lightconv2d(x, rand(2, 3, 3, dtype=torch.float32) * 1e4, backend=backend).isfinite().all()


def test_gradients_and_second_gradients_are_those_of_finite_differences():
    x, logits, weight = rand(1, 4, 3, 2, grad=True), rand(1, 2 * 9, 3, 2, grad=True), rand(2, 3, 3, grad=True)
    dynamic = functools.partial(dynamicconv2d, backend='eager')
    assert torch.autograd.gradcheck(lambda *tensors: dynamic(*tensors, (3, 3)), (x, logits))
    assert torch.autograd.gradgradcheck(lambda *tensors: dynamic(*tensors, (1, 3)), (x, logits[:, :6]), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, w: lightconv2d(x, w, backend='eager'), (x, weight))


def test_a_column_of_one_channel():
    """Strides of dimensions of size 1 do not determine the memory format."""
    x, logits = rand(1, 1, 70, 1, grad=True), rand(1, 9, 70, 1, grad=True)
    agree(lambda backend: dynamicconv2d(x, logits, (3, 3), backend=backend), [x, logits])


@pytest.mark.parametrize('size', [(3, 4), (9, 10)], ids=['small', 'large'])
def test_forward_mode_of_eager_dynamicconv(size):
    x, logits = rand(2, 4, *size), rand(2, 2 * 9, *size)
    tangents = rand(2, 4, *size), rand(2, 2 * 9, *size)
    found = {}
    for backend in ('naive', 'eager'):
        op = functools.partial(dynamicconv2d, kernel_size=(3, 3), backend=backend)
        slopes = torch.func.grad(lambda x, op=op: op(x, logits).pow(3).sum())
        found[backend] = (*torch.func.jvp(op, (x, logits), tangents), *torch.func.jvp(slopes, (x,), tangents[:1]))
    for ours, theirs in zip(found['eager'], found['naive'], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operator creates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_eager_never_gathers_the_windows():
    x, logits = rand(1, 64, 16, 16, grad=True), rand(1, 49, 16, 16, grad=True)
    padded = 64 * 22 * 22
    with Largest() as largest:
        dynamicconv2d(x, logits, (7, 7), backend='eager').sum().backward()
    assert largest.numel <= max(padded, 49 * 22 * 22) < x.numel() * 49 / 10
