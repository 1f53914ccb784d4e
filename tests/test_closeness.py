"""tests/support/closeness.py: the tolerance accepts other kernels and rejects wrong tensors."""
import copy

import pytest
import timm
import torch

from coatnet_zoo import releases
from support.closeness import assert_same_up_to_rounding, same_up_to_rounding

PACKAGED = sorted(name for name, entry in releases.RELEASES.items() if entry['packaged'])

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_order_of_summation_passes_and_other_values_do_not():
    values = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    shuffled = values[:, torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    assert not torch.equal(values.sum(1), shuffled.sum(1))
    assert_same_up_to_rounding(shuffled.sum(1), values.sum(1))
    for wrong in (values.sum(1) * (1 + 1e-4), values[:1].sum(1), values.sum(1).log(), torch.zeros(64)):
        assert not same_up_to_rounding(wrong, values.sum(1))
    with pytest.raises(AssertionError, match=r'differ by \S+e-\d+ of the largest value, 1e-05 allowed'):
        assert_same_up_to_rounding(values.sum(1) * (1 + 1e-4), values.sum(1))


@pytest.mark.parametrize('name', [
    PACKAGED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PACKAGED[1:])])
@torch.no_grad()
def test_each_wrong_tensor_of_a_released_model_is_seen(name):
    """Wrong tensors are kernels shifted by one tap, and weights, biases and statistics of the next channel."""
    model = timm.create_model(name, pretrained=True).eval()
    expected = model(IMAGES)
    assert_same_up_to_rounding(torch.cat([model(image[None]) for image in IMAGES]), expected)
    assert_same_up_to_rounding(copy.deepcopy(model).to(memory_format=torch.channels_last)(IMAGES), expected)
    one, unseen = model(IMAGES[:1]), []
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or value.numel() < 2:
            continue
        kept = value.clone()
        shifted_taps = value.ndim > 2 and value.shape[-1] > 1
        value.copy_(kept.roll(1, -1 if shifted_taps else 0))
        if same_up_to_rounding(model(IMAGES[:1]), one):
            unseen.append(key)
        value.copy_(kept)
    assert unseen == [], f'{len(unseen)} of {len(model.state_dict())}'
    assert torch.equal(model(IMAGES[:1]), one)
