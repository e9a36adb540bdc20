"""GSPO, GSPO-token and GMPO: golden values of F1, the slow reference, their identities, and extreme ratios."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import row_sums, spread
from hone.algos.batch import select
from hone.algos.reduce import Reduction, token_weights
from hone.algos.sequence_losses import gmpo_loss, gspo_loss, gspo_token_loss
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference import numpy_losses
from tests.reference.fixtures import f1

# Mean log-ratios (0 + .3 - .4) / 3 and (.5 - .1) / 2: s = [.967216, 1.221403], so with nothing clipped
# L = (-.967216 + 1.221403) / 2 and g = -s A / (2 T_i).
FREE = [-0.161203, -0.161203, -0.161203, 0.305351, 0.305351]


def _of_f1(loss, sign, **bounds):
    example = f1(sign=sign)
    weights = token_weights(example.action_mask, example.cu_seqlens, Reduction(over="sequence")).double()
    weights[~example.action_mask] = math.nan
    result = loss(example.logp, example.old_logp, example.advantages, weights, example.action_mask, example.cu_seqlens, **bounds)
    result.total.backward()
    assert (example.logp.grad[~example.action_mask] == 0).all()
    return result, example.logp.grad[example.action_mask]


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
@pytest.mark.parametrize(
    ("sign", "clip_low", "clip_high", "expected", "gradient", "clipped"),
    [
        (1.0, 3e-4, 4e-4, 0.127093, FREE, 0.0),  # A > 0 with s < 1, A < 0 with s > 1: never clipped
        (1.0, 0.3, 0.3, 0.127093, FREE, 0.0),
        (-1.0, 3e-4, 4e-4, -0.000350, [0.0] * 5, 1.0),  # (.9997 - 1.0004) / 2
        (-1.0, 0.1, 0.2, -0.116392, [0.161203] * 3 + [0.0] * 2, 0.5),  # (.967216 - 1.2) / 2
        (-1.0, 0.1, 0.3, -0.127093, [-g for g in FREE], 0.0),
    ],
)
def test_gspo_golden(loss, sign, clip_low, clip_high, expected, gradient, clipped):
    result, actual = _of_f1(loss, sign, clip_low=clip_low, clip_high=clip_high)
    assert_close(result.total.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(actual, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(result.metrics["ppo_clip_ratio"], torch.tensor(clipped, dtype=torch.float64))
    assert_close(result.metrics["ppo_kl"], torch.tensor(-1 / 12, dtype=torch.float64))  # -(-.1 / 3 + .4 / 2) / 2


@pytest.mark.parametrize(
    ("sign", "bounds", "expected", "gradient", "clipped"),
    [
        # A > 0 is bounded above only, A < 0 below only: nothing clips, GSPO's numbers.
        (1.0, (0.35, 0.35), 0.127093, FREE, 0.0),
        # y = [0, .3, -.35], mean -1/60, e^ = .983471; y = [.35, -.1], mean .125, e^ = 1.133148; (.983471 - 1.133148) / 2.
        (-1.0, (0.35, 0.35), -0.074838, [0.163912, 0.163912, 0.0, 0.0, -0.283287], 5 / 12),
        # y = [0, .3, -.4]: .967216; (.967216 - 1.133148) / 2.
        (-1.0, (0.5, 0.35), -0.082966, [0.161203] * 3 + [0.0, -0.283287], 1 / 4),
    ],
)
def test_gmpo_golden(sign, bounds, expected, gradient, clipped):
    result, actual = _of_f1(gmpo_loss, sign, log_clip_low=bounds[0], log_clip_high=bounds[1])
    assert_close(result.total.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(actual, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(result.metrics["ppo_clip_ratio"], torch.tensor(clipped, dtype=torch.float64))
    assert_close(result.metrics["ppo_kl"], torch.tensor(-1 / 12, dtype=torch.float64))


def test_a_token_without_advantage_counts_as_ratio_one_in_gmpo():
    # y = [.2, 0] (the sign of no advantage is zero): G = e^.1 = 1.105171, L = -G / 2, g = -G / 4 and nothing.
    logp, mask, cu_seqlens = _fp64(0.2, 5.0).requires_grad_(), torch.tensor([True, True]), torch.tensor([0, 2], dtype=torch.int32)
    half = _fp64(0.5, 0.5)
    loss = gmpo_loss(logp, 0 * half, _fp64(1.0, 0.0), half, mask, cu_seqlens, log_clip_low=0.4, log_clip_high=0.4)
    loss.total.backward()
    assert_close(loss.total.detach(), _fp64(-0.552585).squeeze(), rtol=0, atol=1e-6)
    assert_close(logp.grad, _fp64(-0.276293, 0.0), rtol=0, atol=1e-6)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _masks(batch):
    return [batch.action_mask[start:stop].tolist() for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]


@law
@given(scored_batches(), st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_sequence_losses_equal_the_reference(batch, low, high):
    masks = _masks(batch)
    rows = [numpy_losses.rows_of(x.tolist(), masks) for x in (batch.rollout_logp, batch.old_logp, batch.advantages)]
    weights = [w for row in numpy_losses.rows_of(batch.weights.tolist(), masks) for w in row]
    for loss, reference, names in (
        (gspo_loss, numpy_losses.gspo, ("clip_low", "clip_high")),
        (gspo_token_loss, numpy_losses.gspo, ("clip_low", "clip_high")),
        (gmpo_loss, numpy_losses.gmpo, ("log_clip_low", "log_clip_high")),
    ):
        bounds = dict(zip(names, (low, high), strict=True))
        dirty = poisoned(batch)
        actual = loss(dirty.rollout_logp, dirty.old_logp, dirty.advantages, dirty.weights, dirty.action_mask, dirty.cu_seqlens, **bounds)
        live = [row for row in zip(*rows, strict=True) if row[0]]
        per_token = [x for row in reference(*map(list, zip(*live, strict=True)), **bounds) for x in row] if live else []
        expected = sum(w * x for w, x in zip(weights, per_token, strict=True))
        assert_close(actual.total, torch.tensor(float(expected), dtype=torch.float64), rtol=1e-9, atol=1e-12)


def _gradient(loss, batch, advantages, weights, **bounds):
    logp = batch.rollout_logp.clone().requires_grad_()
    result = loss(logp, batch.old_logp, advantages, weights, batch.action_mask, batch.cu_seqlens, **bounds)
    result.total.backward()
    return result, logp.grad


def _row_constant(batch):
    """The batch's numbers made constant along each row."""
    per_row = row_sums(batch.advantages, batch.action_mask, batch.cu_seqlens)
    return spread(per_row, batch.action_mask, batch.cu_seqlens)


@law
@given(scored_batches(), st.floats(0.0, 0.3), st.floats(0.0, 0.3))
def test_gspo_is_its_token_form_for_advantages_constant_along_rows(batch, clip_low, clip_high):
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    sequence, gradient = _gradient(gspo_loss, batch, _row_constant(batch), batch.weights, **bounds)
    token, token_gradient = _gradient(gspo_token_loss, batch, _row_constant(batch), batch.weights, **bounds)
    assert_close(token.total, sequence.total)
    assert_close(token.metrics, sequence.metrics)
    assert_close(token_gradient, gradient)


@law
@given(scored_batches())
def test_gspo_is_gmpo_where_nothing_clips(batch):
    advantages = _row_constant(batch)
    free, gradient = _gradient(gspo_loss, batch, advantages, batch.weights, clip_low=1.0, clip_high=math.inf)
    geometric, its_gradient = _gradient(gmpo_loss, batch, advantages, batch.weights, log_clip_low=math.inf, log_clip_high=math.inf)
    assert_close(geometric.total, free.total)
    assert_close(its_gradient, gradient)


@law
@given(scored_batches())
def test_a_token_forms_gradient_is_the_rows_ratio_times_its_own_advantage(batch):
    _, gradient = _gradient(gspo_token_loss, batch, batch.advantages, batch.weights, clip_low=1.0, clip_high=math.inf)
    counts = row_sums(torch.ones_like(batch.weights), batch.action_mask, batch.cu_seqlens).clamp(min=1)
    means = row_sums(batch.rollout_logp - batch.old_logp, batch.action_mask, batch.cu_seqlens) / counts
    ratio = spread(means, batch.action_mask, batch.cu_seqlens).exp()
    assert_close(gradient, -batch.weights * ratio * batch.advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("log_ratio", "advantage"), [(1e3, 1.0), (1e3, 0.0), (-1e3, 0.0), (-1e3, 1.0), (-1e3, -1.0)])
def test_extreme_ratios_have_finite_values_and_no_gradient(log_ratio, advantage, dtype):
    old_logp, weights, mask = torch.zeros(2, dtype=dtype), torch.full((2,), 0.5), torch.tensor([True, True])
    advantages, cu_seqlens = torch.full((2,), advantage, dtype=dtype), torch.tensor([0, 2], dtype=torch.int32)
    for loss, bounds in (
        (gspo_loss, {"clip_low": 0.2, "clip_high": 0.2}),
        (gspo_token_loss, {"clip_low": 0.2, "clip_high": 0.2}),
        (gmpo_loss, {"log_clip_low": 0.4, "log_clip_high": 0.4}),
    ):
        logp = torch.full((2,), log_ratio, dtype=dtype, requires_grad=True)
        result = loss(logp, old_logp, advantages, weights, mask, cu_seqlens, **bounds)
        result.total.backward()
        assert result.total.isfinite() and result.total.dtype == torch.float32
        assert (logp.grad == 0).all()


def test_a_row_without_action_tokens_is_left_out():
    batch = scored_batch([[True, True], [False, False], [True]], Reduction(over="sequence"), seed=1)
    without = select(batch, [0, 2])
    for loss, bounds in ((gspo_loss, {"clip_low": 0.2, "clip_high": 0.2}), (gmpo_loss, {"log_clip_low": 0.4, "log_clip_high": 0.4})):
        values = [_gradient(loss, each, each.advantages, each.weights, **bounds)[0].total for each in (poisoned(batch), without)]
        assert_close(values[0], values[1])


def test_a_cut_within_a_row_changes_the_loss_as_the_docstring_warns():
    # Log-ratios .5 and -.5: s = 1 for the row, e^.5 and e^-.5 for its halves; -(e^.5 + e^-.5) / 2 = -1.127626.
    logp, one, mask = torch.tensor([0.5, -0.5]), torch.ones(2), torch.tensor([True, True])
    for edges, expected in (([0, 2], -1.0), ([0, 1, 2], -1.127626)):
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        loss = gspo_loss(logp, 0 * one, one, one / 2, mask, cu_seqlens, clip_low=1.0, clip_high=math.inf)
        assert_close(loss.total, torch.tensor(expected))


def test_a_long_rows_mean_is_summed_in_double_precision():
    # 300 000 fp32 log-ratios of one size: their mean is that size, which sums in fp32 miss.
    tokens = 300_000
    logp, one, mask = torch.full((tokens,), 3.1e-4), torch.ones(tokens), torch.ones(tokens, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    loss = gspo_loss(logp, torch.zeros(tokens), one, one / tokens, mask, cu_seqlens, clip_low=1.0, clip_high=math.inf)
    assert_close(loss.metrics["ppo_kl"], torch.tensor(-3.1e-4), rtol=1e-6, atol=0)
