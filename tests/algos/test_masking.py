"""Clearing bits answers what choosing does, and a known exp what exp does, gradients included."""

import math

import pytest
import torch

from hone.algos.masking import cleared, known_exp, on_mask, ones_where

NUMBERS = (1.5, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3e38, -2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cleared_is_on_mask_to_the_bit(dtype):
    values = torch.tensor(NUMBERS, dtype=dtype)
    for bits in range(2 ** len(NUMBERS)):
        mask = torch.tensor([bool(bits >> place & 1) for place in range(len(NUMBERS))])
        answer = cleared(values, ones_where(mask, dtype))
        integers = torch.int32 if dtype == torch.float32 else torch.int64
        assert answer.view(integers).equal(on_mask(values, mask).view(integers))


def test_known_exp_has_the_gradients_of_exp_at_any_order_and_none_where_it_is_left_out():
    mask = torch.tensor([True, False, True, False, False])
    values = torch.tensor([0.3, math.nan, -1.2, math.inf, 1e4], dtype=torch.float64, requires_grad=True)
    answer = known_exp(values, cleared(values.detach().exp(), ones_where(mask, torch.float64)))
    chosen = torch.where(mask, torch.where(mask, values, 0.0).exp(), 0.0)
    assert answer.equal(chosen)
    for _ in range(3):
        (answer,) = torch.autograd.grad(answer.pow(3).sum(), values, create_graph=True)
        (chosen,) = torch.autograd.grad(chosen.pow(3).sum(), values, create_graph=True)
        torch.testing.assert_close(answer, chosen, rtol=1e-14, atol=0)
        assert (answer[~mask] == 0).all()
