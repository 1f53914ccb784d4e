"""MBConv against its formula, its strides at odd sizes, and the folding of its norms."""
import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from coatnet_zoo.blocks import ConvStem, MBConv
from coatnet_zoo.blocks.inference import fold_norm_into_next, fold_norm_into_previous
from coatnet_zoo.blocks.stem import InputCheck

KECAM = dict(pool='max', se_act='act', inner_width='input')


@pytest.mark.parametrize('choices', [{}, KECAM], ids=['official', 'kecam'])
@pytest.mark.parametrize('conv_stride', ['expand', 'depthwise'])
@pytest.mark.parametrize('stride,dim_out', [(1, 8), (2, 8), (2, 12), (1, 12)])
def test_block_by_the_formula(stride, dim_out, conv_stride, choices, randomize):
    """x <- Proj(Pool(x)) + Project(SE(act(BN(DepthConv(act(BN(Expand(BN(x)))))))))."""
    block = randomize(MBConv(8, dim_out, stride, conv_stride=conv_stride, dtype=torch.float64, **choices)).eval()
    inner = 8 if choices else dim_out
    x = torch.randn(2, 8, 6, 10, dtype=torch.float64)
    y = block.pre_norm(x)
    if conv_stride == 'expand':
        y = y[:, :, ::stride, ::stride]  # a strided 1x1 convolution sees every second pixel
    y = F.gelu(block.norm1(torch.einsum('oc,bchw->bohw', block.expand.weight[:, :, 0, 0], y)), approximate='tanh')
    stride_depthwise = stride if conv_stride == 'depthwise' else 1
    y = F.conv2d(y, block.depthwise.weight, stride=stride_depthwise, padding=1, groups=4 * inner)
    y = F.gelu(block.norm2(y), approximate='tanh')
    squeezed = y.mean((2, 3))
    squeezed = squeezed @ block.se.reduce.weight.flatten(1).T + block.se.reduce.bias
    squeezed = F.gelu(squeezed, approximate='tanh') if choices else F.silu(squeezed)
    y = y * torch.sigmoid(squeezed @ block.se.expand.weight.flatten(1).T + block.se.expand.bias)[:, :, None, None]
    windows = x.unfold(2, stride, stride).unfold(3, stride, stride)
    pooled = windows.amax((-1, -2)) if choices else windows.mean((-1, -2))
    shortcut = pooled if dim_out == 8 else block.shortcut.proj(pooled)
    torch.testing.assert_close(block(x), shortcut + block.project(y), rtol=0, atol=1e-12)
    assert block.se.reduce.out_channels == inner // 4 and block.expand.out_channels == 4 * inner


@pytest.mark.parametrize('conv_stride', ['expand', 'depthwise'])
@pytest.mark.parametrize('size', [(5, 7), (1, 1), (8, 3)], ids=str)
def test_strided_block_takes_odd_sizes(size, conv_stride):
    block = MBConv(4, 8, 2, conv_stride=conv_stride).eval()
    assert block(torch.randn(1, 4, *size)).shape == (1, 8, -(-size[0] // 2), -(-size[1] // 2))


def test_max_pooling_of_odd_sizes_takes_what_is_there():
    block = MBConv(2, 2, 2, pool='max')
    x = -torch.arange(1., 16.).view(1, 1, 3, 5).expand(1, 2, 3, 5)
    assert block.shortcut(x)[0, 0].tolist() == [[-1, -3, -5], [-11, -13, -15]]


def test_pooling_of_odd_sizes_averages_what_is_there():
    block = MBConv(2, 2, 2)
    pooled = block.shortcut(torch.ones(1, 2, 3, 5))
    assert torch.equal(pooled, torch.ones(1, 2, 2, 3))


@pytest.mark.parametrize('choices', [{}, KECAM], ids=['official', 'kecam'])
@pytest.mark.parametrize('norm_layer', [nn.BatchNorm2d, LayerNorm2d])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('conv_stride', ['expand', 'depthwise'])
def test_fused_block_is_the_block(norm_layer, stride, conv_stride, choices, randomize):
    block = randomize(MBConv(
        8, 12, stride, norm_layer=norm_layer, conv_stride=conv_stride, dtype=torch.float64, **choices)).eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        folded = block.fuse()
        assert folded is block and block.fuse() is block  # in place, idempotent
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())


def test_fused_block_still_has_right_gradients(randomize):
    block = randomize(MBConv(4, 8, 2, dtype=torch.float64)).eval()
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), x)[0]
    actual = torch.autograd.grad(block.fuse()(x).square().sum(), x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_fused_block_leaves_outputs_alone_where_gradients_need_them(randomize):
    """A full backward hook holds views of an activation, which must not be overwritten in place."""
    block = randomize(MBConv(4, 8, 2)).eval()
    folded, seen = block.fuse(), []
    block.act2.register_full_backward_hook(lambda _, __, grad_output: seen.append(grad_output[0].shape))
    folded(torch.randn(1, 4, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [(1, 32, 2, 2)]


def test_folding_keeps_memory_format_and_frozen_state(randomize):
    conv = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last).requires_grad_(False)
    norm = randomize(nn.BatchNorm2d(6))
    assert isinstance(fold_norm_into_previous(conv, norm), nn.Identity)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad and not conv.bias.requires_grad


def test_norm_is_not_folded_into_a_padded_convolution():
    with pytest.raises(AssertionError):
        fold_norm_into_next(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))


def test_stem_by_the_formula(randomize):
    stem = randomize(ConvStem(InputCheck(3, (8, 8), 1, 'free'), 6, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    y = F.conv2d(x, stem.conv1.weight, stem.conv1.bias, stride=2, padding=1)
    y = F.gelu(stem.norm1(y), approximate='tanh')
    y = F.conv2d(y, stem.conv2.weight, stem.conv2.bias, padding=1)
    torch.testing.assert_close(stem(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(stem.fuse()(x), y, rtol=0, atol=1e-12)
