"""REINFORCE, CISPO and SAPO: golden values of F1, the slow reference, gradients against PPO's, and extreme ratios."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction, token_weights
from hone.algos.soft_losses import cispo_loss, reinforce_loss, sapo_loss, scaled_advantages
from tests.algos.strategies import law, poisoned, scored_batches
from tests.reference import numpy_losses
from tests.reference.fixtures import f1

TOKEN, SEQUENCE = Reduction(), Reduction(over="sequence")


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _of_f1(loss, sign, reduction, **settings):
    example = f1(sign=sign)
    weights = token_weights(example.action_mask, example.cu_seqlens, reduction).double()
    weights[~example.action_mask] = math.nan
    old = () if loss is reinforce_loss else (example.old_logp,)
    result = loss(example.logp, *old, example.advantages, weights, example.action_mask, **settings)
    result.total.backward()
    assert (example.logp.grad[~example.action_mask] == 0).all()
    assert not any(figure.requires_grad for figure in result.metrics.values())
    return result, example.logp.grad[example.action_mask]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reinforce_golden(sign):
    # logp = [-1, -.2, -2.4], [-.2, -1.3]: (1 + .2 + 2.4 - .2 - 1.3) / 5
    result, gradient = _of_f1(reinforce_loss, sign, TOKEN)
    assert_close(result.total.detach(), sign * _fp64(0.42).squeeze())
    assert_close(gradient, sign * _fp64(-0.2, -0.2, -0.2, 0.2, 0.2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("settings", "expected", "gradient", "outside"),
    [
        # rho = [1, 1.349859, .670320], [1.648721, .904837]; L = -sum rho A logp / 5, g = -rho A / 5
        ({"cap": math.inf}, 0.274542, [-0.2, -0.269972, -0.134064, 0.329744, 0.180967], 0.0),
        # 1.5 for 1.648721: (1 + .269972 + 1.608768 - .3 - 1.176289) / 5
        ({"cap": 1.5}, 0.280490, [-0.2, -0.269972, -0.134064, 0.3, 0.180967], 0.2),
        # clipped to [1, 1.2, .8], [1.2, .904837]: (1 + .24 + 1.92 - .24 - 1.176289) / 5
        ({"cap": 1.2, "floor": 0.8}, 0.348742, [-0.2, -0.24, -0.16, 0.24, 0.180967], 0.6),
    ],
)
def test_cispo_golden(sign, settings, expected, gradient, outside):
    result, actual = _of_f1(cispo_loss, sign, TOKEN, **settings)
    # The bound does not ask for the sign of A, so F1- is F1+ negated.
    assert_close(result.total.detach(), sign * _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, sign * _fp64(*gradient), rtol=0, atol=1e-6)
    assert_close(result.metrics["ppo_clip_ratio"], _fp64(outside).squeeze())
    assert_close(result.metrics["ppo_kl"], _fp64(-0.06).squeeze())


@pytest.mark.parametrize(
    ("sign", "expected", "gradient"),
    [
        # p = sigmoid(tau (rho - 1)), tau 1 where A > 0, 1.05 where A < 0: L = -(4 / tau) p A w, g = -4 p (1 - p) rho A w.
        # F1+: p = [.5, .586583, .418318], [.663997, .475041]; -(2 + 2.346333 + 1.673273) / 6 + (2.529513 + 1.809679) / 4.
        (1.0, 0.081530, [-0.166667, -0.218230, -0.108738, 0.367838, 0.225646]),
        # F1-: p = [.5, .590819, .414313], [.656722, .476227].
        (-1.0, -0.177310, [0.166667, 0.217554, 0.108439, -0.371685, -0.225698]),
    ],
)
def test_sapo_golden(sign, expected, gradient):
    result, actual = _of_f1(sapo_loss, sign, SEQUENCE)
    assert_close(result.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)


@law
@given(scored_batches(), st.floats(0.0, 1.0), st.floats(1.0, 4.0), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_soft_losses_equal_the_reference(batch, floor, cap, positive, negative):
    dirty, live = poisoned(batch), batch.action_mask
    arguments = (dirty.rollout_logp, dirty.old_logp, dirty.advantages, dirty.weights, dirty.action_mask)
    tokens = list(zip(*(x[live].tolist() for x in (batch.rollout_logp, batch.old_logp, batch.advantages, batch.weights)), strict=True))
    cispo = sum((w * numpy_losses.cispo(new, old, a, cap=cap, floor=floor) for new, old, a, w in tokens), 0.0)
    sapo = sum((w * numpy_losses.sapo(new, old, a, positive=positive, negative=negative) for new, old, a, w in tokens), 0.0)
    assert_close(cispo_loss(*arguments, cap=cap, floor=floor).total, _fp64(cispo).squeeze(), rtol=1e-9, atol=1e-12)
    actual = sapo_loss(*arguments, temperature_positive=positive, temperature_negative=negative)
    assert_close(actual.total, _fp64(sapo).squeeze(), rtol=1e-9, atol=1e-12)


def _gradient(loss, batch, *rest, **settings):
    logp = batch.rollout_logp.clone().requires_grad_()
    loss(logp, *rest, batch.weights, batch.action_mask, **settings).total.backward()
    return logp.grad


@law
@given(scored_batches())
def test_ppo_without_a_clip_has_the_gradient_of_cispo_without_a_cap(batch):
    ppo = _gradient(clipped_surrogate, batch, batch.old_logp, batch.advantages, clip_low=1.0, clip_high=math.inf)
    assert_close(_gradient(cispo_loss, batch, batch.old_logp, batch.advantages, cap=math.inf), ppo)


@law
@given(scored_batches(spread=3.0), st.floats(0.1, 3.0))
def test_sapos_gradient_is_that_of_its_docstring_and_never_exceeds_the_ratio(batch, tau):
    temperatures = {"temperature_positive": tau, "temperature_negative": tau}
    gradient = _gradient(sapo_loss, batch, batch.old_logp, batch.advantages, **temperatures)
    ratio = (batch.rollout_logp - batch.old_logp).exp()
    p = torch.sigmoid(tau * (ratio - 1))
    assert_close(gradient, -batch.weights * 4 * p * (1 - p) * ratio * batch.advantages)


@law
@given(scored_batches(), st.floats(0.0, 5.0))
def test_losses_are_positively_homogeneous_in_the_advantages(batch, factor):
    arguments = (batch.rollout_logp, batch.old_logp)
    scaled = scaled_advantages(batch.advantages, torch.full_like(batch.advantages, factor), batch.action_mask)
    for loss, settings in ((clipped_surrogate, {"clip_low": 0.2, "clip_high": 0.2}), (cispo_loss, {"cap": 2.0}), (sapo_loss, {})):
        whole = loss(*arguments, batch.advantages, batch.weights, batch.action_mask, **settings).total
        assert_close(loss(*arguments, scaled, batch.weights, batch.action_mask, **settings).total, factor * whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_ratio", [1e3, 80.0, -1e3])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_extreme_ratios_have_finite_values_and_gradients(log_ratio, advantage, dtype):
    one, mask = torch.ones(1), torch.tensor([True])
    for loss, settings in ((cispo_loss, {"cap": 5.0}), (sapo_loss, {})):
        logp = torch.tensor([log_ratio], dtype=dtype, requires_grad=True)
        result = loss(logp, torch.zeros(1, dtype=dtype), advantage * one, one, mask, **settings)
        result.total.backward()
        assert result.total.isfinite() and result.total.dtype == torch.float32
        capped = -5.0 * advantage if loss is cispo_loss and log_ratio > 0 else 0.0
        assert logp.grad.item() == capped
    assert cispo_loss(torch.tensor([1e3]), 0 * one, 0 * one, one, mask, cap=math.inf).total == 0  # 0 * inf


def test_differences_are_taken_after_the_upcast():
    logp, old_logp = torch.tensor([-8.5], dtype=torch.bfloat16), torch.tensor([-0.00390625], dtype=torch.bfloat16)
    one, mask = torch.ones(1), torch.tensor([True])
    ratio = math.exp(-8.49609375)
    assert_close(cispo_loss(logp, old_logp, one, one, mask, cap=5.0).total, torch.tensor(8.5 * ratio))
    gate = 4 / (1 + math.exp(1 - ratio))
    assert_close(sapo_loss(logp, old_logp, one, one, mask).total, torch.tensor(-gate), rtol=1e-6, atol=0)


def test_settings_that_mean_nothing_are_refused_with_their_limits():
    one, mask = torch.ones(1), torch.tensor([True])
    with pytest.raises(ValueError, match=r"ratio bounds \[0.9, 0.2\] of CISPO: need 0 <= floor <= cap"):
        cispo_loss(one, one, one, one, mask, cap=0.2, floor=0.9)
    with pytest.raises(ValueError, match=r"temperature_negative is 0\.0; SAPO's gate needs a temperature above 0"):
        sapo_loss(one, one, one, one, mask, temperature_negative=0.0)
