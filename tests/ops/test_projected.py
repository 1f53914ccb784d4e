"""`dynamicconv2d_projected`: as two steps and as one kernel, the choice between them, and the block that uses it."""
from importlib import import_module

import pytest
import torch
from torch import nn

from coatnet_zoo.blocks import DynamicConv2d, DynamicConvBlock
from coatnet_zoo.blocks import dynamicconv as block_file
from coatnet_zoo.ops import dispatch, dynamicconv2d, dynamicconv2d_projected
from coatnet_zoo.ops.dynamicconv2d.projected import fuses_projection

API = import_module('coatnet_zoo.ops.dynamicconv2d.projected')  # attributes are the functions
X, PROJECTION = torch.randn(2, 6, 5, 4), torch.randn(3 * 15, 6)
EXACT = dict(rtol=0, atol=1e-12)


def projected(**changes) -> torch.Tensor:
    return dynamicconv2d_projected(**{'x': X, 'projection': PROJECTION, 'kernel_size': (3, 5), **changes})


@pytest.mark.parametrize('normalize', ['softmax', 'none'])
def test_it_is_a_projection_and_a_dynamicconv(normalize):
    x, projection, bias = (t.double().requires_grad_() for t in (X, PROJECTION, torch.randn(6)))
    options = dict(normalize=normalize, dropconnect=.3, training=True)
    seen = []
    for backend in ('naive', 'eager', None, 'two steps'):
        torch.manual_seed(1)
        if backend == 'two steps':
            logits = torch.einsum('bchw,nc->bnhw', x, projection)
            out = dynamicconv2d(x, logits, (3, 5), bias, backend='naive', **options)
        else:
            out = dynamicconv2d_projected(x, projection, (3, 5), bias, backend=backend, **options)
        seen.append([out, *torch.autograd.grad(out.sin().sum(), (x, projection, bias))])
    for tensors in seen[:-1]:
        for ours, expected in zip(tensors, seen[-1], strict=True):
            torch.testing.assert_close(ours, expected, **EXACT)


def test_the_reference_does_not_round_its_logits():
    x, projection = X.bfloat16(), PROJECTION.bfloat16()
    exact = projected(x=x.double(), projection=projection.double(), backend='naive')
    naive, eager = (projected(x=x, projection=projection, backend=name) for name in ('naive', 'eager'))
    assert naive.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(naive, exact.bfloat16(), rtol=2 ** -7, atol=1e-6)
    assert (eager.double() - exact).norm() > 1.5 * (naive.double() - exact).norm()


@pytest.mark.parametrize('changes,error,message', [
    (dict(projection=PROJECTION[:44]), ValueError, r'a multiple of 15 by 6, got \(44, 6\)'),
    (dict(projection=PROJECTION[:, :5]), ValueError, r'projection must be \(G \* Kh \* Kw, C\)'),
    (dict(projection=PROJECTION[:0]), ValueError, 'got 0 heads'),
    (dict(projection=PROJECTION[None]), ValueError, 'projection must be'),
    (dict(projection=torch.randn(60, 6)), ValueError, 'got 4 heads, 6 channels'),
    (dict(projection=PROJECTION.int()), TypeError, 'projection must be float16'),
    (dict(projection=PROJECTION.half()), TypeError, 'the dtype of x, got torch.float16 and torch.float32'),
    (dict(kernel_size=(2, 5)), ValueError, 'dynamicconv2d_projected: kernel sizes must be odd'),
    (dict(backend='fused'), ValueError, 'backend must be None or one of'),
    (dict(backend='triton'), ValueError, "needs CUDA tensors, got x on cpu; .*backend='eager'"),
])
def test_it_refuses_with_numbers(changes, error, message, monkeypatch):
    monkeypatch.setattr(API, 'TRITON', True)
    with pytest.raises(error, match=message):
        projected(**changes)


def test_a_machine_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, 'TRITON', False)
    with pytest.raises(RuntimeError, match="needs the triton package; install it or use backend='eager'"):
        projected(backend='triton')


def conv_and_input(**changes) -> tuple[DynamicConv2d, torch.Tensor]:
    return DynamicConv2d(32, 3, **changes), torch.randn(1, 32, 5, 5)


def test_the_block_keeps_its_two_steps_on_a_cpu():
    conv, x = conv_and_input()
    logits = conv.logits(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert not conv.fuses_projection(x) and torch.equal(conv(x), dynamicconv2d(x, logits, (3, 3)))
    assert list(conv.state_dict()) == ['logits.weight']
    graph = torch.fx.symbolic_trace(DynamicConvBlock(32, 32, kernel_size=3))
    names = [node.name for node in graph.graph.nodes]
    assert 'conv_logits' in names and 'dynamicconv2d' in names


def test_the_block_fuses_a_plain_layer_alone(monkeypatch):
    monkeypatch.setattr(block_file, 'fuses_projection', lambda x, weight, kernel: True)
    conv, x = conv_and_input()
    assert conv.fuses_projection(x)
    seen = []
    monkeypatch.setattr(block_file, 'dynamicconv2d_projected', lambda x, *_, **options: seen.append(options) or x)
    conv(x)
    assert seen == [dict(normalize='softmax', dropconnect=0., training=True, backend='triton')]
    handle = conv.logits.register_forward_hook(lambda *_: None)
    assert not conv.fuses_projection(x)
    handle.remove()
    assert conv.fuses_projection(x)
    conv.logits = nn.Linear(32, 9)
    assert not conv.fuses_projection(x)


# With Triton.

triton = pytest.importorskip('triton', reason='needs the triton package')

import interpreted_projection  # noqa: E402  imports triton, or what follows is skipped
from test_kernels import in_interpreter, needs_gpu  # noqa: E402  the same

from coatnet_zoo.ops.dynamicconv2d import projected_band  # noqa: E402  the same


def test_the_kernel_matches_the_reference_and_with_taps_in_the_next_slot_it_does_not():
    assert in_interpreter('tests/ops/interpreted_projection.py', 'cases') == 'out x projection\n'


@pytest.mark.slow
def test_the_kernel_matches_the_reference_on_larger_maps():
    assert in_interpreter('tests/ops/interpreted_projection.py', 'large') == ''


@pytest.mark.parametrize('changes,reason', [
    ({}, ''),
    (dict(dtype=torch.float32), 'float16 or bfloat16, got torch.float32'),
    (dict(C=160, G=5), 'up to 128 channels, got 160'),
    (dict(kernel=(9, 9)), 'up to 7 x 7, got 9 x 9'),
    (dict(C=96, G=1), 'heads of 16, 32, 64 channels, got 96'),
    (dict(H=8192, W=8192), 'below 2.31 elements'),
    (dict(layout=torch.contiguous_format), 'x must be dense in channels_last'),
])
def test_the_tensors_of_a_call_choose(changes, reason, monkeypatch):
    a = dict(C=64, G=2, H=8, W=8, kernel=(7, 7), dtype=torch.bfloat16, layout=torch.channels_last) | changes
    x = torch.empty(2, a['C'], a['H'], a['W'], dtype=a['dtype'], device='meta').contiguous(memory_format=a['layout'])
    projection = torch.empty(a['G'] * a['kernel'][0] * a['kernel'][1], a['C'], dtype=a['dtype'], device='meta')
    found = projected_band.obstacle(x, projection, a['kernel'], x.dtype)
    assert reason in found.replace('^', '.') if reason else found == ''
    assert not fuses_projection(x, projection, a['kernel'])  # not on CUDA


@pytest.mark.parametrize('capability,fuses', [((9, 0), True), ((7, 5), False)])
def test_cuda_tensors_fuse_in_eager_mode_and_compiled_but_not_exported(capability, fuses, monkeypatch):
    """The choice is checked on fake CUDA tensors, without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(2, 8, 8, 64, dtype=torch.bfloat16, device='cuda').permute(0, 3, 1, 2)
        projection = torch.empty(2 * 49, 64, dtype=torch.bfloat16, device='cuda')
        assert fuses_projection(x, projection, (7, 7)) == fuses
        assert not fuses_projection(x, projection.float(), (7, 7))
        monkeypatch.setattr(torch.compiler, 'is_exporting', lambda: True)
        assert not fuses_projection(x, projection, (7, 7))


@needs_gpu
@pytest.mark.parametrize('launch', interpreted_projection.LAUNCHES)
@pytest.mark.parametrize(
    'case', interpreted_projection.CASES + interpreted_projection.LARGE + interpreted_projection.GPU_CASES)
def test_on_a_gpu(case, launch):
    assert interpreted_projection.check(case, launch, 'cuda') == []


@needs_gpu
def test_rounding_on_a_gpu():
    interpreted_projection.check_rounding('cuda')
