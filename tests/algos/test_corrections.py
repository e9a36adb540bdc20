"""Corrections between engine and learner: golden values of F1, the slow reference, laws, and refusals."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.batch import select
from hone.algos.corrections import (
    correction_weights,
    log_weights,
    off_policy_sequence_mask,
    second_moment_mask,
    self_normalised,
    sequence_mask_tis,
    weights_of_kept,
)
from hone.algos.decoupled import decoupled_surrogate, proximal_approximation
from hone.algos.mismatch import effective_sample_size, mismatch_figures, sample_size_figures
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction, token_weights
from hone.algos.soft_losses import scaled_advantages
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference import numpy_corrections, numpy_losses
from tests.reference.fixtures import F1, f1, scatter

NAN = math.nan
TOKEN, SEQUENCE = Reduction(), Reduction(over="sequence")
LEVELS, MODES = ["token", "sequence", "geometric"], ["truncate", "clip", "mask"]
PPO = {"clip_low": 0.2, "clip_high": 0.2}


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# u = old_logp - rollout_logp of F1: w = e^u = [1.105171, .818731, 2.459603], [.548812, 1.051271].
MISMATCH = _fp64(0.1, -0.2, 0.9, -0.6, 0.05)


def _rollout(example: F1):
    return scatter(example.old_logp[example.action_mask] - MISMATCH, example.action_mask)


def _weights(example: F1, reduction):
    mask = example.action_mask
    return scatter(token_weights(mask, example.cu_seqlens, reduction).double()[mask], mask)


def _correction(example: F1, **settings):
    arguments = (example.old_logp, _rollout(example), example.action_mask, example.cu_seqlens)
    correction = correction_weights(*arguments, **settings)
    assert (correction[~example.action_mask] == 0).all()
    return correction


@pytest.mark.parametrize(
    ("level", "mode", "low", "high", "expected"),
    [
        ("token", "truncate", 0.0, math.inf, [1.105171, 0.818731, 2.459603, 0.548812, 1.051271]),
        ("token", "truncate", 0.0, 2.0, [1.105171, 0.818731, 2.0, 0.548812, 1.051271]),
        ("token", "clip", 0.6, 2.0, [1.105171, 0.818731, 2.0, 0.6, 1.051271]),
        ("token", "mask", 0.6, 2.0, [1.105171, 0.818731, 0.0, 0.0, 1.051271]),
        ("token", "mask", 0.0, 2.0, [1.105171, 0.818731, 0.0, 0.548812, 1.051271]),
        ("sequence", "truncate", 0.0, math.inf, [2.225541] * 3 + [0.576950] * 2),  # e^.8, e^-.55
        ("sequence", "truncate", 0.0, 2.0, [2.0] * 3 + [0.576950] * 2),
        ("sequence", "mask", 0.0, 2.0, [0.0] * 3 + [0.576950] * 2),
        ("geometric", "truncate", 0.0, math.inf, [1.305605] * 3 + [0.759572] * 2),  # e^(.8 / 3), e^(-.55 / 2)
        ("geometric", "mask", 0.8, 1.5, [1.305605] * 3 + [0.0] * 2),
        ("geometric", "clip", 0.8, 1.2, [1.2] * 3 + [0.8] * 2),
    ],
)
def test_correction_weights_golden(level, mode, low, high, expected):
    example = f1()
    correction = _correction(example, level=level, mode=mode, low=low, high=high)
    assert_close(correction[example.action_mask], _fp64(*expected), rtol=0, atol=1e-6)


def _surrogate(example, correction, weights):
    advantages = scaled_advantages(example.advantages, correction, example.action_mask)
    loss = clipped_surrogate(example.logp, example.old_logp, advantages, weights, example.action_mask, **PPO)
    loss.total.backward()
    return loss.total.detach(), example.logp.grad[example.action_mask]


@pytest.mark.parametrize(
    ("settings", "shrink", "expected", "gradient"),
    [
        # PPO's losses [-1, -1.2, -.670320], [1.648721, .904837] times the weight, over 5.
        ({"mode": "truncate", "high": 2.0}, False, -0.314444, [-0.221034, 0.0, -0.268128, 0.180967, 0.190246]),
        ({"mode": "mask", "low": 0.6, "high": 2.0}, False, -0.227284, [-0.221034, 0.0, 0.0, 0.0, 0.190246]),
        # Three tokens are left: over 3.
        ({"mode": "mask", "low": 0.6, "high": 2.0}, True, -0.378806, [-0.368390, 0.0, 0.0, 0.0, 0.317076]),
    ],
)
def test_corrected_ppo_golden(settings, shrink, expected, gradient):
    example = f1()
    correction = _correction(example, level="token", **settings)
    weights = _weights(example, TOKEN)
    if shrink:
        weights = weights_of_kept(correction, example.action_mask, example.cu_seqlens, reduction=TOKEN).double()
    total, actual = _surrogate(example, correction, weights)
    assert_close(total, _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "cap", "expected"),
    [
        (0.8, 1.5, 2.0, [1.105171, 0.818731, 2.0, 0.0, 0.0]),  # the first row's mean passes; its 2.459603 is truncated
        (0.5, 1.2, 2.0, [0.0, 0.0, 0.0, 0.548812, 1.051271]),
        (0.5, 1.5, 1.0, [1.0, 0.818731, 1.0, 0.548812, 1.0]),
    ],
)
def test_sequence_mask_tis_golden(low, high, cap, expected):
    example = f1()
    arguments = (example.old_logp, _rollout(example), example.action_mask, example.cu_seqlens)
    assert_close(sequence_mask_tis(*arguments, low=low, high=high, cap=cap), _on(example, expected), rtol=0, atol=1e-6)


def _on(example, live):
    return torch.nan_to_num(scatter(_fp64(*live), example.action_mask))


@pytest.mark.parametrize(
    ("sign", "threshold", "expected"),
    [
        # mean(rollout_logp - logp) = -.7 / 3 = -.233333 and .15 / 2 = .075.
        (1.0, 0.0, [1, 1, 1, 0, 0]),  # the second row is bad and was left behind
        (1.0, 0.1, [1, 1, 1, 1, 1]),
        (-1.0, 0.0, [1, 1, 1, 1, 1]),  # the bad row has become likelier; the good one may be left behind
        (-1.0, -0.3, [0, 0, 0, 1, 1]),
    ],
)
def test_opsm_golden(sign, threshold, expected):
    example = f1(sign=sign)
    arguments = (example.logp, _rollout(example), example.advantages, example.action_mask, example.cu_seqlens)
    actual = off_policy_sequence_mask(*arguments, threshold=threshold)
    assert_close(actual, _on(example, map(float, expected)))
    assert not actual.requires_grad


def test_opsm_keeps_rows_without_advantage():
    zeros, mask, cu_seqlens = torch.zeros(2), torch.tensor([True, True]), torch.tensor([0, 1, 2], dtype=torch.int32)
    left_behind = off_policy_sequence_mask(zeros - 9, zeros, torch.tensor([0.0, -1.0]), mask, cu_seqlens, threshold=0.5)
    assert left_behind.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("weight_cap", "expected", "gradient"),
    [
        (math.inf, -0.376060, [-0.221034, 0.0, -0.329744, 0.180967, 0.190246]),
        (2.0, -0.314444, [-0.221034, 0.0, -0.268128, 0.180967, 0.190246]),  # TIS
    ],
)
def test_decoupled_ppo_golden(weight_cap, expected, gradient):
    example = f1()
    arguments = (example.logp, example.old_logp, _rollout(example), example.advantages, _weights(example, TOKEN), example.action_mask)
    loss = decoupled_surrogate(*arguments, **PPO, weight_cap=weight_cap)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    assert_close(example.logp.grad[example.action_mask], _fp64(*gradient), rtol=0, atol=1e-6)
    assert (example.logp.grad[~example.action_mask] == 0).all()


def test_proximal_approximation_golden():
    # Policy version 4; versions 4, 3, 2, 0 and unknown: lags 0, 1, 2, 4, so a = 0, 0, 1/2, 3/4, 0; behaviour -1, policy -2.
    mask = torch.tensor([True, True, True, True, True, False])
    version = torch.tensor([4, 3, 2, 0, -1, 0])
    logp = scatter(-2 * torch.ones(5, dtype=torch.float64), mask).requires_grad_()
    proximal = proximal_approximation(logp, scatter(-torch.ones(5, dtype=torch.float64), mask), version, mask, policy_version=4)
    assert_close(proximal, _fp64(-1.0, -1.0, -1.5, -1.75, -1.0, 0.0))
    assert not proximal.requires_grad


def test_effective_sample_size_golden():
    example = f1()

    def share(reduction, **settings):
        correction = _correction(example, mode="truncate", **settings)
        return effective_sample_size(sample_size_figures(correction, _weights(example, reduction), example.action_mask))

    # 5.983588^2 / (5 * 9.347735); then with 2 for 2.459603; then rows (2 + .576950)^2 / (2 * (4 + .332871))
    assert_close(share(TOKEN, level="token", high=math.inf), _fp64(0.766032).squeeze(), rtol=0, atol=1e-6)
    assert_close(share(TOKEN, level="token", high=2.0), _fp64(0.836230).squeeze(), rtol=0, atol=1e-6)
    assert_close(share(SEQUENCE, level="sequence", high=2.0), _fp64(0.766313).squeeze(), rtol=0, atol=1e-6)


def test_mismatch_figures_golden():
    example = f1()
    arguments = (example.old_logp, _rollout(example))
    by_token = mismatch_figures(*arguments, _weights(example, TOKEN), example.action_mask, example.cu_seqlens)
    by_row = mismatch_figures(*arguments, _weights(example, SEQUENCE), example.action_mask, example.cu_seqlens)
    expected = {
        "mismatch_k1": (-0.05, (-0.266667 + 0.275) / 2),
        "mismatch_k3": (0.146718, (0.194502 + 0.075041) / 2),
        "mismatch_chi2": (0.869547, (4.941370 / 3 - 0.593635 / 2) / 2),  # sums of e^2u - 1 along the rows
        "mismatch_perplexity_ratio": ((3 * 0.765928 + 2 * 1.316531) / 5, (0.765928 + 1.316531) / 2),
    }
    for name, (token, row) in expected.items():
        assert_close(by_token[name], _fp64(token).squeeze(), rtol=0, atol=1e-6)
        assert_close(by_row[name], _fp64(row).squeeze(), rtol=0, atol=1e-6)


def _masks(batch):
    return [batch.action_mask[start:stop].tolist() for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]


@law
@given(scored_batches(), st.sampled_from(LEVELS), st.sampled_from(MODES), st.floats(0.0, 1.0), st.floats(1.0, 3.0))
def test_correction_weights_equal_the_reference_whatever_stands_off_the_mask(batch, level, mode, low, high):
    low = 0.0 if mode == "truncate" else low
    dirty, masks = poisoned(batch), _masks(batch)
    settings = {"level": level, "mode": mode, "low": low, "high": high}
    actual = correction_weights(dirty.old_logp, dirty.rollout_logp, dirty.action_mask, dirty.cu_seqlens, **settings)
    rows = (numpy_losses.rows_of(x.tolist(), masks) for x in (batch.old_logp, batch.rollout_logp))
    expected = [w for row in numpy_losses.correction(*rows, **settings) for w in row]
    assert_close(actual[batch.action_mask], _fp64(*expected))
    assert (actual[~batch.action_mask] == 0).all()


@law
@given(scored_batches(), st.sampled_from(LEVELS))
def test_an_open_mask_is_the_bare_weight_and_equal_policies_need_none(batch, level):
    arguments = (batch.old_logp, batch.rollout_logp, batch.action_mask, batch.cu_seqlens)
    bare = torch.where(batch.action_mask, log_weights(*arguments, level=level).exp(), 0.0)
    for mode in MODES:
        assert_close(correction_weights(*arguments, level=level, mode=mode, high=math.inf), bare)
        same = correction_weights(batch.old_logp, batch.old_logp, *arguments[2:], level=level, mode=mode, high=1.0)
        assert_close(same, batch.action_mask.double(), rtol=0, atol=0)
    gated = sequence_mask_tis(*arguments, low=0.0, high=math.inf, cap=math.inf)
    assert_close(gated, correction_weights(*arguments, level="token", mode="truncate", high=math.inf))


@law
@given(scored_batches(), st.data())
def test_corrections_and_figures_do_not_see_how_rows_are_ordered_and_cut(batch, data):
    order = data.draw(st.permutations(range(batch.rows)))
    at = data.draw(st.integers(0, batch.rows))
    parts = [select(batch, order[:at]), select(batch, order[at:])]

    def figures(part):
        correction = correction_weights(
            part.old_logp, part.rollout_logp, part.action_mask, part.cu_seqlens, level="sequence", mode="truncate", high=2.0
        )
        mismatch = mismatch_figures(part.old_logp, part.rollout_logp, part.weights, part.action_mask, part.cu_seqlens)
        return {**mismatch, **sample_size_figures(correction, part.weights, part.action_mask)}

    whole, first, second = figures(batch), figures(parts[0]), figures(parts[1])
    assert_close({name: first[name] + second[name] for name in whole}, whole)
    assert_close(figures(poisoned(batch)), whole, rtol=0, atol=0)


@law
@given(scored_batches(), st.floats(0.01, 100.0))
def test_the_effective_sample_size_is_one_iff_the_weights_are_equal(batch, size):
    live = int(batch.action_mask.sum())
    equal = torch.full_like(batch.weights, size)
    share = effective_sample_size(sample_size_figures(equal, batch.weights, batch.action_mask))
    assert_close(share, _fp64(1.0 if live else 0.0).squeeze())
    if live > 1:
        unequal = equal * (1 + torch.arange(equal.numel(), dtype=torch.float64))
        share = effective_sample_size(sample_size_figures(unequal, batch.weights, batch.action_mask))
        assert 0 < share < 1 - 1e-6


@law
@given(scored_batches())
def test_decoupled_ppo_with_behaviour_for_proximal_is_ppo(batch):
    rest = (batch.advantages, batch.weights, batch.action_mask)
    plain = clipped_surrogate(batch.rollout_logp, batch.old_logp, *rest, **PPO)
    decoupled = decoupled_surrogate(batch.rollout_logp, batch.old_logp, batch.old_logp, *rest, **PPO)
    assert_close(decoupled.total, plain.total, rtol=0, atol=0)
    assert_close(decoupled.metrics, plain.metrics, rtol=0, atol=0)


@law
@given(scored_batches())
def test_the_proximal_approximation_runs_from_behaviour_to_policy(batch):
    arguments = (batch.rollout_logp, batch.old_logp)
    for version, expected in ((9, batch.old_logp), (10, batch.old_logp), (-1, batch.old_logp), (-(10**15), batch.old_logp)):
        proximal = proximal_approximation(*arguments, torch.full_like(batch.version, version), batch.action_mask, policy_version=10)
        assert_close(proximal, expected, rtol=0, atol=0)
    old = torch.zeros_like(batch.version)  # a lag of 10^12 versions: a is one, and then the ratio is
    assert_close(proximal_approximation(*arguments, old, batch.action_mask, policy_version=10**12), batch.rollout_logp)


@law
@given(scored_batches(), st.sampled_from([TOKEN, SEQUENCE, Reduction(over="constant", length=7)]))
def test_the_weights_of_kept_tokens_are_those_of_a_smaller_mask(batch, reduction):
    correction = torch.where(batch.values > 0, 1.5, 0.0).double()
    kept = batch.action_mask & (batch.values > 0)
    dirty = torch.where(batch.action_mask, correction, math.nan)
    weights = weights_of_kept(dirty, batch.action_mask, batch.cu_seqlens, reduction=reduction)
    assert_close(weights, token_weights(kept, batch.cu_seqlens, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_overflow_are_bounded_or_rejected_and_never_nan(dtype):
    mask, cu_seqlens = torch.tensor([True, True]), torch.tensor([0, 2], dtype=torch.int32)
    old_logp, rollout_logp = torch.tensor([0.0, -1.0], dtype=dtype), torch.tensor([-1e3, -1.0], dtype=dtype)
    one = torch.ones(2)
    for level, mode in itertools.product(LEVELS, MODES):
        correction = correction_weights(old_logp, rollout_logp, mask, cu_seqlens, level=level, mode=mode, high=2.0)
        assert correction.isfinite().all() and correction.dtype == torch.float32
        rejected = [0.0, 1.0] if level == "token" else [0.0, 0.0]
        capped = [2.0, 1.0] if level == "token" else [2.0, 2.0]
        assert correction.tolist() == (rejected if mode == "mask" else capped)
        logp = rollout_logp.float().requires_grad_()
        advantages = scaled_advantages(one, correction, mask)
        loss = clipped_surrogate(logp, old_logp, advantages, one / 2, mask, **PPO)
        loss.total.backward()
        assert loss.total.isfinite() and logp.grad.isfinite().all()
    bare = correction_weights(old_logp, rollout_logp, mask, cu_seqlens, level="token", mode="truncate", high=math.inf)
    assert effective_sample_size(sample_size_figures(bare, one / 2, mask)) == 0
    assert scaled_advantages(0 * one, bare, mask).tolist() == [0.0, 0.0]  # 0 * inf
    decoupled = decoupled_surrogate(old_logp, old_logp, rollout_logp, 0 * one, one / 2, mask, **PPO)
    assert decoupled.total == 0


def test_a_rejected_tokens_ratio_cannot_overflow_the_loss():
    # A bad token 200 nats above the old policy, without a dual clip: e^200 is inf in fp32, unless it is rejected.
    logp, zeros, one, mask = torch.tensor([200.0], requires_grad=True), torch.zeros(1), torch.ones(1), torch.tensor([True])
    loss = clipped_surrogate(logp, zeros, scaled_advantages(-one, zeros, mask), one, mask, **PPO)
    loss.total.backward()
    assert loss.total == 0 and logp.grad == 0


def test_a_step_without_action_tokens_is_neutral():
    batch = poisoned(scored_batch([[False], [False, False]], TOKEN, seed=0))
    batch = dataclasses.replace(batch, weights=torch.where(batch.action_mask, batch.weights, math.nan))
    for level in LEVELS:
        correction = correction_weights(
            batch.old_logp, batch.rollout_logp, batch.action_mask, batch.cu_seqlens, level=level, mode="mask", high=2.0
        )
        assert (correction == 0).all()
    assert effective_sample_size(sample_size_figures(correction, batch.weights, batch.action_mask)) == 0
    figures = mismatch_figures(batch.old_logp, batch.rollout_logp, batch.weights, batch.action_mask, batch.cu_seqlens)
    assert all(figure == 0 for figure in figures.values())


def test_bounds_that_mean_nothing_are_refused_with_their_limits():
    one, mask, cu_seqlens = torch.ones(1), torch.tensor([True]), torch.tensor([0, 1], dtype=torch.int32)
    arguments = (one, one, mask, cu_seqlens)
    with pytest.raises(ValueError, match=r"weight bounds \[2\.0, 0\.5\]: need 0 <= low <= high"):
        correction_weights(*arguments, level="token", mode="mask", low=2.0, high=0.5)
    with pytest.raises(ValueError, match=r"low is 0\.5, but 'truncate' has no lower bound; choose 'clip'"):
        correction_weights(*arguments, level="token", mode="truncate", low=0.5, high=2.0)
    with pytest.raises(ValueError, match=r"weight bounds \[0\.0, -1\.0\]"):
        decoupled_surrogate(one, one, one, one, one, mask, **PPO, weight_cap=-1.0)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # u^2 = .01, .04, .81, .36, .0025: means .2445, .103125 without the widest, .0175 without the next, .00625, .0025.
        (0.25, [1, 1, 1, 1, 1]),
        (0.2, [1, 1, 0, 1, 1]),
        (0.04, [1, 1, 0, 0, 1]),
        (0.01, [1, 0, 0, 0, 1]),
        (1e-9, [0, 0, 0, 0, 1]),  # one always stays
    ],
)
def test_the_second_moment_mask_golden(threshold, expected):
    example = f1()
    kept = second_moment_mask(example.old_logp, _rollout(example), example.action_mask, threshold=threshold)
    assert_close(kept, _on(example, map(float, expected)), rtol=0, atol=0)


@law
@given(scored_batches(), st.floats(1e-6, 4.0))
def test_what_is_decided_over_a_rollout_equals_its_reference(batch, threshold):
    dirty, mask = poisoned(batch), batch.action_mask
    kept = second_moment_mask(dirty.old_logp, dirty.rollout_logp, mask, threshold=threshold)
    differences = (batch.old_logp - batch.rollout_logp)[mask].tolist()
    assert kept[mask].tolist() == numpy_corrections.second_moment_mask(differences, threshold=threshold)
    corrections = torch.where(mask, torch.where(batch.values > 0.5, 0.0, batch.values.exp()), NAN)
    normalised = self_normalised(corrections, dirty.weights, mask)
    expected = numpy_corrections.self_normalised(corrections[mask].tolist(), batch.weights[mask].tolist())
    assert_close(normalised[mask], _fp64(*expected))
    assert (kept[~mask] == 0).all() and (normalised[~mask] == 0).all()
    assert_close(self_normalised(1e-3 * corrections, 7 * batch.weights, mask), normalised)


@pytest.mark.parametrize("threshold", [0.0, -1.0, NAN])
def test_a_bound_on_squares_is_above_zero(threshold):
    with pytest.raises(ValueError, match=r"threshold is .*; M2PO bounds a mean of squares, which needs one above 0 \(0.04"):
        second_moment_mask(torch.ones(1), torch.ones(1), torch.tensor([True]), threshold=threshold)


def test_an_overflowed_weight_times_a_ratio_of_zero_is_zero():
    logp = torch.tensor([-1e4], requires_grad=True)
    loss = decoupled_surrogate(logp, torch.zeros(1), torch.tensor([-1e3]), torch.ones(1), torch.ones(1), torch.tensor([True]), **PPO)
    loss.total.backward()
    assert loss.total == 0 and logp.grad == 0
