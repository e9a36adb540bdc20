"""DPPO: golden values of F1 around the rollout, the slow reference, the divergences at their ends, and extreme ratios."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction, token_weights
from hone.algos.trust_region import binary_kl, binary_tv, divergence_mask, dppo_loss
from tests.algos.strategies import law, poisoned, scored_batches
from tests.reference import numpy_losses
from tests.reference.fixtures import f1, scatter


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# old_logp - rollout_logp of F1: so rollout_logp = [-1.1, -.3, -2.9], [-.1, -1.25], and logp = [-1, -.2, -2.4], [-.2, -1.3].
MISMATCH = _fp64(0.1, -0.2, 0.9, -0.6, 0.05)
ONE_TOKEN = torch.tensor([True])


def _of_f1(sign, **settings):
    example = f1(sign=sign)
    mask = example.action_mask
    rollout_logp = scatter(example.old_logp[mask] - MISMATCH, mask)
    weights = scatter(token_weights(mask, example.cu_seqlens, Reduction()).double()[mask], mask)
    loss = dppo_loss(example.logp, rollout_logp, example.advantages, weights, mask, **settings)
    loss.total.backward()
    assert (example.logp.grad[~mask] == 0).all()
    assert not any(figure.requires_grad for figure in loss.metrics.values())
    return loss, example.logp.grad[mask]


def test_divergences_golden():
    example = f1()
    mask = example.action_mask
    rollout_logp = scatter(example.old_logp[mask] - MISMATCH, mask)
    # |e^-1 - e^-1.1| = .035008 and so on; e^-1.1 (-.1) + (1 - e^-1.1) log((1 - e^-1.1) / (1 - e^-1)) = .002673 and so on.
    tv, kl = binary_tv(example.logp, rollout_logp, mask), binary_kl(example.logp, rollout_logp, mask)
    assert_close(tv[mask], _fp64(0.035008, 0.077913, 0.035695, 0.086107, 0.013973), rtol=0, atol=1e-6)
    assert_close(kl[mask], _fp64(0.002673, 0.018588, 0.008875, 0.029161, 0.000487), rtol=0, atol=1e-6)
    assert (tv[~mask] == 0).all() and (kl[~mask] == 0).all()
    # mu = 1/2, pi = 1/4: .5 log 2 + .5 log(.5 / .75)
    half, quarter = _fp64(math.log(0.5)), _fp64(math.log(0.25))
    assert_close(binary_kl(quarter, half, ONE_TOKEN), _fp64(0.143841), rtol=0, atol=1e-6)
    assert_close(binary_tv(quarter, half, ONE_TOKEN), _fp64(0.25))


@pytest.mark.parametrize(
    ("sign", "settings", "expected", "gradient", "masked"),
    [
        # rho = [1.105171, 1.105171, 1.648721], [.904837, .951229]. F1+ pushes every token further away; TV above .05 at
        # tokens 2 and 4: (1.105171 + 3.956931 - 1.236597) / 5, g = -rho A / 5.
        (1.0, {"divergence": "tv", "threshold": 0.05}, 0.765101, [-0.221034, 0.0, -0.329744, 0.0, 0.190246], 0.4),
        (1.0, {"divergence": "kl", "threshold": 0.015}, 0.765101, [-0.221034, 0.0, -0.329744, 0.0, 0.190246], 0.4),
        (1.0, {"divergence": "tv", "threshold": 0.05, "ratio_cap": 1.5}, 0.693715, [-0.221034, 0.0, -0.3, 0.0, 0.190246], 0.4),
        # F1- brings every token back: nothing is masked.
        (-1.0, {"divergence": "tv", "threshold": 0.05}, -0.773114, [0.221034, 0.221034, 0.329744, -0.180967, -0.190246], 0.0),
        (-1.0, {"divergence": "kl", "threshold": 0.0}, -0.773114, [0.221034, 0.221034, 0.329744, -0.180967, -0.190246], 0.0),
    ],
)
def test_dppo_golden(sign, settings, expected, gradient, masked):
    loss, actual = _of_f1(sign, **settings)
    assert_close(loss.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)
    assert_close(loss.metrics["ppo_clip_ratio"], _fp64(masked).squeeze())
    assert_close(loss.metrics["ppo_kl"], _fp64(-0.11).squeeze())  # -(.1 + .1 + .5 - .1 - .05) / 5


@law
@given(scored_batches(), st.sampled_from(["tv", "kl"]), st.floats(0.0, 0.3), st.floats(0.5, 3.0))
def test_dppo_equals_the_reference(batch, divergence, threshold, cap):
    dirty, live = poisoned(batch), batch.action_mask
    logp = torch.where(live, batch.rollout_logp.clamp(max=-0.01), dirty.rollout_logp)
    settings = {"divergence": divergence, "threshold": threshold}
    actual = dppo_loss(logp, dirty.old_logp, dirty.advantages, dirty.weights, live, ratio_cap=cap, **settings)
    tokens = zip(*(x[live].tolist() for x in (logp, batch.old_logp, batch.advantages, batch.weights)), strict=True)
    expected = sum((w * numpy_losses.dppo(new, old, a, cap=cap, **settings) for new, old, a, w in tokens), 0.0)
    assert_close(actual.total, _fp64(expected).squeeze(), rtol=1e-9, atol=1e-12)


@law
@given(scored_batches(), st.sampled_from(["tv", "kl"]))
def test_without_a_threshold_and_a_cap_the_gradient_is_ppos_without_a_clip(batch, divergence):
    gradients = []
    for loss, settings in (
        (dppo_loss, {"divergence": divergence, "threshold": math.inf}),
        (clipped_surrogate, {"clip_low": 1.0, "clip_high": math.inf}),
    ):
        logp = batch.rollout_logp.clone().requires_grad_()
        loss(logp, batch.old_logp, batch.advantages, batch.weights, batch.action_mask, **settings).total.backward()
        gradients.append(logp.grad)
    assert_close(*gradients)


@law
@given(scored_batches(), st.sampled_from(["tv", "kl"]), st.floats(0.0, 0.2))
def test_the_mask_only_stops_what_leads_away(batch, divergence, threshold):
    keep = divergence_mask(
        batch.rollout_logp, batch.old_logp, batch.advantages, batch.action_mask, divergence=divergence, threshold=threshold
    )
    away = (batch.rollout_logp - batch.old_logp) * batch.advantages > 0
    assert not (~keep & ~away & batch.action_mask).any()
    assert not (keep & ~batch.action_mask).any()


def test_a_token_without_advantage_is_kept_and_costs_nothing():
    logp, rollout_logp, one = torch.tensor([-0.1]), torch.tensor([-200.0]), torch.ones(1)
    loss = dppo_loss(logp, rollout_logp, 0 * one, one, ONE_TOKEN, divergence="tv", threshold=0.0)
    assert loss.total == 0 and loss.metrics["ppo_clip_ratio"] == 0


def test_divergences_keep_their_digits_near_one_and_stay_finite_far_apart():
    near, far = torch.tensor([-1e-7]), torch.tensor([-2e-7])  # fp32: 1 - p of 1e-7 and 2e-7
    assert_close(binary_tv(near, far, ONE_TOKEN), torch.tensor([1e-7]), rtol=1e-5, atol=0)
    # mu log(mu / pi) = -1e-7, (1 - mu) log 2 = 1.386294e-7
    assert_close(binary_kl(near, far, ONE_TOKEN), torch.tensor([3.86294e-8]), rtol=1e-3, atol=0)
    one, rare = torch.tensor([0.0]), torch.tensor([-1e4])
    assert binary_tv(one, rare, ONE_TOKEN) == 1 and binary_tv(rare, one, ONE_TOKEN) == 1
    assert binary_kl(one, one, ONE_TOKEN) == 0 and binary_kl(one, rare, ONE_TOKEN) == math.inf
    assert_close(binary_kl(rare, one, ONE_TOKEN), -rare)
    above = torch.tensor([1e-7])  # a probability of one, as an engine rounds it
    assert binary_kl(above, above, ONE_TOKEN) == 0 and binary_tv(above, one, ONE_TOKEN) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize(("log_ratio", "advantage"), [(1e3, 1.0), (-1e3, 1.0), (-1e3, -1.0), (1e3, 0.0)])
def test_extreme_ratios_have_finite_values_and_no_gradient(log_ratio, advantage, divergence, dtype):
    logp = torch.tensor([min(0.0, log_ratio)], dtype=dtype, requires_grad=True)
    rollout_logp, one = torch.tensor([min(0.0, -log_ratio)], dtype=dtype), torch.ones(1)
    loss = dppo_loss(logp, rollout_logp, advantage * one, one, ONE_TOKEN, divergence=divergence, threshold=0.1)
    loss.total.backward()
    assert loss.total.isfinite() and loss.total.dtype == torch.float32
    assert (logp.grad == 0).all()


def test_settings_that_mean_nothing_are_refused_with_their_limits():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"threshold is -0\.1; a divergence is at least 0"):
        dppo_loss(one, one, one, one, ONE_TOKEN, divergence="tv", threshold=-0.1)
    with pytest.raises(ValueError, match=r"ratio_cap is 0\.0; an absolute ratio above 0"):
        dppo_loss(one, one, one, one, ONE_TOKEN, divergence="tv", threshold=0.1, ratio_cap=0.0)
