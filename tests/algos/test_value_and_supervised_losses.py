"""The critic's loss and the weighted negative log-likelihood: golden values and the reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.supervised import nll
from hone.algos.value_losses import clipped_value_loss, squared_value_loss
from tests.algos.strategies import law, scored_batches
from tests.reference import numpy_algos

MASK = torch.tensor([False, True])


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("target", "expected", "slope"),
    [
        (1.5, 0.32, 0.0),  # V .9, V_old .5, clip .2: near = .7, (.7 - 1.5)^2 = .64 > .36, so V has no say
        (0.2, 0.245, 0.7),  # (.9 - .2)^2 = .49 > (.7 - .2)^2
    ],
)
def test_clipped_value_loss_golden(target, expected, slope):
    values = _fp64(math.nan, 0.9).requires_grad_()
    loss = clipped_value_loss(values, _fp64(math.nan, 0.5), _fp64(math.inf, target), _fp64(math.nan, 1.0), MASK, clip=0.2)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(expected).squeeze())
    assert_close(values.grad, _fp64(0.0, slope))
    assert {name: round(float(figure), 9) for name, figure in loss.metrics.items()} == {
        "critic_loss": expected,
        "values": 0.9,
        "returns": target,
    }


def test_squared_value_loss_golden():
    values = _fp64(math.nan, 0.9).requires_grad_()
    loss = squared_value_loss(values, _fp64(math.nan, 1.5), _fp64(math.nan, 0.5), MASK)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(0.09).squeeze())  # half of half of .36
    assert_close(values.grad, _fp64(0.0, -0.3))
    assert set(loss.metrics) == {"critic_loss", "values", "returns"}


@law
@given(scored_batches(), st.floats(0.01, 3.0))
def test_clipped_value_loss_equals_the_reference(batch, clip):
    current = batch.values + batch.advantages
    loss = clipped_value_loss(current, batch.values, batch.returns, batch.weights, batch.action_mask, clip=clip)
    columns = zip(batch.weights.tolist(), current.tolist(), batch.values.tolist(), batch.returns.tolist(), strict=True)
    expected = sum(weight * numpy_algos.clipped_value_loss(*rest, clip=clip) for weight, *rest in columns)
    assert_close(loss.total, _fp64(expected).squeeze())
    unclipped = clipped_value_loss(current, batch.values, batch.returns, batch.weights, batch.action_mask, clip=1e9)
    assert_close(unclipped.total, squared_value_loss(current, batch.returns, batch.weights, batch.action_mask).total)


def test_nll_golden():
    logp = _fp64(math.nan, -1.0, -0.2, -2.4).requires_grad_()
    mask = torch.tensor([False, True, True, True])
    loss = nll(logp, _fp64(math.nan, 0.25, 0.25, 0.5), mask)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(1.5).squeeze())  # .25 + .05 + 1.2
    assert_close(logp.grad, _fp64(0.0, -0.25, -0.25, -0.5))
    assert_close(loss.metrics, {"nll": _fp64(1.5).squeeze()})
