"""Maps of coatnet_train/explain/maps.py against the model's own computation, and the choice of an explanation."""
import pytest
import timm
import torch
from torch import nn

from coatnet_train.explain import maps as explain
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.ops.dynamicconv2d.naive import dynamicconv2d_naive
from support.overlay_runs import Colours, zoo


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('rel_bias', ['pre', 'post', 'none'])
def test_recomputed_attention_gives_the_output_of_the_block(rel_bias, fused, randomize):
    model = randomize(zoo(rel_bias=rel_bias, layout='CTTT', head_dim=16))
    attention = explain.choose_target(model, '', 'attention', 2).module
    attention.fused_attn = fused
    outputs = []
    attention.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    images = torch.randn(2, 3, 32, 32)
    logits, x = explain.run_with_input(model, attention, images)
    weights = explain.attention_weights(attention, x)
    torch.testing.assert_close(logits, model(images).detach())
    assert not logits.requires_grad

    B, H, W, _ = x.shape
    assert weights.shape == (B, attention.num_heads, H * W, H * W) and H * W == 64 and attention.num_heads == 1
    v = attention.qkv(x)[..., -16:].reshape(B, 1, H * W, 16)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(B, H, W, 16))
    torch.testing.assert_close(expected, outputs[0], atol=1e-5, rtol=1e-4)
    if rel_bias != 'post':
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, 1, H * W))
    if rel_bias != 'none':  # the bias is included, which a bias of zeros would not show
        without = (attention.qkv(x)[..., :16].reshape(B, 1, -1, 16) @ attention.qkv(x)[..., 16:32].reshape(
            B, 1, -1, 16).transpose(-2, -1) / 4).softmax(-1)
        assert (weights - without).abs().max() > 0.01


def test_recomputed_attention_of_several_heads_follows_another_image_size(randomize):
    model = randomize(zoo(dynamic_img_size=True))
    target = explain.choose_target(model, '')
    assert (target.kind, target.stage) == ('attention', 4) and target.module is model.stages[3].blocks[-1].attn
    outputs = []
    target.module.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    _, x = explain.run_with_input(model, target.module, torch.randn(1, 3, 48, 64))
    weights = explain.attention_weights(target.module, x)
    assert weights.shape == (1, 2, 12, 12)
    v = target.module.qkv(x)[..., 128:].reshape(1, 12, 2, 32).transpose(1, 2)
    expected = target.module.proj((weights @ v).transpose(1, 2).reshape(1, 3, 4, 64))
    torch.testing.assert_close(expected, outputs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('normalize', ['softmax', 'none'])
def test_predicted_kernels_give_the_output_of_the_operator(normalize, randomize):
    model = randomize(zoo(layout='CCDD', normalize=normalize, kernel_size=(3, 3, 5, 3), conv_head_dim=16))
    target = explain.choose_target(model, '', 'auto', 3)
    outputs = []
    target.module.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    _, x = explain.run_with_input(model, target.module, torch.randn(2, 3, 32, 48))
    kernels = explain.dynamic_kernels(target.module, x)
    assert kernels.shape == (2, 2, 5, 5, *x.shape[2:]) and x.shape[2] != x.shape[3]
    expected = dynamicconv2d_naive(x, kernels.flatten(1, 3), (5, 5), None, 'none', 0., None)
    torch.testing.assert_close(expected, outputs[0], atol=1e-5, rtol=1e-4)
    if normalize == 'softmax':
        torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(2, 2, *x.shape[2:]))


def test_distance_and_padding_of_known_kernels():
    kernels = torch.zeros(1, 2, 3, 3, 4, 4)
    kernels[:, 0, 1, 1] = 1  # one head reads its own position, the other that 1 below and 1 to the right
    kernels[:, 1, 2, 2] = -0.5
    distance = explain.expected_distance(kernels, (3., 4.))
    torch.testing.assert_close(distance, torch.full((1, 4, 4), 2.5))  # half of hypot(3, 4)
    padding = torch.zeros(1, 4, 4)
    padding[:, -1] = padding[:, :, -1] = 0.5
    torch.testing.assert_close(explain.fraction_on_padding(kernels), padding)
    even = torch.full((1, 1, 3, 3, 1, 1), 1 / 9)
    assert explain.expected_distance(even, (1., 1.)).item() == pytest.approx((4 + 4 * 2 ** 0.5) / 9)
    assert explain.tap_distances((3, 3), (1., 1.)).mean().item() == pytest.approx((4 + 4 * 2 ** 0.5) / 9)
    assert explain.fraction_on_padding(even).item() == pytest.approx(8 / 9)


# Grad-CAM


def test_gradcam_lights_up_the_quadrant_that_decides():
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 16:, :16] = 1    # red at the lower left decides the first,
    images[0, 2, :16, 16:] = 0.5  # not the weaker blue at the upper right
    images[1, 1, :16, :16] = 1    # green at the upper left the second
    logits, maps = explain.gradcam(Colours(), images, 'colours')
    assert logits.argmax(1).tolist() == [0, 1] and maps.shape == (2, 4, 4)
    first, second = torch.zeros(2, 4, 4)
    first[2:, :2] = second[:2, :2] = 1
    torch.testing.assert_close(maps / maps.amax((1, 2), keepdim=True), torch.stack((first, second)))


@pytest.mark.parametrize('name', ['test_resnet', 'swin'])
def test_gradcam_is_the_class_activation_map_of_a_linear_head(name):
    """Selvaraju et al., section 3.1: with mean pooling and one linear layer, Grad-CAM is CAM (Zhou et al. 2016)."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet') if name != 'swin' else timm.models.SwinTransformer(
        img_size=(32, 48), patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=2, num_classes=7)
    model.eval()
    images = torch.randn(2, 3, 32, 48)
    logits, maps = explain.gradcam(model, images, name)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
        features = model.forward_features(images)
        features = features.permute(0, 3, 1, 2) if name == 'swin' else features  # NHWC
        weight = model.get_classifier().weight[logits.argmax(1)]
        cam = torch.einsum('bc,bchw->bhw', weight, features).relu() / features[0, 0].numel()
    assert cam.any() and cam.shape[1] < cam.shape[2]
    torch.testing.assert_close(maps, cam, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(('name', 'block'), [('test_vit', 4), ('test_vit2', None)])
def test_gradcam_of_tokens_takes_the_last_map_that_counts(name, block):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(32, 48), num_classes=5).eval()
    image = torch.randn(1, 3, 32, 48)
    logits, maps = explain.gradcam(model, image, name)
    torch.testing.assert_close(logits, model(image).detach())
    assert maps.shape == (1, 2, 3) and maps.max() > 0
    # by hand: if the head reads a class token alone, positions have a gradient only before the last block (5)
    kept = []
    module = model.norm if block is None else model.blocks[block]
    module.register_forward_hook(lambda *seen: kept.append(seen[-1]))
    model(image).max().backward(inputs=kept[0].retain_grad() or [kept[0]])
    values, slopes = kept[0].detach()[0, 1:], kept[0].grad[0, 1:]
    torch.testing.assert_close(maps[0].flatten(), (values * slopes.mean(0)).sum(1).relu())


def test_gradcam_of_every_letter_leaves_the_model_as_it_was(randomize):
    for layout in ('CCTT', 'LLDD'):
        model = randomize(zoo(layout=layout))
        image = torch.randn(1, 3, 32, 32)
        expected = model(image).detach()
        logits, maps = explain.gradcam(model, image, layout)
        torch.testing.assert_close(logits, expected)
        assert maps.shape == (1, 2, 2) and not maps.requires_grad and not image.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())


def test_gradcam_refuses_models_without_a_map():
    class Pyramid(Colours):
        def forward_features(self, x):
            return [x]

    class ClassToken(Colours):
        num_prefix_tokens = 1

        def forward_features(self, x):
            return nn.functional.avg_pool2d(x, 8).flatten(2).transpose(1, 2)[:, :10]

        def forward_head(self, x):
            return x[:, 0]

    class Uneven(ClassToken):
        num_prefix_tokens = 0

    for model, message in ((Pyramid(), 'needs one map'), (ClassToken(), 'depends on'), (Uneven(), 'form a grid')):
        with pytest.raises(ConfigError, match=f'{message}.*NAME has'):
            explain.gradcam(model, torch.rand(1, 3, 32, 32), 'NAME')


def test_gradcam_of_a_head_of_zeros_is_dark():
    model = timm.create_model('test_resnet', num_classes=3).eval()
    nn.init.zeros_(model.get_classifier().weight)
    _, maps = explain.gradcam(model, torch.randn(1, 3, 32, 64), '')
    assert maps.shape == (1, 1, 2) and not maps.any()


# What is chosen


@pytest.mark.parametrize(('layout', 'explained', 'stage', 'kind', 'found'), [
    ('CCTT', 'auto', None, 'attention', 4), ('CTTC', 'auto', None, 'attention', 3),
    ('LLDD', 'auto', None, 'kernels', 4),
    ('TDTD', 'auto', None, 'kernels', 4), ('TDTD', 'attention', None, 'attention', 3),
    ('TDTD', 'auto', 1, 'attention', 1),
    ('DDTT', 'kernels', None, 'kernels', 2), ('DDDD', 'kernels', 3, 'kernels', 3), ('CCLL', 'auto', None, 'gradcam', 0),
    ('CCTT', 'gradcam', None, 'gradcam', 0)])
def test_the_model_and_the_flags_choose_what_is_shown(layout, explained, stage, kind, found):
    target = explain.choose_target(zoo(layout=layout, head_dim=16), 'NAME', explained, stage)
    assert (target.kind, target.stage) == (kind, found)
    assert kind == 'gradcam' or layout[found - 1] == {'attention': 'T', 'kernels': 'D'}[kind]
