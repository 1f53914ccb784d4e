"""Block types L and D against their formulas, written out with torch's own functions."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coatnet_zoo.blocks import DynamicConv2d, DynamicConvBlock, LightConv2d, LightConvBlock
from coatnet_zoo.ops import dynamicconv2d

EXACT = dict(rtol=0, atol=1e-12)


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    x = x.permute(0, 2, 3, 1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
    return (x * layer.weight + layer.bias).permute(0, 3, 1, 2)


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    out = torch.einsum('bchw,dc->bdhw', x, layer.weight)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def windows(x: torch.Tensor, size: int) -> torch.Tensor:
    """Windows of every position: (B, C, H, W) -> (B, C, size * size, H, W)."""
    return F.unfold(x, size, padding=size // 2).view(*x.shape[:2], size * size, *x.shape[2:])


def by_formula(block: LightConvBlock, x: torch.Tensor, heads: int) -> torch.Tensor:
    """x <- Proj(Pool(x)) + s1 Out(Conv(GLU(In(Pool(Norm(x)))))); x <- x + s2 FFN(Norm(x))"""
    pool = (lambda x: F.avg_pool2d(x, 2)) if isinstance(block.pool, nn.AvgPool2d) else (lambda x: x)
    shortcut = pool(x) if isinstance(block.shortcut, nn.Identity) else linear(pool(x), block.shortcut)
    x = linear(pool(norm(x, block.norm1)), block.in_proj)
    if block.glu:
        a, b = x.chunk(2, 1)
        x = a * torch.sigmoid(b)
    size = (block.conv.kernel_size if isinstance(block.conv, DynamicConv2d) else block.conv.weight.shape)[-1]
    per_head = x.shape[1] // heads
    if isinstance(block.conv, DynamicConv2d):
        kernels = linear(x, block.conv.logits).unflatten(1, (heads, size * size)).softmax(2)
        kernels = kernels.repeat_interleave(per_head, 1)
    else:
        kernels = block.conv.weight.flatten(1).softmax(1).repeat_interleave(per_head, 0)[None, :, :, None, None]
    x = linear((windows(x, size) * kernels).sum(2), block.out_proj)
    x = shortcut + block.scale1.gamma[:, None, None] * x
    hidden = F.gelu(linear(norm(x, block.norm2), block.mlp.fc1), approximate='tanh')
    return x + block.scale2.gamma[:, None, None] * linear(hidden, block.mlp.fc2)


@pytest.mark.parametrize('kind', [LightConvBlock, DynamicConvBlock])
@pytest.mark.parametrize('dim,dim_out,stride,glu', [(6, 6, 1, True), (6, 12, 2, True), (6, 12, 1, False)])
def test_block_is_its_formula(kind, dim, dim_out, stride, glu, randomize):
    block = randomize(kind(dim, dim_out, stride, kernel_size=5, head_dim=3, glu=glu).double()).eval()
    x = torch.randn(2, dim, 6, 8, dtype=torch.float64)
    out = block(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, by_formula(block, x, dim_out // 3), **EXACT)


def test_odd_maps_round_up_as_the_other_letters_do():
    for kind in (LightConvBlock, DynamicConvBlock):
        assert kind(4, 8, 2)(torch.randn(1, 4, 7, 5)).shape == (1, 8, 4, 3)


def test_kernels_come_from_their_own_position_alone():
    conv = DynamicConv2d(8, 3, head_dim=4).double()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    seen = []
    conv.logits.register_forward_hook(lambda module, inputs, output: seen.append(output))
    conv(x)
    changed = x.clone()
    changed[..., 2, 3] += 1
    conv(changed)
    different = (seen[0] != seen[1]).any(-1)[0].nonzero().tolist()
    assert different == [[2, 3]] and conv.logits.bias is None and conv.logits.out_features == 2 * 9


def test_static_branch_adds_a_depthwise_convolution():
    conv = DynamicConv2d(6, 3, head_dim=3, static_branch=True).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    logits = linear(x, conv.logits)
    expected = dynamicconv2d(x, logits, (3, 3), backend='naive')
    expected = expected + F.conv2d(x, conv.static.weight[:, None], padding=1, groups=6)
    torch.testing.assert_close(conv(x), expected, **EXACT)
    assert conv.static.weight.shape == (6, 3, 3)


@pytest.mark.parametrize('head_dim,heads', [(1, 12), (4, 3), (12, 1), (64, 1)])
def test_weight_sharing(head_dim, heads):
    assert LightConv2d(12, 3, head_dim).weight.shape == (heads, 3, 3)
    assert DynamicConv2d(12, 3, head_dim).logits.out_features == heads * 9


@pytest.mark.parametrize('kind', [LightConv2d, DynamicConv2d])
@pytest.mark.parametrize('options,error,message', [
    (dict(kernel_size=8), ValueError, 'kernel sizes must be odd and positive, got 8 x 8'),
    (dict(kernel_size=(7, 7)), TypeError, 'kernel_size must be two integers'),
    (dict(kernel_size=7, normalize='x'), ValueError, "normalize must be 'softmax' or 'none', got 'x'"),
    (dict(kernel_size=7, dropconnect=2.), ValueError, 'dropconnect must be a probability'),
    (dict(kernel_size=7, head_dim=0), ValueError, 'conv_head_dim must divide the width of its stage'),
    (dict(kernel_size=7, head_dim=5), ValueError, 'got 5, width 32'),
], ids=str)
def test_modules_refuse_what_their_operator_refuses(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(32, **options)


def test_folded_lightconv_is_a_depthwise_convolution():
    conv = LightConv2d(6, 5, 3).double().requires_grad_(False)
    plain = conv.fuse()
    assert type(plain) is nn.Conv2d and plain.groups == 6 and plain.bias is None and not plain.weight.requires_grad
    x = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(plain(x), conv(x), **EXACT)
    assert plain.weight.sum((1, 2, 3)).tolist() == pytest.approx([1] * 6)


def test_scripted_block_draws_its_mask_too():
    for kind in (LightConvBlock, DynamicConvBlock):
        block = kind(8, 8, kernel_size=3, dropconnect=.5, layer_scale=1.).train()
        scripted = torch.jit.script(block)
        x = torch.randn(1, 8, 6, 6)
        torch.manual_seed(0)
        ours = block(x)
        torch.manual_seed(0)
        torch.testing.assert_close(scripted(x), ours)
        assert not torch.allclose(scripted(x), ours)
        torch.testing.assert_close(scripted.eval()(x), block.eval()(x))
