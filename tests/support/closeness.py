"""Tolerance for two computations of the same numbers, for tests that cannot require equal bits.

Tests may require equal bits where the same code runs twice on the same tensors in the same memory layout on one
machine: resume, determinism, checksums, tensors read back from a file. Other loaders (transformers' tensors lie in the
mapped file, timm's are copies), memory layouts, batch sizes, processes, thread counts, CPUs and versions of torch use
other kernels, which add the same products in another order.
"""
import torch

from release_folder import largest_gap
from release_rules import TOLERANCE

__all__ = ['assert_same_up_to_rounding', 'same_up_to_rounding']


def same_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the maximum difference is at most 1e-5 of the largest expected value, the tolerance of hub/verify.py.

    Reordered float32 sums differ by about 1e-6 of that value, wrong weights by far more (tests/test_closeness.py).
    """
    return found.shape == expected.shape and largest_gap(found, expected) <= TOLERANCE


def assert_same_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    gap = largest_gap(found, expected)
    assert gap <= TOLERANCE, f'differ by {gap:.1e} of the largest value, {TOLERANCE:g} allowed'
