"""The inference form in eager mode and under script, trace, compile, export, ONNX and autocast."""
import copy

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from coatnet_zoo.blocks.transformer import FixedBias, RelativeBias

IMAGES = torch.randn(2, 3, 32, 32)
BATCH = torch.export.Dim('batch', min=1, max=64)


def small(**kwargs) -> nn.Module:
    return timm.create_model(
        'coatnet_pico_64', num_classes=11, **{'img_size': 32, 'depths': (1, 2, 2, 1), **kwargs})


def slow_unless_cldt(names: list[str]) -> list:
    """Mark parameters slow unless they begin with CLDT, the layout that has every block type."""
    return [pytest.param(name, marks=[] if name.startswith('CLDT') else [pytest.mark.slow]) for name in names]


FORMS = [f'{layout}-{form}' for layout in ('CCTT', 'CLDT', 'LLDD') for form in ('eager', 'folded')]
slow_forms = pytest.mark.parametrize('form', slow_unless_cldt(FORMS), indirect=True)  # tests of several seconds


@pytest.fixture(params=FORMS)
def form(request, randomize):
    """A model, as it is or in inference form, and its logits."""
    layout, form = request.param.split('-')
    model = randomize(small(layout=layout, dropconnect=.1)).eval()
    with torch.no_grad():
        expected = model(IMAGES)
    assert expected.std() > .1
    return (reparameterize_model(model) if form == 'folded' else model), expected


@pytest.mark.parametrize('options', [
    {}, dict(flavor='timm'), dict(layout='CCCC'), dict(layout='TTTT'), dict(rel_bias='post'), dict(rel_bias='none'),
    dict(conv_norm='layer'), dict(pool='max', se_act='act', head_norm='none', inner_width='input'),
    dict(dynamic_img_size=True), dict(stem='vit', layout='CTTT')], ids=str)
def test_folding_keeps_the_logits_and_leaves_no_batchnorm(options, randomize):
    model = randomize(small(**options)).eval()
    folded = reparameterize_model(model)
    with torch.no_grad():
        expected = model(IMAGES)
        torch.testing.assert_close(folded(IMAGES), expected, rtol=0, atol=1e-4)
        again = reparameterize_model(folded)
        torch.testing.assert_close(again(IMAGES), folded(IMAGES), rtol=0, atol=0)
    assert [name for name, _ in again.named_modules()] == [name for name, _ in folded.named_modules()]
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool([m for m in folded.modules() if isinstance(m, RelativeBias)]) == bool(options.get('dynamic_img_size'))
    torch.testing.assert_close(model(IMAGES), expected)  # the original is untouched


class LowRank(nn.Module):
    """A layer with a low-rank update beside it, like LoRA of peft, whose weight and bias are those of the layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.update = nn.Sequential(nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.update(x)


def low_rank(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and '.' in name and 'logits' not in name:
            model.set_submodule(name, LowRank(layer))


def pruned(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(layer, 'weight', 0.3)


def parametrized(model: nn.Module) -> None:
    for layer in list(model.modules()):
        if type(layer) in (nn.Linear, nn.Conv2d):
            parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(1.2)


def hooked(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(lambda module, inputs, out: out.tanh())


def doubled(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.forward = lambda x, layer=layer: type(layer).forward(layer, x) + 1


@pytest.mark.parametrize('change', [low_rank, pruned, parametrized, hooked, doubled])
def test_changed_layers_are_not_folded_into(change, randomize):
    model = randomize(small(layout='CLDT')).double().eval()
    plain = model(IMAGES.double())
    change(model)
    model.double()
    with torch.no_grad():
        expected = model(IMAGES.double())
        assert (expected - plain).abs().max() > .01
        copied = copy.deepcopy(model) if change is not doubled else model  # a copy would call the original's layers
        folded = reparameterize_model(copied, inplace=change is doubled)
        torch.testing.assert_close(folded(IMAGES.double()), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(reparameterize_model(folded, inplace=True)(IMAGES.double()), expected, rtol=0,
                                   atol=1e-9)


def test_folded_coatnet_0_keeps_its_logits(randomize, skip_init):
    model = randomize(timm.create_model('coatnet_0')).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(images), model(images), rtol=0, atol=1e-4)


def test_folded_dynamic_model_still_takes_any_size(randomize):
    model = randomize(small(dynamic_img_size=True)).eval()
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(images), model(images), rtol=0, atol=1e-4)


def test_folded_word_without_attention_can_be_resized(randomize):
    folded = reparameterize_model(randomize(small(layout='CCCC')).eval())
    folded.set_input_size(48)
    assert folded.img_size == (48, 48) and folded.stem.check.img_size == (48, 48)


def test_nothing_goes_stale_in_training(randomize):
    """Train, change the image size, step, take an EMA copy, fold: the folded copy agrees with the trained model."""
    model = randomize(small()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.set_input_size(48)
    images = torch.randn(2, 3, 48, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = ModelEmaV3(model, decay=.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        ema.update(model)
    for trained in (model.eval(), ema.module.eval(), copy.deepcopy(model)):
        with torch.no_grad():
            torch.testing.assert_close(reparameterize_model(trained)(images), trained(images), rtol=0, atol=1e-4)


def test_inference_makes_no_layout_copies(randomize):
    """With channels_last input all feature maps are channels_last; none is cloned, converted or made contiguous."""
    model = reparameterize_model(randomize(small()).eval()).to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    seen = []
    for stage in (model.stem, *model.stages):
        stage.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        model(images)
    copies = [
        (event.name, event.input_shapes) for event in profile.events()
        if event.name in ('aten::clone', 'aten::contiguous', 'aten::_to_copy') and event.input_shapes[0]]
    assert copies == []
    assert any(event.name == 'aten::convolution' for event in profile.events())  # the profiler saw the model
    assert len(seen) == 5 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_layout_copy_count_can_fail(randomize):
    """A contiguous image is converted to channels_last, and the check of the test above detects that."""
    model = reparameterize_model(randomize(small()).eval())
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        model(IMAGES)
    assert [e for e in profile.events() if e.name == 'aten::clone' and e.input_shapes[0] == [2, 32, 32, 3]]


def test_torchscript(form):
    model, expected = form
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(IMAGES), expected, rtol=0, atol=1e-4)
    with pytest.raises(torch.jit.Error, match=r'must be (multiples of 16|at least 16)'):
        scripted(torch.randn(1, 3, 30, 32) if model.cfg.layout.endswith('T') else torch.randn(1, 3, 15, 32))


@pytest.mark.parametrize('folded', [
    pytest.param(False, marks=pytest.mark.slow, id='eager'), pytest.param(True, id='folded')])
def test_choices_of_kecam_leave_eager_mode_too(folded, randomize):
    model = randomize(small(pool='max', se_act='act', head_norm='none', inner_width='input', head_hidden_size=0)).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        model = reparameterize_model(model) if folded else model
        exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: BATCH},)).module()
        for form in (torch.jit.script(model), exported):
            torch.testing.assert_close(form(IMAGES), expected, rtol=0, atol=1e-4)


@slow_forms
def test_torch_compile_fullgraph(form):
    model, expected = form
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_torch_compile_fullgraph_trains():
    model = small(layout='CLDT', drop_path_rate=.1, dropconnect=.1).train()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(IMAGES).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_torch_compile_with_inductor(randomize):
    # 64 pixels: the kernels that torch 2.8 generates for the head's pooling of a 2x2 map corrupt the heap
    model = reparameterize_model(randomize(small(layout='CLDT', depths=(1, 1, 1, 1), img_size=64)).eval())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=0, atol=1e-4)


@slow_forms
def test_torch_export_with_dynamic_batch(form):
    model, expected = form
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: BATCH},)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(IMAGES), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(exported(IMAGES.repeat(3, 1, 1, 1))[2:4], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['CLDT-eager', 'CLDT-folded'], indirect=True)
def test_onnx_runtime_agrees(form, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime comes with the test extra')
    model, expected = form
    file = str(tmp_path / 'model.onnx')
    torch.onnx.export(
        model, (IMAGES,), file, dynamo=True, dynamic_shapes=({0: BATCH},), input_names=['images'],
        output_names=['logits'], verbose=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    logits = session.run(None, {'images': IMAGES.repeat(2, 1, 1, 1).numpy()})[0]
    np.testing.assert_allclose(logits[:2], expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_onnx_runtime_agrees_at_odd_sizes(tmp_path, randomize):
    """Pooling in ceil mode: ONNX Runtime 1.20 must not count positions outside of the map."""
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime comes with the test extra')
    model = randomize(small(layout='CCCC', depths=(1, 1, 1, 1))).eval()
    images = torch.randn(1, 3, 37, 43)
    file = str(tmp_path / 'odd.onnx')
    torch.onnx.export(model, (images,), file, dynamo=True, input_names=['images'], verbose=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    logits = session.run(None, {'images': images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_finite_and_close(form, dtype):
    model, expected = form
    with torch.no_grad(), torch.autocast('cpu', dtype):
        logits = model(IMAGES).float()
    assert logits.isfinite().all()
    assert (logits - expected).norm() / expected.norm() < (.05 if dtype == torch.bfloat16 else .01)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_trains_without_nan(dtype):
    model = small().train()
    with torch.autocast('cpu', dtype):
        loss = nn.functional.cross_entropy(model(IMAGES), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_folded_bias_is_laid_out_once(randomize):
    folded = reparameterize_model(randomize(small()).eval())
    biases = [m for m in folded.modules() if isinstance(m, FixedBias)]
    assert len(biases) == 3 and all(m(0, 0).data_ptr() == m.bias.data_ptr() for m in biases)
