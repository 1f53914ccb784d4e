"""CoAtNet-0 to 5 against the paper's table and against timm's own CoAtNet."""
import dataclasses
from itertools import product

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from coatnet_zoo.models.coatnet import model_cfgs

NAMES = timm.list_models(module='coatnet')
PARAMETERS = {  # millions; the paper rounds them to 25, 42, 75, 168, 275, 688
    'coatnet_0': 25.04, 'coatnet_1': 42.23, 'coatnet_2': 74.68, 'coatnet_3': 166.97, 'coatnet_4': 275.43,
    'coatnet_5': 687.05}
MULTIPLY_ADDS = {  # billions at 224: stride in the first 1x1, stride in the depthwise convolution
    'coatnet_0': (4.14, 4.55), 'coatnet_1': (8.24, 8.64), 'coatnet_2': (15.50, 16.43), 'coatnet_3': (34.37, 36.45)}
TIMM_LIKE_OURS = dict(  # timm's CoAtNet with the official choices
    conv_stride_mode='1x1', conv_act_layer='gelu_tanh', conv_norm_eps=1e-3, transformer_act_layer='gelu_tanh',
    transformer_norm_eps=1e-5, stem_bias=True)


def meta(name: str, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, device='meta', **kwargs).eval()


def test_names():
    assert NAMES == [
        'coatnet_0', 'coatnet_0_ccdd', 'coatnet_0_kecam', 'coatnet_1', 'coatnet_1_ccdd', 'coatnet_2', 'coatnet_2_ccdd',
        'coatnet_3', 'coatnet_4', 'coatnet_5', 'coatnet_nano', 'coatnet_pico', 'coatnet_pico_64',
        'coatnet_pico_ccdd_64']
    assert set(model_cfgs) == set(NAMES)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    millions = sum(p.numel() for p in meta(name).parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize('name,millions', [('coatnet_nano', 15), ('coatnet_pico', 4), ('coatnet_pico_64', 4)])
def test_small_models_are_about_as_large_as_they_say(name, millions):
    model = meta(name, num_classes=1000)  # released weights may have another number
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize('name', MULTIPLY_ADDS)
@pytest.mark.parametrize('which,conv_stride', [(0, 'expand'), (1, 'depthwise')])
def test_multiply_adds_are_the_papers(name, which, conv_stride):
    model = meta(name, conv_stride=conv_stride)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert flops.get_total_flops() / 2e9 == pytest.approx(MULTIPLY_ADDS[name][which], rel=2e-3)


def test_head_size_of_coatnet_5():
    model = meta('coatnet_5')
    assert {block.attn.head_dim for stage in model.stages[2:] for block in stage.blocks} == {64}


@pytest.mark.parametrize('name', ['coatnet_0', 'coatnet_1', 'coatnet_2', 'coatnet_pico_64'])
def test_ccdd_is_the_model_with_dynamicconv_in_place_of_attention(name):
    other = name.replace('_64', '_ccdd_64') if name.endswith('_64') else f'{name}_ccdd'
    base, ours = meta(name, num_classes=1000), meta(other, num_classes=1000)
    assert ours.cfg == dataclasses.replace(base.cfg, layout='CCDD')
    assert ours.pretrained_cfg['input_size'] == base.pretrained_cfg['input_size']
    shapes, theirs = ({k: v.shape for k, v in model.state_dict().items()} for model in (ours, base))
    assert all(shapes[k] == v for k, v in theirs.items() if k.startswith(('stem', 'stages.0', 'stages.1', 'head')))


def test_small_image_model_keeps_resolution():
    model = meta('coatnet_pico_64')
    assert [level['reduction'] for level in model.feature_info] == [1, 2, 4, 8, 16]
    assert model.pretrained_cfg['input_size'] == (3, 64, 64)


# the largest two are slow and have the same code: each in one of the two choices
@pytest.mark.parametrize(('index', 'official'), [
    *product((0, 1, 2), (False, True)),
    *(pytest.param(index, official, marks=pytest.mark.slow) for index, official in ((3, True), (4, False)))])
@torch.no_grad()
def test_logits_equal_timms(index, official, randomize, skip_init):
    theirs = randomize(timm.create_model(f'coatnet_{index}_224', **(TIMM_LIKE_OURS if official else {})).eval())
    ours = timm.create_model(
        f'coatnet_{index}', pretrained=True, pretrained_cfg_overlay=dict(state_dict=theirs.state_dict()),
        **({} if official else dict(flavor='timm'))).eval()
    images = torch.randn(1, 3, 224, 224)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4)
