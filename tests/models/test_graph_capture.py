"""Graph capture by torch.fx, torch.jit.trace and the legacy ONNX exporter."""
import io

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor as timm_extractor
from timm.utils import AttentionExtract, reparameterize_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from coatnet_zoo.blocks.inference import inplace_mul
from support.closeness import assert_same_up_to_rounding

IMAGES = torch.randn(2, 3, 32, 32)


def small(**options) -> nn.Module:
    return timm.create_model(
        'coatnet_pico_64.untrained', **{'img_size': 32, 'num_classes': 5, 'depths': (1, 1, 2, 1), **options}).eval()


@pytest.mark.parametrize('options', [
    dict(layout='CCTT'), dict(layout='CCTT', rel_bias='post', dynamic_img_size=True), dict(layout='LLLL'),
    dict(layout='LLDD', static_branch=True), dict(layout='CCDD'), dict(layout='CCTT', stem='vit')], ids=str)
@pytest.mark.parametrize('folded', [False, True], ids=['eager', 'folded'])
def test_any_fx_tracer_gives_the_same_model(options, folded, randomize):
    model = randomize(small(dropconnect=.1, drop_path_rate=.1, **options))
    model = reparameterize_model(model) if folded else model
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = model(IMAGES)
            assert expected.std() > .1
            traced = torch.fx.symbolic_trace(model)
            assert torch.equal(traced(IMAGES), expected)
    with torch.no_grad():
        for create in (create_feature_extractor, timm_extractor):
            found = create(model, {'stages.1': 'level', 'head': 'logits'})(IMAGES)
            assert torch.equal(found['logits'], expected) and found['level'].shape[:2] == (2, 64)
    with pytest.raises(ValueError, match='images must have in_chans=3 channels, got 4'):
        traced(torch.randn(1, 4, 32, 32))


@pytest.fixture
def unfused_attention():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize('options', [{}, dict(rel_bias='post'), dict(dynamic_img_size=True)], ids=str)
def test_attention_without_a_fused_operator_is_traced(options, unfused_attention, randomize):
    model = randomize(small(layout='CCTT', **options))
    for copied in (model, model.double(), model.bfloat16()):
        images = IMAGES.to(next(copied.parameters()).dtype)
        expected = copied.forward_features(images)
        found = create_feature_extractor(copied, ['stages'])(images)['stages']
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('method', ['hook', 'fx'])
def test_timm_extracts_attention(method, unfused_attention, randomize):
    model = randomize(small(layout='CCTT'))
    found = AttentionExtract(model, method=method)(IMAGES)
    assert [tuple(weights.shape) for weights in found.values()] == [(2, 5, 16, 16)] * 2 + [(2, 10, 4, 4)]
    for weights in found.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.std() > 1e-3


def test_registered_names_trace_in_training_too():
    for name in ('coatnet_pico_64', 'lightconvnet_pico_64', 'dynamicconvnet_pico_64'):
        model = timm.create_model(f'{name}.untrained', img_size=32, dropconnect=.1)
        extractor = create_feature_extractor(model, ['stages.3', 'head.fc']).train()
        torch.manual_seed(0)
        found = extractor(IMAGES)['head.fc']
        torch.manual_seed(0)
        assert torch.equal(found, model.train()(IMAGES)), name
        found.sum().backward()


@pytest.mark.parametrize('layout', ['CCTT', 'LLDD'])
def test_folded_model_is_traced_with_and_without_gradients(layout, randomize):
    model = reparameterize_model(randomize(small(layout=layout)))
    traced = torch.jit.trace(model, IMAGES)  # repeats the run under no_grad as a check
    with torch.no_grad():
        assert_same_up_to_rounding(traced(IMAGES), model(IMAGES))
        assert_same_up_to_rounding(torch.jit.trace(model, IMAGES)(IMAGES), model(IMAGES))


def test_gate_is_in_place_unless_a_gradient_needs_its_input():
    x, gate = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 1, 1)
    expected = x * gate
    kept = inplace_mul(x.requires_grad_(), gate)
    assert kept.data_ptr() != x.data_ptr() and torch.equal(kept, expected)
    x = x.detach()
    assert inplace_mul(x, gate).data_ptr() == x.data_ptr() and torch.equal(x, expected)


@pytest.mark.parametrize('options', [dict(layout='CCTT'), dict(rel_bias='post'), dict(layout='LLDD')], ids=str)
@pytest.mark.filterwarnings('ignore')
def test_legacy_onnx_export_takes_any_number_of_images(options, randomize):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime comes with the test extra')
    model, file = randomize(small(**options)), io.BytesIO()
    torch.onnx.export(model, (IMAGES,), file, dynamo=False, input_names=['images'], dynamic_axes={'images': {0: 'n'}})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    images = torch.randn(3, 3, 32, 32)
    logits = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    with torch.no_grad():
        assert_same_up_to_rounding(logits, model(images))


@pytest.mark.filterwarnings('ignore')
def test_legacy_onnx_export_of_any_image_size_is_refused_with_the_way_out():
    for model in (small(dynamic_img_size=True), reparameterize_model(small(dynamic_img_size=True))):
        with pytest.raises(RuntimeError, match=r'dynamic_img_size=True.*Pass dynamo=True to torch\.onnx\.export'):
            torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False)
        assert torch.jit.trace(model, IMAGES)(IMAGES).shape == (2, 5)  # tracing alone is allowed
