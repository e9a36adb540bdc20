"""Clearing bits answers what choosing does, gradients included."""

import math

import pytest
import torch

from hone.algos.masking import cleared, cleared_with_gradient, on_mask, ones_where

NUMBERS = (1.5, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3e38, -2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cleared_is_on_mask_to_the_bit(dtype):
    values = torch.tensor(NUMBERS, dtype=dtype)
    for bits in range(2 ** len(NUMBERS)):
        mask = torch.tensor([bool(bits >> place & 1) for place in range(len(NUMBERS))])
        answer = cleared(values, ones_where(mask, dtype))
        integers = torch.int32 if dtype == torch.float32 else torch.int64
        assert answer.view(integers).equal(on_mask(values, mask).view(integers))


def test_gradients_of_any_order_are_on_masks():
    mask = torch.tensor([True, False, True, False])
    values = torch.tensor([0.3, math.nan, -1.2, math.inf], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(cleared_with_gradient(values, ones_where(mask, torch.float64)).pow(3).sum(), values, create_graph=True)
    (expected,) = torch.autograd.grad(on_mask(values, mask).pow(3).sum(), values, create_graph=True)
    assert first.equal(expected) and first[1] == 0 and first[3] == 0
    assert torch.autograd.grad(first.sum(), values)[0].equal(torch.autograd.grad(expected.sum(), values)[0])
