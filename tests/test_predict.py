"""scripts/predict.py: what it says of pictures, and that its overlays show what the model really used."""
import dataclasses
import inspect
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import explain
import matplotlib.image
import numpy as np
import overlay
import predict
import pytest
import timm
import torch
import tyro
from PIL import Image
from run_folder import write_config
from safetensors.torch import save_file
from settings import SettingsError
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from coatnet_zoo.ops.dynamicconv2d.naive import naive

ROOT = Path(__file__).parents[1]
SMALL = dict(img_size=32, depths=(1, 1, 1, 1), embed_dim=(16, 16, 32, 64), num_classes=4)
SMALL_FLAGS = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,64)')
NAMES = ['n01440764', 'my own class', 'n02102040', 'n03888257']


def write_picture(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """Write a noisy picture of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    return write_picture(tmp_path / 'pictures' / 'kite.png')


@pytest.fixture
def settings(picture, tmp_path) -> predict.Settings:
    return predict.Settings(
        images=(picture,), model='coatnet_pico_64', img_size=32, num_classes=4, model_kwargs=SMALL_FLAGS,
        device='cpu', output=tmp_path / 'overlays')


def zoo(name: str = 'coatnet_pico_64', **options) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options}).eval()


def shown_panels(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What is drawn from now on: the arguments of every panel, each with its function under 'draw'."""
    drawn = []

    def spy(draw, axes, *args, **kwargs):
        drawn.append({'draw': draw.__name__, **inspect.signature(draw).bind(axes, *args, **kwargs).arguments})
        return draw(axes, *args, **kwargs)

    for name in ('draw_picture', 'draw_heat', 'draw_kernel', 'draw_kernels', 'draw_guesses'):
        monkeypatch.setattr(predict, name, partial(spy, getattr(overlay, name)))
    return drawn


def write_run(folder: Path, model: nn.Module, names: list[str]) -> str:
    """A run folder as finetune.py leaves it."""
    folder.mkdir()
    write_config(folder / 'config.json', model, names, resolve_input_data_config(model, {}, use_test_size=True))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / 'model.safetensors')
    return f'local-dir:{folder}'


# What is shown is what the block used


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
    if rel_bias != 'none':  # and the bias is in it, which zeros would not show
        without = (attention.qkv(x)[..., :16].reshape(B, 1, -1, 16) @ attention.qkv(x)[..., 16:32].reshape(
            B, 1, -1, 16).transpose(-2, -1) / 4).softmax(-1)
        assert (weights - without).abs().max() > 0.01


def test_recomputed_attention_of_several_heads_follows_another_picture_size(randomize):
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
    expected = naive(x, kernels.flatten(1, 3), (5, 5), None, 'none', 0., None)
    torch.testing.assert_close(expected, outputs[0], atol=1e-5, rtol=1e-4)
    if normalize == 'softmax':
        torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(2, 2, *x.shape[2:]))


def test_distance_and_padding_of_known_kernels():
    kernels = torch.zeros(1, 2, 3, 3, 4, 4)
    kernels[:, 0, 1, 1] = 1  # one head looks at its own place, the other 1 down and 1 to the right
    kernels[:, 1, 2, 2] = -0.5
    distance = explain.expected_distance(kernels, (3., 4.))
    torch.testing.assert_close(distance, torch.full((1, 4, 4), 2.5))  # half of hypot(3, 4)
    padding = torch.zeros(1, 4, 4)
    padding[:, -1] = padding[:, :, -1] = 0.5
    torch.testing.assert_close(explain.share_on_padding(kernels), padding)
    even = torch.full((1, 1, 3, 3, 1, 1), 1 / 9)
    assert explain.expected_distance(even, (1., 1.)).item() == pytest.approx((4 + 4 * 2 ** 0.5) / 9)
    assert explain.tap_distances((3, 3), (1., 1.)).mean().item() == pytest.approx((4 + 4 * 2 ** 0.5) / 9)
    assert explain.share_on_padding(even).item() == pytest.approx(8 / 9)


# Grad-CAM


class Colours(nn.Module):
    """Says which of red, green and blue there is most of; its map is the mean colour of 8 x 8 pixels."""

    num_features, num_classes, pretrained_cfg, cfg = 3, 3, {'label_names': ['red', 'green', 'blue']}, None

    def forward_features(self, x):
        return nn.functional.avg_pool2d(x.relu(), 8)

    def forward_head(self, x):
        return x.mean((2, 3)) @ (3 * torch.eye(3) - 1)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


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
    # by hand: from a class token alone the gradient reaches no position after the last block (5), only before it
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
        with pytest.raises(SettingsError, match=f'{message}.*NAME has'):
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


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(images=()), 'IMAGES must name at least one picture'),
    (dict(explain='saliency'), "--explain must be auto, attention, kernels, gradcam, got 'saliency'"),
    (dict(explain='kernels'), '--explain kernels needs a stage of letter D, but coatnet_pico_64 has the stages CCTT'),
    (dict(stage=2), '--explain auto needs --stage 2 to be one of letter T or D, but .* the stages CCTT'),
    (dict(stage=5), '--stage must be from 1 to 4, got 5'),
    (dict(explain='gradcam', stage=4), '--stage chooses a stage .* Grad-CAM is shown'),
    (dict(explain='gradcam', at=(0.5, 0.5)), '--at chooses a query or a kernel'),
    (dict(at=(0.5, 1.5)), r'--at must be two shares of the picture from 0 to 1.*got \(0.5, 1.5\)'),
    (dict(model='test_vit', model_kwargs=(), explain='attention'), 'test_vit is not a model of this zoo'),
    (dict(model='coatnet_pico_65'), 'did you mean coatnet_pico_64'),
    (dict(num_classes=0), 'has no classes to predict'),
    (dict(device='tpu'), '--device must be auto, cpu or cuda'),
    (dict(checkpoint='nowhere.pth'), '--checkpoint nowhere.pth is not a file'),
    (dict(images=(Path('nowhere.png'),)), 'IMAGES must name at least one picture that can be read'),
])
def test_refusals_name_the_option_and_the_way_out(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        predict.main(dataclasses.replace(settings, **changes))
    assert not list(settings.output.glob('*'))


def test_output_that_cannot_be_written_is_refused(settings, picture):
    with pytest.raises(SettingsError, match=r'--output .* cannot be written'):
        predict.main(dataclasses.replace(settings, output=picture / 'overlays'))
    (settings.output / 'kite-attention.png').mkdir(parents=True)
    with pytest.raises(SettingsError, match=r'--output: .*kite-attention.png cannot be written'):
        predict.main(settings)


# What is printed and drawn


def test_predictions_of_a_run_folder_are_those_of_the_model(
        settings, picture, tmp_path, capsys, randomize, monkeypatch):
    model = randomize(zoo())
    name = write_run(tmp_path / 'run', model, NAMES)
    drawn = shown_panels(monkeypatch)
    own = dataclasses.replace(settings, model=name, model_kwargs=(), num_classes=None, img_size=None)
    assert predict.main(own) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{name}: its own weights; overlays: attention of stage 4 (T)'
    assert lines[1] == f'{picture} -> {settings.output}/kite-attention.png'

    transform = create_transform(**resolve_input_data_config(model, {}, use_test_size=True))
    image = transform(Image.open(picture).convert('RGB'))
    with torch.no_grad():
        shares, best = model(image[None])[0].softmax(-1).sort(descending=True)
    words = {'n01440764': 'n01440764  tench, Tinca tinca', 'my own class': 'my own class',
             'n02102040': 'n02102040  English springer, English springer spaniel',
             'n03888257': 'n03888257  parachute, chute'}
    assert [line.split(' %  ') for line in lines[2:]] == [
        [f'  {rank}  {100 * share:5.1f}', words[NAMES[index]]]
        for rank, (share, index) in enumerate(zip(shares.tolist(), best.tolist(), strict=True), 1)]
    assert [panel['draw'] for panel in drawn] == ['draw_picture', 'draw_heat', 'draw_guesses']
    assert drawn[2]['shares'] == pytest.approx(shares.tolist())
    assert drawn[2]['labels'] == [words[NAMES[index]].split('  ')[-1].split(',')[0] for index in best]
    # the picture is the crop that the model was given
    config = resolve_input_data_config(model, {}, use_test_size=True)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    crop = (image * std + mean).clamp(0, 1)
    np.testing.assert_allclose(drawn[0]['picture'], crop.permute(1, 2, 0), atol=1e-6)
    with pytest.raises(SettingsError, match='--num-classes must be that of the weights, 4, got 5'):
        predict.main(dataclasses.replace(own, num_classes=5))


def test_checkpoint_is_loaded_and_random_weights_are_called_random(settings, tmp_path, capsys, randomize):
    assert predict.main(settings) == 0
    assert 'RANDOM WEIGHTS' in capsys.readouterr().out
    model = randomize(zoo())
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    outputs = []
    for checkpoint in (str(tmp_path / 'weights.pth'), str(tmp_path / 'weights.pth')):
        assert predict.main(dataclasses.replace(settings, checkpoint=checkpoint)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and 'RANDOM' not in outputs[0] and 'class 3' in outputs[0]
    assert f'weights of {tmp_path}/weights.pth' in outputs[0]


def test_imagenet_labels_of_a_model_without_names_and_descriptions_of_its_own():
    model = timm.create_model('test_resnet')
    labels = predict.read_labels(model)
    assert len(labels) == 1000 and labels[0].short == 'tench' and labels[0].name == 'n01440764'
    model = timm.create_model('test_resnet', num_classes=2)
    model.pretrained_cfg = {'label_names': ['a', 'b'], 'label_descriptions': {'b': 'the second, of two'}}
    assert [str(label) for label in predict.read_labels(model)] == ['a', 'b  the second, of two']
    model.pretrained_cfg = {'label_names': ['only one']}
    assert [str(label) for label in predict.read_labels(model)] == ['class 0', 'class 1']


def test_attention_map_is_that_received_and_at_chooses_the_query(settings, randomize, tmp_path, monkeypatch):
    torch.save(randomize(zoo()).state_dict(), tmp_path / 'weights.pth')
    settings = dataclasses.replace(settings, checkpoint=str(tmp_path / 'weights.pth'), stage=3)
    drawn, seen = shown_panels(monkeypatch), []
    weights = explain.attention_weights
    monkeypatch.setattr(predict, 'attention_weights', lambda *args: seen.append(weights(*args)) or seen[-1])
    predict.main(settings)
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heat')
    received = seen[0][0].mean(0).sum(0)  # summed over the queries: 1 is even, as each of them shares out 1
    np.testing.assert_allclose(heat['heat'], received.view(4, 4), rtol=1e-5)
    assert heat['heat'].mean() == pytest.approx(1) and heat['least'] == 0 and heat['frame'] is None

    drawn.clear()
    predict.main(dataclasses.replace(settings, at=(0.99, 0.3)))
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heat')
    assert heat['frame'] == (1, 3)
    np.testing.assert_allclose(heat['heat'], 16 * seen[1][0].mean(0)[1 * 4 + 3].view(4, 4), rtol=1e-5)
    assert predict.position_of((1., 1.), (8, 8)) == (7, 7) and predict.position_of((0., 0.), (8, 8)) == (0, 0)


def test_kernels_are_drawn_at_positions_or_one_at_its_place(settings, randomize, tmp_path, monkeypatch):
    settings = dataclasses.replace(
        settings, model='dynamicconvnet_pico_64', model_kwargs=(*SMALL_FLAGS, 'kernel_size=(5,5,5,5)'), stage=3)
    drawn = shown_panels(monkeypatch)
    assert predict.main(settings) == 0
    kernels, heat = drawn[1:3]
    assert (kernels['draw'], heat['draw']) == ('draw_kernels', 'draw_heat')
    assert kernels['kernels'].shape == (5, 5, 4, 4)
    np.testing.assert_allclose(kernels['kernels'].sum((0, 1)), 1, rtol=1e-5)
    assert heat['heat'].shape == (4, 4) and heat['most'] == pytest.approx(2 * 8 * 2 ** 0.5)

    drawn.clear()
    predict.main(dataclasses.replace(settings, at=(0.05, 0.05)))
    kernel, heat = drawn[1:3]
    assert kernel['draw'] == 'draw_kernel' and kernel['kernel'].shape == (5, 5)
    assert kernel['position'] == heat['frame'] == (0, 0)
    assert {path.name for path in settings.output.iterdir()} == {'kite-kernels.png'}


def test_a_kernel_lies_on_what_its_taps_see(monkeypatch):
    shown = []
    monkeypatch.setattr(overlay, 'draw_heat', lambda axes, picture, heat, *args, **kwargs: shown.append((heat, kwargs)))
    kernel = np.arange(9.).reshape(3, 3)
    overlay.draw_kernel(None, np.zeros((8, 8, 3)), kernel, (0, 1), (2, 2), '', '')
    np.testing.assert_array_equal(shown[0][0], [[3, 4], [6, 7]])  # the upper row and the right column see the padding
    assert shown[0][1]['most'] == 8 and shown[0][1]['frame'] == (0, 1)


def test_maps_and_kernels_lie_upright_on_the_picture():
    _, row = overlay.panels('headline', 2, 0.5)
    overlay.draw_heat(row[0], np.zeros((8, 16, 3)), np.eye(2, 4), 'title', 'subtitle', 'unit', frame=(1, 2))
    overlay.draw_kernels(row[1], np.zeros((8, 16, 3)), np.eye(3)[..., None, None], 'title', 'subtitle')
    for axes in row[:2]:
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 16), (8, 0))  # row 0 at the top
    assert [image.get_extent() for image in row[0].images] == [[0, 16, 8, 0]] * 2
    assert row[0].patches[0].get_bbox().bounds == (8, 4, 4, 4)  # (left, top, width, height)
    assert row[1].images[1].get_extent() == pytest.approx([4.8, 11.2, 7.2, 0.8])
    assert {image.origin for axes in row[:2] for image in axes.images} == {'upper'}


def test_overlay_of_a_constructed_model_shows_the_deciding_quadrant(tmp_path, monkeypatch, capsys):
    """From the picture to the pixels of the PNG."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[32:, :32, 0] = 255
    Image.fromarray(pixels).save(tmp_path / 'red.png')
    config = dict(input_size=(3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1, interpolation='bilinear')
    monkeypatch.setattr(predict, 'open_model', lambda *args, **kwargs: (Colours(), config))
    settings = predict.Settings(images=(tmp_path / 'red.png',), model='colours', device='cpu', output=tmp_path / 'out')
    drawn = shown_panels(monkeypatch)
    assert predict.main(settings) == 0
    assert '  1   ' in (out := capsys.readouterr().out) and out.splitlines()[2].endswith('red')
    assert 'Grad-CAM of red' in [panel.get('title') for panel in drawn]

    image = matplotlib.image.imread(tmp_path / 'out' / 'red-gradcam.png')[..., :3]
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heat')['heat']
    assert heat.shape == (8, 8) and heat[4:, :4].min() == 1 and heat[:4].max() == heat[:, 4:].max() == 0
    # the second panel: bright where the colour of the highest value is, at its lower left alone
    bright = (image.min(-1) > 0.4) & (np.ptp(image, axis=-1) > 0.1)
    rows, columns = np.nonzero(bright[:, image.shape[1] // 3:int(image.shape[1] * 0.6)])
    assert len(rows) > 10_000
    assert rows.min() > image.shape[0] * 0.45 and columns.max() < image.shape[1] * 0.22


@pytest.mark.parametrize(('in_chans', 'shape'), [(3, (32, 32, 3)), (1, (32, 32))])
def test_grey_and_colour_models_of_timm_and_titles_with_dollars(settings, in_chans, shape, monkeypatch):
    path = write_picture(settings.images[0].parent / 'a $x_{$ b.jpeg')
    drawn = shown_panels(monkeypatch)
    grey = dict(mean=(0.5,), std=(0.25,)) if in_chans == 1 else {}
    assert predict.main(dataclasses.replace(
        settings, images=(path,), model='test_resnet', model_kwargs=(), in_chans=in_chans, **grey)) == 0
    assert drawn[0]['picture'].shape == shape
    with Image.open(settings.output / 'a $x_{$ b-gradcam.png') as image:
        image.load()
        assert image.width > image.height > 300


def test_picture_settings_reach_the_model(settings, picture, monkeypatch):
    drawn = shown_panels(monkeypatch)
    flags = dict(crop_pct=0.5, interpolation='nearest', crop_mode='squash', mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    predict.main(dataclasses.replace(settings, **flags))
    flags |= dict(mean=None, std=None, normalize=False)
    transform = create_transform((3, 32, 32), **flags)
    expected = transform(Image.open(picture).convert('RGB')).permute(1, 2, 0) / 255
    np.testing.assert_allclose(drawn[0]['picture'], expected, atol=1e-6)


def test_orientation_tags_are_left_alone_as_in_evaluation(settings, monkeypatch):
    path = settings.images[0].parent / 'turned.png'
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.open(settings.images[0]).save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    drawn = shown_panels(monkeypatch)
    predict.main(dataclasses.replace(settings, images=(settings.images[0], path)))
    pictures = [panel['picture'] for panel in drawn if panel['draw'] == 'draw_picture']
    np.testing.assert_array_equal(*pictures)


# Files


def test_folders_are_searched_and_bad_pictures_named_while_others_go_on(settings, picture, tmp_path, capsys):
    folder = picture.parent
    write_picture(folder / 'deeper' / 'KITE.JPG', seed=1)
    write_picture(folder / 'deeper' / 'kite.png', seed=2)
    (folder / 'deeper' / 'notes.txt').write_text('no picture')
    (folder / 'empty.png').write_bytes(b'')
    whole = write_picture(folder / 'cut.jpg', size=(200, 200)).read_bytes()
    (folder / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'bare').mkdir()
    images = (folder, picture, tmp_path / 'missing.jpg', tmp_path / 'bare')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert predict.main(dataclasses.replace(settings, images=images)) == 1
    out, err = capsys.readouterr()
    assert {path.name for path in settings.output.iterdir()} == {
        'kite-attention.png', 'KITE-attention.png', 'kite-attention-2.png'}
    assert out.count(' -> ') == 3  # the picture that is named twice is read once
    for name, reason in (('empty.png', 'cannot identify'), ('cut.jpg', 'truncated'), ('missing.jpg', 'No such file'),
                         ('bare', 'no pictures (.png, .jpg, .jpeg) in this folder')):
        assert sum(name in line and reason in line for line in err.splitlines()) == 1, (name, err)
    assert 'notes.txt' not in err + out
    assert before == {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_one_complaint_is_enough_for_exit_code_1(settings, picture, tmp_path):
    (tmp_path / 'bare').mkdir()
    for other in (tmp_path / 'bare', tmp_path / 'missing.png'):
        assert predict.main(dataclasses.replace(settings, images=(picture, other))) == 1
    assert predict.main(settings) == 0


def test_no_picture_that_is_read_is_ever_written_over(settings, picture):
    folder = picture.parent
    taken = write_picture(folder / 'kite-attention.png', seed=1)
    (folder / 'link').symlink_to(folder)
    before = taken.read_bytes(), picture.read_bytes()
    for output in (folder, folder / 'link'):
        assert predict.main(dataclasses.replace(settings, images=(picture, taken), output=output)) == 0
    assert before == (taken.read_bytes(), picture.read_bytes())
    assert {path.name for path in folder.iterdir()} - {'link'} == {
        'kite.png', 'kite-attention.png', 'kite-attention-2.png', 'kite-attention-attention.png'}


def test_overlays_are_whole_or_absent(settings, monkeypatch):
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, **_: (
        path.write_bytes(b'half'), (_ for _ in ()).throw(KeyboardInterrupt))[0])
    with pytest.raises(KeyboardInterrupt):
        predict.main(settings)
    assert not [path for path in settings.output.iterdir() if not path.name.startswith('.')]


# The command line


def command(*flags: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / 'scripts' / 'predict.py'), *map(str, flags), '--device', 'cpu'],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})


def test_two_processes_share_the_pictures(settings, picture, tmp_path, randomize, capsys):
    name = write_run(tmp_path / 'run', randomize(zoo()), NAMES)
    paths = [write_picture(picture.parent / f'{i}.png', seed=i) for i in range(3)] + [tmp_path / 'missing.png']
    own = dict(images=tuple(paths), model=name, model_kwargs=(), num_classes=None, img_size=None)
    assert predict.main(dataclasses.replace(settings, **own)) == 1
    one = capsys.readouterr().out.splitlines()
    pngs = {path.name: path.read_bytes() for path in settings.output.iterdir()}
    assert len(one) == 16 and len(pngs) == 3

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launcher = ('-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-addr=127.0.0.1', f'--master-port={port}')
    for path in settings.output.iterdir():
        path.unlink()
    two = command(*paths, '--model', name, '--output', settings.output, launcher=launcher)
    assert two.returncode == 1
    said = [line for line in two.stdout.splitlines() if line and line in one]  # gloo may add that it is connected
    assert sorted(said) == sorted(filter(None, one))
    assert two.stderr.count('missing.png: cannot be read') == 1
    assert pngs == {path.name: path.read_bytes() for path in settings.output.iterdir()}


def test_command_line_ends_with_a_sentence(tmp_path):
    done = command(tmp_path / 'a.png', tmp_path / 'b.png', '--model', 'test_resnet', '--img-size', 32, '--output',
                   tmp_path / 'out')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        'predict.py: IMAGES must name at least one picture that can be read, and none of these can; see above for the '
        'reasons.')


def test_flags_are_read_in_any_order():
    settings = tyro.cli(predict.Settings, args=[
        'a.png', 'folder', '--model', 'test_vit', '--at', '0.25', '0.5', '--explain', 'gradcam', '--stage', '3',
        '--checkpoint', 'w.pth', '--output', 'out', '--pretrained', '--device', 'cpu'])
    assert settings.images == (Path('a.png'), Path('folder')) and settings.at == (0.25, 0.5)
    assert (settings.explain, settings.stage, settings.checkpoint, settings.output, settings.pretrained) == (
        'gradcam', 3, 'w.pth', Path('out'), True)


def test_pretrained_is_passed_on_and_its_failure_is_a_sentence(settings):
    with pytest.raises(SettingsError, match=r'cannot be built: .*[Pp]retrained'):
        predict.main(dataclasses.replace(settings, pretrained=True))
