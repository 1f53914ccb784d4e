"""The public functions: argument errors, choice of the backend, DropConnect, autograd, compile, export and autocast."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from coatnet_zoo.ops import dispatch, dynamicconv2d, lightconv2d
from coatnet_zoo.ops.dropconnect import draw_seed, dropconnect_scale

X = torch.randn(2, 6, 5, 4)
WEIGHT, LOGITS = torch.randn(3, 3, 5), torch.randn(2, 3 * 15, 5, 4)


def light(**changes) -> torch.Tensor:
    return lightconv2d(**{'x': X, 'weight': WEIGHT, **changes})


def dynamic(**changes) -> torch.Tensor:
    return dynamicconv2d(**{'x': X, 'logits': LOGITS, 'kernel_size': (3, 5), **changes})


@pytest.mark.parametrize('changes,error,message', [
    (dict(x=[1.]), TypeError, 'lightconv2d: x must be a tensor, got list'),
    (dict(x=X[0]), ValueError, r'x must be \(B, C, H, W\), got 3 dimensions \(6, 5, 4\)'),
    (dict(x=X.long()), TypeError, r'x must be float16, bfloat16, float32 or float64, got torch.int64; use .float'),
    (dict(weight=WEIGHT.int()), TypeError, 'weight must be float16, .* got torch.int32'),
    (dict(x=X.to(torch.float8_e4m3fn)), TypeError, 'x must be float16, .* got torch.float8_e4m3fn'),
    (dict(x=X.to_sparse()), TypeError, 'x must be a dense tensor, got layout torch.sparse_coo'),
    (dict(weight=WEIGHT.to('meta')), ValueError, 'weight is on meta but x is on cpu'),
    (dict(weight=WEIGHT[None]), ValueError, r'weight must be \(G, Kh, Kw\), got 4 dimensions'),
    (dict(weight=torch.randn(3, 4, 5)), ValueError, 'kernel sizes must be odd and positive, got 4 x 5'),
    (dict(weight=torch.randn(3, 3, 0)), ValueError, 'kernel sizes must be odd and positive, got 3 x 0'),
    (dict(weight=torch.randn(4, 3, 3)), ValueError, 'heads must divide the channels of x, got 4 heads, 6 channels'),
    (dict(weight=torch.randn(0, 3, 3)), ValueError, 'got 0 heads'),
    (dict(bias=torch.randn(3)), ValueError, r'bias must be \(6,\), one value a channel of x, got \(3,\)'),
    (dict(bias=torch.ones(6, dtype=torch.bool)), TypeError, 'bias must be float16'),
    (dict(dropconnect=1.), ValueError, 'dropconnect must be a probability from 0 to below 1, got 1.0'),
    (dict(dropconnect=-.1), ValueError, 'dropconnect must be a probability'),
    (dict(dropconnect='a'), ValueError, "dropconnect must be a probability from 0 to below 1, got 'a'"),
    (dict(training=1), TypeError, 'training must be True or False, got 1'),
    (dict(normalize='sigmoid'), ValueError, "normalize must be 'softmax' or 'none', got 'sigmoid'"),
    (dict(backend='cuda'), ValueError, "backend must be None or one of 'naive', 'eager', 'triton', got 'cuda'"),
    (dict(backend='triton'), ValueError, r"needs CUDA tensors, got x on cpu; .*backend='eager'.*TRITON_INTERPRET=1"),
])
def test_lightconv_refuses_with_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        light(**changes)


@pytest.mark.parametrize('changes,error,message', [
    (dict(logits=LOGITS[:, :44]), ValueError, r'a multiple of 3 \* 5 = 15, got 44'),
    (dict(logits=LOGITS[:, :0]), ValueError, 'a multiple of .* got 0'),
    (dict(logits=torch.randn(2, 60, 5, 4)), ValueError, 'got 4 heads, 6 channels'),
    (dict(logits=LOGITS[:1]), ValueError, r'with the B, H, W of x \(2, 5, 4\), got \(1, 45, 5, 4\)'),
    (dict(logits=LOGITS[:, :, :4]), ValueError, r'logits must be .* got \(2, 45, 4, 4\)'),
    (dict(logits=LOGITS[0]), ValueError, 'logits must be'),
    (dict(logits=LOGITS.bool()), TypeError, 'logits must be float16, .* got torch.bool'),
    (dict(logits=LOGITS.to('meta')), ValueError, 'logits is on meta but x is on cpu'),
    (dict(kernel_size=3), TypeError, r'kernel_size must be two integers \(Kh, Kw\), got 3'),
    (dict(kernel_size=(3., 5.)), TypeError, 'kernel_size must be two integers'),
    (dict(kernel_size='35'), TypeError, "kernel_size must be two integers .* got '35'"),
    (dict(kernel_size=(3, 5, 1)), TypeError, 'kernel_size must be two integers'),
    (dict(kernel_size=(2, 5)), ValueError, 'kernel sizes must be odd and positive, got 2 x 5'),
    (dict(kernel_size=(-3, 5)), ValueError, 'kernel sizes must be odd and positive, got -3 x 5'),
    (dict(x=X.long()), TypeError, 'dynamicconv2d: x must be float16'),
    (dict(normalize=None), ValueError, "normalize must be 'softmax' or 'none', got None"),
    (dict(backend='triton'), ValueError, 'needs CUDA tensors, got x on cpu'),
])
def test_dynamicconv_refuses_with_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        dynamic(**changes)


@pytest.mark.parametrize('changes,message', [
    (dict(x=X.double()), 'takes float16, bfloat16 or float32 .* got torch.float64'),
    (dict(weight=torch.randn(3, 33, 1)), 'kernels up to 31 x 31, got .* 33 x 1'),
])
def test_kernels_refuse_what_they_do_not_cover(changes, message, monkeypatch):
    monkeypatch.setattr(dispatch, 'INTERPRETED', True)
    monkeypatch.setattr(dispatch, 'TRITON', True)
    with pytest.raises(ValueError, match=message):
        light(backend='triton', **changes)


def test_a_machine_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, 'TRITON', False)
    with pytest.raises(RuntimeError, match="needs the triton package; install it or use backend='eager'"):
        light(backend='triton')
    torch.testing.assert_close(light(), light(backend='eager'), rtol=0, atol=0)


class OnCuda:
    """Stand-in for a CUDA tensor, with the attributes that the choice of a backend reads."""

    is_cuda, device = True, torch.device('cuda')

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype


@pytest.mark.parametrize('dtype,kernel,expected', [
    (torch.bfloat16, (7, 7), 'triton'), (torch.float32, (13, 1), 'triton'), (torch.float64, (7, 7), 'eager'),
    (torch.float16, (15, 1), 'eager')])
def test_the_tensors_of_a_call_choose(dtype, kernel, expected, monkeypatch):
    monkeypatch.setattr(dispatch, 'TRITON', True)
    chosen = dispatch.choose_backend(None, OnCuda(dtype), OnCuda(), kernel, 13, 'op')
    assert chosen == expected
    assert dispatch.choose_backend(None, X, WEIGHT, kernel, 13, 'op') == 'eager'
    assert dispatch.choose_backend('naive', OnCuda(), OnCuda(), kernel, 13, 'op') == 'naive'
    monkeypatch.setattr(torch.compiler, 'is_exporting', lambda: True)
    assert dispatch.choose_backend(None, OnCuda(), OnCuda(), (3, 3), 13, 'op') == 'eager'


# DropConnect

def test_dropconnect_acts_in_training_alone_and_follows_the_seed():
    for op in (light, dynamic):
        torch.testing.assert_close(op(dropconnect=.5), op(), rtol=0, atol=0)
        outs = []
        for backend in ('naive', 'eager'):
            torch.manual_seed(3)
            outs.append(op(dropconnect=.5, training=True, backend=backend))
            assert not torch.allclose(outs[-1], op())
        torch.testing.assert_close(outs[0], outs[1])
        torch.manual_seed(4)
        assert not torch.allclose(op(dropconnect=.5, training=True), outs[0])


def test_dropconnect_keeps_its_rate_and_does_not_normalise_again():
    """Kept weights are divided by 1 - p and not normalised again: a kernel sums to (kept weight) / (1 - p)."""
    ones = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    torch.manual_seed(0)
    sums = dynamicconv2d(ones, torch.zeros(1, 49, 32, 32, dtype=torch.float64), (7, 7), dropconnect=.25, training=True)
    inner = sums[0, 0, 3:-3, 3:-3] * 49 * .75  # the number of weights kept at a position
    torch.testing.assert_close(inner, inner.round())
    assert inner.mean().item() == pytest.approx(49 * .75, rel=.01)
    assert inner.var().item() == pytest.approx(49 * .75 * .25, rel=.2)  # independent draws
    light_sums = lightconv2d(ones, torch.zeros(1, 7, 7, dtype=torch.float64), dropconnect=.25, training=True)
    assert light_sums[0, 0, 3:-3, 3:-3].unique().numel() == 1  # one mask for each call


def test_mask_is_frozen():
    """The hash must not change: every backend and version draws this mask for this seed."""
    scale = dropconnect_scale(torch.tensor([0x123456789abcdef]), 64, .5, torch.float64)
    bits = ''.join('01'[int(kept > 0)] for kept in scale)
    assert scale.unique().tolist() == [0, 2] and bits == FROZEN


FROZEN = '1010100001110001100110010010101010010110111111000000001101111000'


def test_mask_spreads_over_indices_and_seeds():
    masks = torch.stack([dropconnect_scale(draw_seed(torch.device('cpu')), 4096, .5, torch.float64) for _ in range(64)])
    kept = masks - 1  # -1 and 1
    assert abs(kept.mean()) < 5 / (64 * 4096) ** .5
    assert (kept.mean(0).abs() < 6 / 8).all() and (kept.mean(1).abs() < 6 / 64).all()
    for lag in (1, 2, 7, 49, 64):
        assert abs((kept[:, lag:] * kept[:, :-lag]).mean()) < 5 / (64 * 4096) ** .5
    assert abs((kept[1:] * kept[:-1]).mean()) < 5 / (64 * 4096) ** .5


def test_checkpointing_replays_the_mask():
    x = X.clone().requires_grad_()
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(0)
        out = wrap(lambda x: dynamic(x=x, dropconnect=.4, training=True).square(), x)
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# torch's machinery

def call_light(x, weight, logits):
    return lightconv2d(x, weight, dropconnect=.2, training=True)


def call_dynamic(x, weight, logits):
    return dynamicconv2d(x, logits, (3, 5), dropconnect=.2, training=True)


@pytest.mark.parametrize('call', [call_light, call_dynamic])
def test_compiles_without_a_break(call):
    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    tensors = [t.clone().requires_grad_() for t in (X, WEIGHT, LOGITS)]
    grads = []
    for run in (call, compiled):
        torch.manual_seed(0)
        out = run(*tensors)
        grads.append((out, *torch.autograd.grad(out.square().sum(), tensors, allow_unused=True)))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_inductor_fuses_the_sum_into_one_loop():
    """Inductor fuses the multiply-adds of all taps into one kernel and stores no tap."""
    from torch._inductor.utils import run_and_get_code

    x, logits = torch.randn(1, 32, 12, 12), torch.randn(1, 49, 12, 12)
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(
            torch.compile(lambda x, logits: dynamicconv2d(x, logits, (7, 7)), fullgraph=True), x, logits)
    torch.testing.assert_close(out, dynamicconv2d(x, logits, (7, 7), backend='naive'))
    assert code.count('async_compile.cpp_pybinding') <= 2
    buffers = [line for line in code.splitlines() if 'empty_strided_cpu(' in line and '=' in line]
    assert len(buffers) <= 7, buffers  # padded input, logits, kernels, their largest and total, the sum


@pytest.mark.parametrize('call', [call_light, call_dynamic])
def test_exports_to_plain_torch(call):
    class Model(torch.nn.Module):
        def forward(self, x, weight, logits):
            return (lightconv2d(x, weight) if call is call_light else dynamicconv2d(x, logits, (3, 5))).relu()

    program = torch.export.export(Model(), (X, WEIGHT, LOGITS))
    torch.testing.assert_close(program.module()(X, WEIGHT, LOGITS), Model()(X, WEIGHT, LOGITS))
    assert not [n for n in program.graph.nodes if 'coatnet_zoo' in str(n.target)]


def test_vmap_and_meta_tensors():
    stacked = torch.stack([X, X + 1])
    for run in (lambda x: light(x=x), lambda x: dynamic(x=x)):
        torch.testing.assert_close(torch.vmap(run)(stacked), torch.stack([run(x) for x in stacked]))
    assert lightconv2d(X.to('meta'), WEIGHT.to('meta')).shape == X.shape
    assert dynamicconv2d(X.to('meta'), LOGITS.to('meta'), (3, 5)).shape == X.shape


class Convolutions(TorchDispatchMode):
    """Records the dtypes of every convolution."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'convolution' in str(func):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('channels,dtype,kernel,learns,computed', [
    (8, torch.bfloat16, 15, False, torch.float32), (8, torch.bfloat16, 13, False, torch.bfloat16),
    (32, torch.bfloat16, 15, False, torch.bfloat16), (32, torch.float16, 3, False, torch.float32),
    (8, torch.float32, 15, False, torch.float32), (32, torch.bfloat16, 5, True, torch.float32),
    (32, torch.bfloat16, 3, True, torch.bfloat16)])
def test_convolutions_that_cpus_do_not_do_well_are_widened(channels, dtype, kernel, learns, computed):
    x, weight = torch.randn(1, channels, 7, 9), torch.randn(1, kernel, kernel, requires_grad=learns)
    for autocast in (False, True) if dtype != torch.float32 else (False,):
        with Convolutions() as seen, torch.autocast('cpu', dtype, enabled=autocast):
            out = lightconv2d(x if autocast else x.to(dtype), weight, backend='eager')
        assert seen.dtypes == [computed] and out.dtype == dtype
    if learns:
        with Convolutions() as seen, torch.no_grad():
            lightconv2d(x.to(dtype), weight, backend='eager')
        assert seen.dtypes == [dtype]


def pads_no_channels() -> bool:
    try:
        return torch.nn.functional.pad(torch.empty(1, 1, 1, 1, 0), [0, 0, 0, 0, 1, 1]).shape[2] == 3
    except RuntimeError:
        return False


@pytest.mark.parametrize('shape', [
    (2, 6, 0, 4), (2, 6, 5, 0), (0, 6, 5, 4),
    pytest.param((2, 0, 5, 4), marks=pytest.mark.skipif(not pads_no_channels(), reason='torch pads no empty map'))])
def test_empty_maps_give_empty_maps(shape):
    x = torch.randn(shape, requires_grad=True)
    for out in (lightconv2d(x, WEIGHT), dynamicconv2d(x, torch.randn(shape[0], 45, *shape[2:]), (3, 5))):
        assert out.shape == shape
        out.sum().backward()


def test_mixed_dtypes_are_computed_in_the_wider_one():
    for x, weight, logits in ((X.double(), WEIGHT, LOGITS), (X, WEIGHT.double(), LOGITS.double())):
        for op in (lambda backend, x=x, w=weight: lightconv2d(x, w, backend=backend),
                   lambda backend, x=x, w=logits: dynamicconv2d(x, w, (3, 5), backend=backend)):
            exact = op('naive')
            assert exact.dtype == x.dtype
            torch.testing.assert_close(op('eager'), exact, rtol=0, atol=1e-12 if x.dtype == torch.float64 else 1e-6)


def test_autocast_takes_x_as_a_convolution_would():
    for op in (light, dynamic):
        for backend in ('naive', 'eager'):
            with torch.autocast('cpu', torch.bfloat16):
                out = op(backend=backend)
                assert op(x=X.double(), backend=backend).dtype == torch.float64
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), op(), rtol=.02, atol=.02)
        assert op().dtype == torch.float32
