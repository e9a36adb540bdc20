"""Reductions: golden means, the reference, and the laws of weights."""

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from hone.algos.reduce import Reduction, token_weights, weighted_sum
from tests.algos.strategies import law, masks, reductions
from tests.reference import numpy_algos

# Losses [1, 2, 3] and [4, 5], a token off the mask before, between and after, and a row without actions at the end.
MASK = torch.tensor([False, True, True, True, False, True, True, False, False])
LOSSES = torch.tensor([float("nan"), 1.0, 2.0, 3.0, float("inf"), 4.0, 5.0, float("nan"), float("nan")])
CU_SEQLENS = torch.tensor([0, 4, 8, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (Reduction(), 3.0),  # 15 / 5
        (Reduction(over="sequence"), 3.25),  # (2 + 4.5) / 2
        (Reduction(over="constant", length=4), 1.875),  # 15 / (2 * 4)
    ],
)
def test_golden_means_of_two_rows(reduction, expected):
    weights = token_weights(MASK, CU_SEQLENS, reduction)
    assert_close(weighted_sum(LOSSES, weights, MASK), torch.tensor(expected))


@law
@given(masks, reductions)
def test_weights_equal_the_reference(rows, reduction):
    mask, cu_seqlens = _packed(rows)
    expected = numpy_algos.token_weights(rows, over=reduction.over, length=reduction.length)
    assert_close(token_weights(mask, cu_seqlens, reduction), torch.tensor(expected))


@law
@given(masks, reductions)
def test_weights_by_token_and_by_sequence_sum_to_one(rows, reduction):
    mask, cu_seqlens = _packed(rows)
    total = token_weights(mask, cu_seqlens, reduction).sum()
    live_rows = max(sum(any(row) for row in rows), 1)
    expected = float(mask.sum()) / (live_rows * 7) if reduction.over == "constant" else float(mask.any())
    assert_close(total, torch.tensor(expected))


def test_weighted_sum_without_action_tokens_is_zero_and_still_attached_to_the_graph():
    per_token = torch.tensor([float("nan"), 1.0], requires_grad=True)
    total = weighted_sum(per_token, torch.zeros(2), torch.tensor([False, False]))
    total.backward()
    assert total == 0
    assert_close(per_token.grad, torch.zeros(2), rtol=0, atol=0)


@pytest.mark.parametrize(("over", "length"), [("constant", None), ("token", 4), ("sequence", 4), ("constant", 0)])
def test_a_length_belongs_to_constant_and_is_positive(over, length):
    with pytest.raises(ValueError, match="length"):
        Reduction(over=over, length=length)


def _packed(rows):
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], dtype=torch.int32)
    return torch.tensor([live for row in rows for live in row]), cu_seqlens
