"""LightConvNet and DynamicConvNet: names, sizes, cost, and image sizes."""
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn

from coatnet_train.models.model_size import model_size
from coatnet_zoo.blocks import LightConv2d
from coatnet_zoo.models.lightconvnet import model_cfgs

SIZES = {'pico': 4, 'nano': 15, 'tiny': 28, 'small': 50, 'base': 89}
NAMES = timm.list_models(module='lightconvnet')


def small(name: str = 'lightconvnet_pico_64', **kwargs) -> nn.Module:
    return timm.create_model(
        name, **{'num_classes': 5, 'depths': (1, 1, 1, 1), 'embed_dim': (32, 32, 64, 64), **kwargs})


def test_names():
    assert NAMES == sorted(
        f'{family}_{size}' for family in ('lightconvnet', 'dynamicconvnet') for size in (*SIZES, 'pico_64'))
    assert set(model_cfgs) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_sizes_are_what_the_names_say(name):
    parameters, multiply_adds, model = model_size(name)
    size = name.split('_')[1]
    assert parameters / 1e6 == pytest.approx(SIZES[size], rel=.12 if size == 'pico' else .05)
    assert model.cfg.layout == ('LLLL' if name.startswith('light') else 'LLDD')
    assert model.pretrained_cfg['fixed_input_size'] is False
    if size == 'tiny':
        assert multiply_adds <= 4.6e9


def test_small_image_models_keep_resolution():
    for name in ('lightconvnet_pico_64', 'dynamicconvnet_pico_64'):
        model = timm.create_model(name, device='meta')
        assert model.img_size == (64, 64)
        assert [level['reduction'] for level in model.feature_info] == [1, 2, 4, 8, 16]
        assert model.pretrained_cfg['input_size'] == (3, 64, 64)


def test_multiply_adds_of_dynamicconv_are_counted():
    """Besides its layers, DynamicConv costs K * K multiply-adds for each element of its output."""
    counts = [model_size('dynamicconvnet_pico_64', depths=(1, 1, 1, 1), layout=word)[1] for word in ('LLLL', 'LLLD')]
    project = 320 * 10 * 49 * 4 * 4  # width, heads, taps, positions
    assert counts[1] - counts[0] == project  # the sum itself costs what the depthwise convolution costs


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(16, 50), st.integers(16, 50), st.sampled_from(['LLLL', 'DDDD', 'CLDL']))
def test_any_size_from_the_stride_up_without_a_table_to_resize(height, width, layout):
    model = small(layout=layout).eval()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    features = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    assert [f.shape[-2:] for f in features] == [(-(-height // r), -(-width // r)) for r in (1, 2, 4, 8, 16)]
    model.set_input_size((height, width))
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_smaller_than_the_stride_is_refused():
    with pytest.raises(ValueError, match='images must be at least 16 x 16'):
        small()(torch.randn(1, 3, 15, 64))


@pytest.mark.parametrize('options', [
    {}, dict(normalize='none', conv_head_dim=1), dict(kernel_size=(3, 7, 15, 31)), dict(layer_scale=0),
    dict(layout='LLDD', static_branch=True), dict(layout='CLTD')], ids=str)
def test_folding_leaves_plain_convolutions_exactly(options, randomize):
    model = randomize(small(**options).double()).eval()
    folded = reparameterize_model(model)
    assert not [m for m in folded.modules() if isinstance(m, (LightConv2d, nn.BatchNorm2d, timm.layers.LayerScale))]
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(convolutions) == sum(isinstance(m, LightConv2d) for m in model.modules()) + model.cfg.layout.count('C')
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64) if 'T' not in model.cfg.layout else torch.randn(
        2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())
        torch.testing.assert_close(reparameterize_model(folded)(images), folded(images), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['lightconvnet_pico_64', 'dynamicconvnet_pico_64'])
def test_tiny_set_is_learned(name):
    """Training on six images of six classes brings the loss below 30 % of its start."""
    torch.manual_seed(0)
    model = small(name, num_classes=6, conv_norm_momentum=.1, dropconnect=.1).train()
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .3 * losses[0], losses


def test_half_precision_stays_close(randomize):
    for layout in ('LLLL', 'DDDD'):
        model = randomize(small(layout=layout)).eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = model(images)
            with torch.autocast('cpu', torch.bfloat16):
                ours = model(images).float()
        assert ((ours - expected).norm() / expected.norm()).item() < .05
