"""Functions that had no slow reference, against theirs, on batches that hypothesis invents with poison off the mask."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import group_centred, whiten
from hone.algos.corrections import off_policy_sequence_mask, sequence_mask_tis, weights_of_kept
from hone.algos.covariance_losses import clip_cov_loss
from hone.algos.decoupled import decoupled_surrogate, proximal_approximation
from hone.algos.distillation import forward_kl, on_policy_distillation_advantages, tempered_logp
from hone.algos.group_baselines import greedy_centred, pass_at_k
from hone.algos.kl import kl_loss
from hone.algos.kto import anchor_sums, kl_anchor
from hone.algos.lambda_schedules import length_adaptive_lambda
from hone.algos.mismatch import effective_sample_size, mismatch_figures, sample_size_figures
from hone.algos.pairs import pair_weights, row_logp, row_mean_logp
from hone.algos.policy_losses import entropy_bonus
from hone.algos.preference import dpo, log1mexp, odds_ratio, rpo
from hone.algos.reward_models import log_exp, reward_centre
from hone.algos.shaping import RunningMoments, clip_scores, normalise_scores, overlong_penalty, rescored, stop_properly, update_moments
from hone.algos.soft_losses import reinforce_loss
from hone.algos.supervised import nll
from hone.algos.trust_region import binary_kl, binary_tv, divergence_mask
from hone.algos.turn_credit import gigpo
from hone.algos.value_losses import squared_value_loss
from tests.algos.strategies import law, poisoned, reductions, scored_batches
from tests.reference import numpy_algos, numpy_baselines, numpy_corrections, numpy_losses, numpy_offline, numpy_shaping, numpy_terms

scores_lists = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.5, 2.0]), min_size=1, max_size=8)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def _masks(batch):
    return [batch.action_mask[start:stop].tolist() for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]


def _rows(batch, *names):
    masks = _masks(batch)
    return [numpy_losses.rows_of(getattr(batch, name).tolist(), masks) for name in names]


def _flat(rows):
    return [number for row in rows for number in row]


def _live(batch, *names):
    return list(zip(*(getattr(batch, name)[batch.action_mask].tolist() for name in names), strict=True))


@law
@given(scored_batches(), st.floats(0.3, 1.0), st.floats(1.0, 2.0), st.floats(0.5, 3.0))
def test_gated_weights(batch, low, high, cap):
    dirty = poisoned(batch)
    actual = sequence_mask_tis(
        dirty.old_logp, dirty.rollout_logp, dirty.action_mask, dirty.cu_seqlens, **{"low": low, "high": high, "cap": cap}
    )
    rows = _rows(batch, "old_logp", "rollout_logp")
    _close(actual[batch.action_mask], _flat(numpy_corrections.sequence_mask_tis(*rows, low=low, high=high, cap=cap)))


@law
@given(scored_batches(), st.floats(-0.5, 0.5))
def test_rows_left_behind(batch, threshold):
    dirty = poisoned(batch)
    actual = off_policy_sequence_mask(
        dirty.rollout_logp, dirty.old_logp, dirty.advantages, dirty.action_mask, dirty.cu_seqlens, threshold=threshold
    )
    rows = _rows(batch, "rollout_logp", "old_logp", "advantages")
    _close(actual[batch.action_mask], _flat(numpy_corrections.off_policy_sequence_mask(*rows, threshold=threshold)))


@law
@given(scored_batches(), st.integers(0, 6))
def test_proximal_policies(batch, policy_version):
    dirty = poisoned(batch)
    version = batch.tokens % 8 - 1
    actual = proximal_approximation(dirty.rollout_logp, dirty.old_logp, version, dirty.action_mask, policy_version=policy_version)
    expected = [
        numpy_corrections.proximal(new, old, version=int(its), policy_version=policy_version)
        for (new, old), its in zip(_live(batch, "rollout_logp", "old_logp"), version[batch.action_mask], strict=True)
    ]
    _close(actual[batch.action_mask], expected)


@law
@given(scored_batches(), st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.floats(0.5, 2.0))
def test_decoupled_ppo(batch, clip_low, clip_high, cap):
    dirty, bounds = poisoned(batch), {"clip_low": clip_low, "clip_high": clip_high}
    columns = ("rollout_logp", "old_logp", "ref_logp", "advantages", "weights")
    actual = decoupled_surrogate(*(dirty.require(name) for name in columns), dirty.action_mask, **bounds, weight_cap=cap)
    terms = (w * numpy_corrections.decoupled(*token, **bounds, cap=cap) for *token, w in _live(batch, *columns))
    _close(actual.total, sum(terms, 0.0))


@law
@given(scored_batches())
def test_sample_sizes_and_mismatch(batch):
    dirty = poisoned(batch)
    figures = mismatch_figures(dirty.old_logp, dirty.rollout_logp, dirty.weights, dirty.action_mask, dirty.cu_seqlens)
    expected = numpy_corrections.mismatch(*_rows(batch, "old_logp", "rollout_logp", "weights"))
    for name, number in expected.items():
        _close(figures[name], number)
    shares, corrections = (list(x) for x in zip(*_live(batch, "weights", "values"), strict=True)) if batch.action_mask.any() else ([], [])
    actual = effective_sample_size(sample_size_figures(dirty.values, dirty.weights, dirty.action_mask))
    _close(actual, numpy_corrections.effective_sample_size(corrections, shares) if shares else 0.0)


@law
@given(scored_batches(), reductions)
def test_weights_of_what_is_kept(batch, reduction):
    correction = torch.where(batch.values > 0, batch.values, 0.0)
    actual = weights_of_kept(correction, batch.action_mask, batch.cu_seqlens, reduction=reduction)
    rows = numpy_losses.rows_of(correction.tolist(), _masks(batch))
    expected = numpy_corrections.weights_of_kept(rows, over=reduction.over, length=reduction.length)
    assert_close(actual[batch.action_mask], torch.tensor(_flat(expected), dtype=torch.float32))


@law
@given(scored_batches(), st.sampled_from(["tv", "kl"]), st.floats(0.0, 0.2))
def test_divergences_and_what_may_move(batch, divergence, threshold):
    logp = batch.rollout_logp.clamp(max=-1e-3)  # below a probability of one
    dirty = poisoned(batch)
    arguments = (torch.where(batch.action_mask, logp, math.nan), dirty.old_logp)
    reference = {"tv": numpy_corrections.total_variation, "kl": numpy_corrections.binary_kl}[divergence]
    pairs = list(zip(logp[batch.action_mask].tolist(), batch.old_logp[batch.action_mask].tolist(), strict=True))
    distances = [reference(*pair) for pair in pairs]
    actual = {"tv": binary_tv, "kl": binary_kl}[divergence](*arguments, batch.action_mask)
    assert_close(actual[batch.action_mask], _fp64(*distances), rtol=1e-7, atol=1e-12)
    judged = torch.where(batch.tokens % 3 == 0, 0.0, dirty.advantages)
    keep = divergence_mask(*arguments, judged, batch.action_mask, divergence=divergence, threshold=threshold)
    advantages = judged[batch.action_mask].tolist()
    expected = [
        numpy_corrections.may_move(*pair, a, distance=distance, threshold=threshold)
        for pair, a, distance in zip(pairs, advantages, distances, strict=True)
    ]
    assert keep[batch.action_mask].tolist() == expected


@law
@given(scored_batches(), st.floats(0.0, 1.0), st.integers(0, 99))
def test_clip_cov_drops_its_quota_of_the_candidates_and_nothing_else(batch, fraction, seed):
    if not batch.action_mask.any():
        return
    columns, bounds = ("rollout_logp", "old_logp", "advantages"), {"clip_low": 0.2, "clip_high": 0.2}
    weights = torch.ones_like(batch.weights)
    leaf = batch.rollout_logp.clone().requires_grad_()
    loss = clip_cov_loss(
        *(leaf, batch.old_logp, batch.advantages, weights, batch.action_mask),
        **bounds,
        **{"fraction": fraction, "cov_low": 0.0, "cov_high": 1.0},
        generator=torch.Generator().manual_seed(seed),
    )
    tokens = _live(batch, *columns)
    candidates = numpy_terms.covariance_candidates(*map(list, zip(*tokens, strict=True)), **bounds, low=0.0, high=1.0)
    quota = min(len(candidates), max(math.floor(fraction * len(tokens)), 1))
    assert round(float(loss.metrics["cov_share"])) == quota
    per_token = [numpy_algos.clipped_surrogate(*token, **bounds, dual_clip=None) for token in tokens]
    slopes = torch.autograd.grad(loss.total, leaf)[0][batch.action_mask].tolist()
    # A candidate is held by no bound, so a missing slope tells that it was drawn.
    chosen = {token for token in candidates if slopes[token] == 0.0}
    assert len(chosen) == quota
    _close(loss.total.detach(), sum(numpy_terms.clip_cov(per_token, chosen=chosen), 0.0))


@law
@given(scored_batches())
def test_whitening(batch):
    actual = whiten(poisoned(batch).advantages, batch.action_mask)
    live = batch.advantages[batch.action_mask].tolist()
    _close(actual[batch.action_mask], numpy_shaping.whiten(live) if live else [])


@law
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 2.0]), st.sampled_from([7, -2, 0]), st.booleans()), min_size=1, max_size=9))
def test_centred_on_the_group_and_on_the_greedy_sample(rows):
    scores, group, live = ([row[column] for row in rows] for column in range(3))
    _close(group_centred(_fp64(*scores), torch.tensor(group)), numpy_shaping.group_centred(scores, group))
    greedy = {7: 0.3, -2: -1.0, 0: 2.0}
    poisoned_scores = _fp64(*(score if its else math.nan for score, its in zip(scores, live, strict=True)))
    arguments = (poisoned_scores, torch.tensor(group), torch.tensor(live), _fp64(*greedy.values()), torch.tensor(list(greedy)))
    _close(greedy_centred(*arguments), numpy_shaping.greedy_centred(scores, group, live, greedy))


@law
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 70))
def test_pass_at_k_in_exact_combinations(correct, wrong, k):
    actual = pass_at_k(torch.tensor([correct]), torch.tensor([correct + wrong]), k=k)
    _close(actual, [numpy_shaping.pass_at_k(correct, correct + wrong, k=k)])


@law
@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.floats(0.01, 2.0), st.integers(1, 300), st.floats(0.0, 2.0))
def test_lengths(lengths, alpha, buffer, factor):
    counts = torch.tensor(lengths)
    _close(length_adaptive_lambda(counts, alpha=alpha), [numpy_shaping.length_adaptive_lambda(n, alpha=alpha) for n in lengths])
    settings = {"max_length": 300, "buffer": buffer, "factor": factor}
    _close(overlong_penalty(counts, **settings), [numpy_shaping.overlong(n, **settings) for n in lengths])


@law
@given(scores_lists, st.floats(-2.0, 1.0), st.data())
def test_scores_before_a_baseline(scores, coef, data):
    truncated = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    expected = [numpy_shaping.stop_properly(score, its, coef=coef) for score, its in zip(scores, truncated, strict=True)]
    _close(stop_properly(_fp64(*scores), torch.tensor(truncated), coef=coef), expected)
    _close(clip_scores(_fp64(*scores), low=-0.5, high=0.3), [min(max(score, -0.5), 0.3) for score in scores])
    mean, std = numpy_baselines.moments(scores)
    moments = update_moments(RunningMoments(), _fp64(*scores))
    scale = std + 0.01 if len(set(scores)) > 1 else 1.0
    _close(normalise_scores(_fp64(*scores), moments, eps=0.01), [(score - mean) / scale for score in scores])


@law
@given(scored_batches())
def test_rewards_put_back(batch):
    scores = torch.arange(batch.rows, dtype=torch.float64) - 0.5
    actual = rescored(poisoned(batch).rewards, scores, batch.action_mask, batch.cu_seqlens)
    (rows,) = _rows(batch, "rewards")
    _close(actual[batch.action_mask], _flat(numpy_shaping.rescored(*row) for row in zip(rows, scores.tolist(), strict=True)))


@law
@given(scored_batches(), st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_gigpo_of_episodes_and_turns(batch, gamma, step_weight):
    states, masks = batch.tokens % 3, _masks(batch)
    actual = gigpo(
        *(poisoned(batch).rewards, states, batch.action_mask, batch.cu_seqlens, batch.group),
        **{"gamma": gamma, "step_weight": step_weight, "eps": 1e-6},
    )
    starts = batch.cu_seqlens.tolist()
    turns = [[starts[row] + token for token in turn] for row, mask in enumerate(masks) for turn in numpy_baselines.turns_of(mask)]
    owners = [row for row, mask in enumerate(masks) for _ in numpy_baselines.turns_of(mask)]
    sums = [sum(float(batch.rewards[token]) for token in turn) for turn in turns]
    to_go = _flat(
        numpy_algos.returns([s for s, owner in zip(sums, owners, strict=True) if owner == row], gamma=gamma) for row in range(batch.rows)
    )
    cells = [(int(batch.group[owner]), int(states[turn[0]])) for owner, turn in zip(owners, turns, strict=True)]
    step = numpy_baselines.anchored(to_go, cells, eps=1e-6)
    acting = sorted(set(owners))
    totals = [sum(s for s, owner in zip(sums, owners, strict=True) if owner == row) for row in acting]
    normalised = numpy_algos.group_normalised(totals, [int(batch.group[row]) for row in acting], eps=1e-6)
    episode = [dict(zip(acting, normalised, strict=True)).get(row, 0.0) for row in range(batch.rows)]
    expected = torch.zeros_like(batch.rewards)
    for own, turn in zip(numpy_shaping.gigpo(episode, owners, step, step_weight=step_weight), turns, strict=True):
        expected[turn] = own
    assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@law
@given(scored_batches())
def test_linear_and_squared_terms(batch):
    dirty = poisoned(batch)

    def total(term, *names):
        return sum((w * term(*numbers) for *numbers, w in _live(batch, *names, "weights")), 0.0)

    rest = (dirty.weights, dirty.action_mask)
    _close(nll(dirty.rollout_logp, *rest).total, total(lambda x: -x, "rollout_logp"))
    _close(entropy_bonus(dirty.values, *rest, coef=0.3).total, total(lambda x: -0.3 * x, "values"))
    _close(reinforce_loss(dirty.rollout_logp, dirty.advantages, *rest).total, total(lambda x, a: -a * x, "rollout_logp", "advantages"))
    _close(squared_value_loss(dirty.values, dirty.returns, *rest).total, total(numpy_terms.squared_value, "values", "returns"))
    expected = [a - b for a, b in _live(batch, "ref_logp", "rollout_logp")]
    _close(on_policy_distillation_advantages(dirty.rollout_logp, dirty.ref_logp, dirty.action_mask)[batch.action_mask], expected)


@law
@given(scored_batches(), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(["reverse", "as_written"]))
def test_kl_losses_in_value_and_slope(batch, estimator, gradient):
    dirty = poisoned(batch)
    leaf = dirty.rollout_logp.clone().requires_grad_()
    loss = kl_loss(leaf, dirty.ref_logp, dirty.weights, dirty.action_mask, coef=0.3, estimator=estimator, gradient=gradient)
    tokens = [
        (w, *numpy_terms.kl_term(new, ref, estimator=estimator, gradient=gradient))
        for new, ref, w in _live(batch, "rollout_logp", "ref_logp", "weights")
    ]
    _close(loss.total.detach(), sum((0.3 * w * value for w, value, _ in tokens), 0.0))
    _close(torch.autograd.grad(loss.total, leaf)[0][batch.action_mask], [0.3 * w * slope for w, _, slope in tokens])


@law
@given(scored_batches())
def test_sums_and_means_of_rows(batch):
    dirty, masks = poisoned(batch), _masks(batch)
    expected = numpy_terms.row_sums(batch.rollout_logp.tolist(), masks)
    _close(row_logp(dirty.rollout_logp, dirty.action_mask, dirty.cu_seqlens), expected)
    means = [total / max(sum(mask), 1) for total, mask in zip(expected, masks, strict=True)]
    _close(row_mean_logp(dirty.rollout_logp, dirty.action_mask, dirty.cu_seqlens), means)
    live = torch.tensor([any(mask) for mask in masks])
    assert_close(pair_weights(live), torch.tensor([1 / max(int(live.sum()), 1) if its else 0.0 for its in live.tolist()]))


@law
@given(st.lists(st.tuples(st.floats(-4, -0.05), st.floats(-4, -0.05), st.booleans()), min_size=1, max_size=6))
def test_preferences_and_scores(rows):
    chosen, rejected = _fp64(*(c for c, _, _ in rows)), _fp64(*(r for _, r, _ in rows))
    mask, weights = torch.tensor([live for _, _, live in rows]), 0.1 + torch.arange(len(rows), dtype=torch.float64)

    def total(term):
        return sum((float(weights[i]) * term(c, r) for i, (c, r, live) in enumerate(rows) if live), 0.0)

    def paired(name, **settings):
        return lambda c, r: numpy_offline.paired(name, c, r, **settings)

    arguments = [torch.where(mask, column, math.nan) for column in (chosen, rejected)]
    rest = (torch.where(mask, weights, math.nan), mask)
    _close(log_exp(*arguments, *rest).total, total(paired("bt", beta=1.0)))
    _close(reward_centre(*arguments, *rest, coef=0.2).total, total(lambda c, r: 0.2 * (c + r) ** 2))
    _close(rpo(*arguments, arguments[1], *rest, beta=0.4, nll_coef=0.5).total, total(lambda c, r: paired("dpo", beta=0.4)(c, r) - 0.5 * r))
    _close(dpo(*arguments, *rest, beta=0.4).total, total(paired("dpo", beta=0.4)))
    _close(odds_ratio(*arguments, *rest, coef=0.4).total, total(lambda c, r: paired("orpo", beta=0.4)(c, r) + c))
    if mask.sum() > 1:
        _close(kl_anchor(anchor_sums(arguments[0], mask)), numpy_terms.anchor([c for c, _, live in rows if live]))


@law
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.floats(0.3, 3.0))
def test_tempered_logarithms(logits, temperature):
    mask = torch.tensor([True, False])
    actual = tempered_logp(torch.stack([_fp64(*logits), _fp64(*[math.nan] * len(logits))]), mask, temperature=temperature)
    _close(actual[0], numpy_terms.tempered(logits, temperature=temperature))
    uniform = _fp64(*[-math.log(len(logits))] * len(logits))
    cross_entropy = numpy_offline.cross_entropy(logits, [1 / len(logits)] * len(logits)) - math.log(len(logits))
    loss = forward_kl(_fp64(*logits).log_softmax(-1)[None], uniform[None], _fp64(1.0), mask[:1])
    assert_close(loss.total, _fp64(cross_entropy).squeeze(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x", [-1e-12, -1e-7, -0.01, -0.6931, -0.6932, -1.0, -20.0, -700.0])
def test_log1mexp_in_exact_digits(x):
    assert_close(log1mexp(_fp64(x)), _fp64(numpy_terms.log1mexp(x)), rtol=1e-14, atol=0)
