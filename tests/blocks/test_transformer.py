"""Relative attention against the paper's formula written out, and against timm's relative bias."""
import pytest
import torch
from timm.layers import RelPosBias, set_fused_attn

from coatnet_zoo.blocks import TransformerBlock
from coatnet_zoo.blocks.transformer import FixedBias, RelativeAttention2d, RelativeBias, resize_bias_table


def attention_by_hand(attn: RelativeAttention2d, x: torch.Tensor, rel_bias: str) -> torch.Tensor:
    """CoAtNet eq. 3 position by position: y_i = sum_j softmax_j(q_i . k_j / sqrt(d) + w_{i-j}) v_j."""
    B, H, W, _ = x.shape
    d, heads = attn.head_dim, attn.num_heads
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    out = torch.empty(B, H, W, heads * d, dtype=x.dtype)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(H):
            for j in range(W):
                logits = torch.einsum('bd,bhwd->bhw', q[:, i, j, part], k[..., part]) / d ** .5
                offsets = torch.zeros(H, W, dtype=x.dtype)
                if rel_bias != 'none':
                    for a in range(H):
                        for b in range(W):
                            offsets[a, b] = attn.rel_bias.table[head, i - a + H - 1, j - b + W - 1]
                if rel_bias == 'pre':
                    logits = logits + offsets
                weights = logits.flatten(1).softmax(-1).view(B, H, W)
                if rel_bias == 'post':
                    weights = weights + offsets
                out[:, i, j, part] = torch.einsum('bhw,bhwd->bd', weights, v[..., part])
    return attn.proj(out)


@pytest.mark.parametrize('fused', [True, False], ids=['sdpa', 'plain'])
@pytest.mark.parametrize('rel_bias', ['pre', 'post', 'none'])
@pytest.mark.parametrize('size', [(3, 3), (2, 4), (1, 3)], ids=str)
def test_attention_matches_the_papers_formula(rel_bias, size, fused, randomize):
    set_fused_attn(fused)
    try:
        attn = RelativeAttention2d(6, 8, size, head_dim=4, rel_bias=rel_bias, dtype=torch.float64)
    finally:
        set_fused_attn(True)
    randomize(attn)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(attn(x), attention_by_hand(attn, x, rel_bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(4, 4), (3, 5), (7, 2)], ids=str)
def test_relative_bias_matches_timm(size):
    ours, timms = RelativeBias(3, size), RelPosBias(size, 3)
    with torch.no_grad():
        timms.relative_position_bias_table.normal_()
        ours.table.copy_(timms.relative_position_bias_table.T.unflatten(1, ours.table.shape[1:]))
    assert torch.equal(ours(*size), timms.get_bias())
    assert torch.equal(ours.fuse()(*size), timms.get_bias())


def test_relative_bias_gradient_counts_pairs():
    bias = RelativeBias(1, (2, 3))
    bias(2, 3).sum().backward()
    # an offset (a, b) occurs (H - |a|)(W - |b|) times
    expected = torch.tensor([[1., 2., 3., 2., 1.], [2., 4., 6., 4., 2.], [1., 2., 3., 2., 1.]])
    assert torch.equal(bias.table.grad[0], expected)


def test_resized_table_keeps_constants_centre_and_symmetry():
    table = torch.randn(2, 7, 7)
    table = table + table.flip(1, 2)  # w_{i-j} = w_{j-i}
    out = resize_bias_table(table, (8, 6))
    assert out.shape == (2, 15, 11)
    torch.testing.assert_close(out, out.flip(1, 2))
    torch.testing.assert_close(out[:, 7, 5], table[:, 3, 3])
    assert torch.equal(resize_bias_table(torch.ones(2, 7, 7), (9, 3)), torch.ones(2, 17, 5))
    assert resize_bias_table(table, (4, 4)) is table


def test_table_is_resized_at_half_pixels():
    """Bilinear with pixel centres at half integers, as TensorFlow's resize: offset -2 of 5 reads source -1 1/5 of 3."""
    table = torch.tensor([[[0., 3., 12.]]]).repeat(1, 3, 1)  # 3 offsets, for a map 2 wide
    at = (torch.arange(5) + .5) * 3 / 5 - .5
    expected = torch.tensor([0., 3 * at[1], 3., 3 + 9 * (at[3] - 1), 12.])
    torch.testing.assert_close(resize_bias_table(table, (2, 3))[0, 1], expected)


def test_resized_table_follows_the_weights_it_came_from():
    """Nothing is cached: after a step, a copy and a load, another size uses the new table."""
    bias = RelativeBias(2, (4, 4), dynamic=True)
    before = bias(6, 6).detach().clone()
    optimizer = torch.optim.SGD(bias.parameters(), lr=1.)
    for _ in range(2):  # the second backward must not need a freed graph
        optimizer.zero_grad()
        bias(6, 6).sum().backward()
        optimizer.step()
    assert not torch.allclose(bias(6, 6), before)
    bias.load_state_dict({'table': torch.zeros(2, 7, 7)})
    assert bias(6, 6).abs().max() == 0


def test_dynamic_bias_is_not_frozen_by_fuse():
    assert isinstance(RelativeBias(2, (4, 4)).fuse(), FixedBias)
    dynamic = RelativeBias(2, (4, 4), dynamic=True)
    assert dynamic.fuse() is dynamic


def test_attention_softmax_of_half_logits_is_taken_in_float32():
    set_fused_attn(False)
    try:
        upcast = RelativeAttention2d(8, 8, (8, 8), head_dim=8, softmax_dtype='float32', rel_bias='none').bfloat16()
        inherit = RelativeAttention2d(8, 8, (8, 8), head_dim=8, softmax_dtype='input', rel_bias='none').bfloat16()
    finally:
        set_fused_attn(True)
    inherit.load_state_dict(upcast.state_dict())
    seen = []
    softmax = torch.Tensor.softmax

    def record(self, *args, **kwargs):
        seen.append(self.dtype)
        return softmax(self, *args, **kwargs)

    x = torch.randn(1, 8, 8, 8, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, 'softmax', record)
        upcast(x), inherit(x)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('stride,dim_out', [(1, 8), (2, 8), (2, 16), (1, 16)])
def test_block_by_the_formula(stride, dim_out, pool, randomize):
    """x <- Proj(Pool(x)) + Attention(Pool(Norm(x))); x <- x + FFN(Norm(x)), with the pool written as a reduction."""
    block = randomize(TransformerBlock(
        8, dim_out, stride, feat_size=(6 // stride, 4 // stride), head_dim=4, pool=pool, dtype=torch.float64))
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    H, W = 6 // stride, 4 // stride

    def pooled(z: torch.Tensor) -> torch.Tensor:
        windows = z.reshape(2, H, stride, W, stride, -1)
        return windows.amax((2, 4)) if pool == 'max' else windows.mean((2, 4))

    nhwc = x.permute(0, 2, 3, 1)
    y = block.shortcut(pooled(nhwc)) + block.attn(pooled(block.norm1(nhwc)))
    y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y.permute(0, 3, 1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize('inner_width,heads', [('output', 4), ('input', 2)])
def test_heads_follow_the_inner_width(inner_width, heads, randomize):
    """Attention with `heads` heads of 4 channels for any output width: softmax(q k^T / 2 + w) v, projected."""
    attn = randomize(TransformerBlock(
        8, 16, feat_size=(2, 3), head_dim=4, inner_width=inner_width, dtype=torch.float64)).attn
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    q, k, v = attn.qkv(x).view(6, 3, heads, 4).permute(1, 2, 0, 3)
    weights = (q @ k.mT / 2 + attn.rel_bias(2, 3)[0]).softmax(-1)
    expected = attn.proj((weights @ v).permute(1, 0, 2).reshape(1, 2, 3, 4 * heads))
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-12)


def test_head_dim_that_does_not_divide_is_refused_with_numbers():
    with pytest.raises(ValueError, match=r'head_dim=5, width 16'):
        RelativeAttention2d(8, 16, (2, 2), head_dim=5)
