"""Clip-Cov and KL-Cov: golden values of F1, the slow reference, the draw, and what stands off the mask."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.covariance_losses import clip_cov_loss, kl_cov_loss, token_covariance
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference import numpy_losses
from tests.reference.fixtures import f1


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _of_f1(loss, sign, **settings):
    example = f1(sign=sign)
    weights = token_weights(example.action_mask, example.cu_seqlens, Reduction()).double()
    weights[~example.action_mask] = math.nan
    result = loss(example.logp, example.old_logp, example.advantages, weights, example.action_mask, **settings)
    result.total.backward()
    assert (example.logp.grad[~example.action_mask] == 0).all()
    return result, example.logp.grad[example.action_mask]


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_covariance_golden():
    # logp = [-1, -.2, -2.4], [-.2, -1.3], mean -1.02; A - mean = .8 on the first row, -1.2 on the second.
    example = f1()
    actual = token_covariance(example.logp, example.advantages, example.action_mask)
    assert_close(actual[example.action_mask], _fp64(0.016, 0.656, -1.104, -0.984, 0.336), rtol=0, atol=1e-6)
    assert (actual[~example.action_mask] == 0).all() and not actual.requires_grad


@pytest.mark.parametrize(
    ("sign", "bounds", "expected", "gradient"),
    [
        # Only token 2 (.656) is a candidate: (-1 - .670320 + 1.648721 + .904837) / 5
        (1.0, (0.5, 5.0), 0.176648, [-0.2, 0.0, -0.134064, 0.329744, 0.180967]),
        # F1-: covariances negated, 1.104 on token 3 (kept by the clip: .67 > .6); (1 + 1.349859 - 1.4 - .904837) / 5
        (-1.0, (1.0, 5.0), 0.009004, [0.2, 0.269972, 0.0, 0.0, -0.180967]),
        # .984 on token 4, which PPO's clip holds already (1.65 > 1.4): no candidate, PPO's loss; + .670320 / 5
        (-1.0, (0.98, 1.0), 0.143068, [0.2, 0.269972, 0.134064, 0.0, -0.180967]),
    ],
)
def test_clip_cov_golden(sign, bounds, expected, gradient):
    settings = {"clip_low": 0.4, "clip_high": 0.4, "fraction": 0.2, "cov_low": bounds[0], "cov_high": bounds[1]}
    result, actual = _of_f1(clip_cov_loss, sign, **settings, generator=_seeded())
    assert_close(result.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)
    assert_close(result.metrics["cov_share"], _fp64(0.0 if bounds == (0.98, 1.0) else 0.2).squeeze())


@pytest.mark.parametrize(
    ("sign", "coef", "expected", "gradient"),
    [
        # Token 2 is the highest; -rho A everywhere, + |.3|: (-1 - 1.349859 + .3 - .670320 + 1.648721 + .904837) / 5
        (1.0, 1.0, -0.033324, [-0.2, -0.069972, -0.134064, 0.329744, 0.180967]),
        # F1-: token 3, + 2 |-.4| with slope -2: (1 + 1.349859 + .670320 + .8 - 1.648721 - .904837) / 5
        (-1.0, 2.0, 0.253324, [0.2, 0.269972, 0.134064 - 0.4, -0.329744, -0.180967]),
    ],
)
def test_kl_cov_golden(sign, coef, expected, gradient):
    result, actual = _of_f1(kl_cov_loss, sign, fraction=0.2, coef=coef)
    assert_close(result.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)
    assert_close(result.metrics["cov_share"], _fp64(0.2).squeeze())


def _arguments(batch):
    return batch.rollout_logp, batch.old_logp, batch.advantages, batch.weights, batch.action_mask


@law
@given(scored_batches(), st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_covariances_and_kl_cov_equal_the_reference(batch, fraction, coef):
    live = batch.action_mask
    if not live.any():
        return
    logp, old_logp, advantages, weights = (x[live].tolist() for x in _arguments(batch)[:4])
    covariance = _fp64(*numpy_losses.covariance(logp, advantages))
    assert_close(token_covariance(batch.rollout_logp, batch.advantages, live)[live], covariance)
    per_token = numpy_losses.kl_cov(logp, old_logp, advantages, fraction=fraction, coef=coef)
    expected = sum(w * x for w, x in zip(weights, per_token, strict=True))
    actual = kl_cov_loss(*_arguments(poisoned(batch)), fraction=fraction, coef=coef)
    assert_close(actual.total, _fp64(expected).squeeze(), rtol=1e-9, atol=1e-12)


@law
@given(scored_batches(), st.integers(0, 100))
def test_poison_off_the_mask_changes_no_bit(batch, seed):
    settings = {"clip_low": 0.2, "clip_high": 0.2, "fraction": 0.3, "cov_low": 0.0, "cov_high": 5.0}
    for loss in (
        lambda each: clip_cov_loss(*_arguments(each), **settings, generator=_seeded(seed)),
        lambda each: kl_cov_loss(*_arguments(each), fraction=0.3, coef=1.0),
    ):
        clean, dirty = loss(batch), loss(poisoned(batch))
        assert_close(dirty.total, clean.total, rtol=0, atol=0)
        assert_close(dirty.metrics, clean.metrics, rtol=0, atol=0)


def _wide(seed=0):
    return scored_batch([[True] * 40, [True, False] * 20], Reduction(), seed=seed)


@pytest.mark.parametrize(("fraction", "chosen"), [(0.0, 1), (0.05, 3), (0.099, 5), (1.0, None)])
def test_the_draw_takes_its_quota_among_the_candidates(fraction, chosen):
    batch = _wide()
    covariance = token_covariance(batch.rollout_logp, batch.advantages, batch.action_mask)
    free = {"clip_low": 1.0, "clip_high": math.inf}
    settings = {**free, "fraction": fraction, "cov_low": 0.1, "cov_high": math.inf}
    held = clip_cov_loss(*_arguments(batch), **settings, generator=_seeded())
    candidates = int((covariance > 0.1).sum())
    assert 5 < candidates < 60
    assert round(float(held.metrics["cov_share"]) * 60) == (candidates if chosen is None else chosen)


def test_the_draw_is_the_generators_and_differs_between_seeds():
    batch = _wide()
    settings = {"clip_low": 0.2, "clip_high": 0.2, "fraction": 0.05, "cov_low": 0.0, "cov_high": math.inf}
    totals = {seed: float(clip_cov_loss(*_arguments(batch), **settings, generator=_seeded(seed)).total) for seed in range(4)}
    torch.manual_seed(123)  # the global generator has no say
    assert totals == {seed: float(clip_cov_loss(*_arguments(batch), **settings, generator=_seeded(seed)).total) for seed in range(4)}
    assert len(set(totals.values())) == 4


def test_without_candidates_clip_cov_is_ppo():
    batch = _wide()
    settings = {"clip_low": 0.2, "clip_high": 0.2}
    held = clip_cov_loss(*_arguments(batch), **settings, fraction=0.5, cov_low=1e9, cov_high=math.inf, generator=_seeded())
    assert_close(held.total, clipped_surrogate(*_arguments(batch), **settings).total, rtol=0, atol=0)


def test_without_action_tokens_the_loss_is_zero_and_attached():
    batch = poisoned(scored_batch([[False, False]], Reduction(), seed=0))
    logp = batch.rollout_logp.requires_grad_()
    loss = kl_cov_loss(logp, *_arguments(batch)[1:], fraction=0.5, coef=1.0)
    settings = {"clip_low": 0.2, "clip_high": 0.2, "fraction": 0.5, "cov_low": 0.0, "cov_high": 5.0}
    loss = loss + clip_cov_loss(logp, *_arguments(batch)[1:], **settings, generator=_seeded())
    loss.total.backward()
    assert loss.total == 0 and (logp.grad == 0).all()
