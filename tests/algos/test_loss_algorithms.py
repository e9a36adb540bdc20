"""DAPO, GSPO, CISPO, SAPO and GMPO as composed, and the laws that they and every loss they may be built of obey."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.algorithms.cispo import CISPO
from hone.algos.algorithms.dapo import DAPO
from hone.algos.algorithms.gmpo import GMPO
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.gspo import GSPO
from hone.algos.algorithms.sapo import SAPO
from hone.algos.algorithms.terms import Clip, GroupAdvantage, KLPenalty
from hone.algos.batch import select
from hone.algos.corrections import correction_weights
from hone.algos.decoupled import decoupled_surrogate
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.protocol import ActorCritic, Algorithm, Outputs
from hone.algos.ranges import violations
from hone.algos.reduce import Reduction
from hone.algos.sequence_losses import gmpo_loss, gspo_loss, gspo_token_loss
from hone.algos.soft_losses import cispo_loss, reinforce_loss, sapo_loss, scaled_advantages
from hone.algos.trust_region import dppo_loss
from tests.algos.strategies import law, poisoned, reductions, scored_batch, scored_batches
from tests.reference.fixtures import f1

ALGORITHMS = [DAPO, GSPO, CISPO, SAPO, GMPO]
IN_REWARD, IN_LOSS = KLPenalty(init_coef=0.1), KLPenalty(init_coef=0.1, estimator="k3", use_loss=True)
AS_WRITTEN = KLPenalty(init_coef=0.1, estimator="k3", use_loss=True, gradient="as_written")
PPO = {"clip_low": 0.2, "clip_high": 0.2}


def _policy(algo):
    # -logp stands in for the entropy: any quantity of the policy with a gradient will do.
    return lambda current, batch: algo.loss(Outputs(logp=current, entropy=-current), batch)


def _corrected(level):
    def loss(current, batch):
        bounds = {"mode": "mask", "low": 0.5, "high": 2.0}
        weights = correction_weights(batch.old_logp, batch.values, batch.action_mask, batch.cu_seqlens, level=level, **bounds)
        advantages = scaled_advantages(batch.advantages, weights, batch.action_mask)
        return clipped_surrogate(current, batch.old_logp, advantages, batch.weights, batch.action_mask, **PPO)

    return loss


def _judged(batch):
    return batch.advantages, batch.weights, batch.action_mask


LOSSES = {
    **{algo.name: _policy(algo()) for algo in ALGORITHMS},
    **{f"{algo.name} with penalties": _policy(algo(kl=AS_WRITTEN, entropy_coef=0.1)) for algo in ALGORITHMS},
    "gspo, wide": _policy(GSPO(clip=Clip())),
    "gspo by token": _policy(GSPO(gradient="token", clip=Clip())),
    "cispo, two sides": _policy(CISPO(ratio_cap=1.2, ratio_floor=0.8)),
    "reinforce": lambda current, batch: reinforce_loss(current, *_judged(batch)),
    "dppo, tv": lambda current, batch: dppo_loss(current, batch.old_logp, *_judged(batch), divergence="tv", threshold=0.1),
    "dppo, kl": lambda current, batch: dppo_loss(current, batch.old_logp, *_judged(batch), divergence="kl", threshold=0.1, ratio_cap=2.0),
    "decoupled": lambda current, batch: decoupled_surrogate(current, batch.old_logp, batch.ref_logp, *_judged(batch), **PPO),
    **{f"ppo, icepop by {level}": _corrected(level) for level in ("token", "sequence", "geometric")},
}
DETACHED = {"cispo", "cispo with penalties", "cispo, two sides", "gspo by token", "dppo, tv", "dppo, kl"}
losses = st.sampled_from(sorted(LOSSES)).map(LOSSES.__getitem__)
more = settings(law, max_examples=150)


def _evaluate(loss, batch):
    """(loss, gradient); `rollout_logp` holds the current numbers."""
    current = batch.rollout_logp.clone().requires_grad_()
    result = loss(current, batch)
    result.total.backward()
    return result, current.grad


@more
@given(losses, scored_batches(), st.data())
def test_any_cut_between_rows_in_any_order_adds_up_to_the_whole(loss, batch, data):
    order = data.draw(st.permutations(range(batch.rows)))
    cuts = sorted(data.draw(st.lists(st.integers(0, batch.rows), max_size=3)))
    parts = [list(order[start:stop]) for start, stop in itertools.pairwise([0, *cuts, batch.rows])]
    whole, gradient = _evaluate(loss, batch)
    evaluated = [_evaluate(loss, select(batch, rows)) for rows in parts]
    total = evaluated[0][0]
    for part, _ in evaluated[1:]:
        total = total + part
    assert_close(total.total, whole.total)
    assert_close(total.metrics, whole.metrics)
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    assert_close(torch.cat([part_gradient for _, part_gradient in evaluated]), gradient[tokens])


@more
@given(losses, scored_batches())
def test_poison_off_the_mask_changes_no_bit_and_gets_no_gradient(loss, batch):
    clean, clean_gradient = _evaluate(loss, batch)
    dirty, dirty_gradient = _evaluate(loss, poisoned(batch))
    assert_close(dirty.total, clean.total, rtol=0, atol=0)
    assert_close(dirty.metrics, clean.metrics, rtol=0, atol=0)
    assert_close(dirty_gradient, clean_gradient, rtol=0, atol=0)
    assert (dirty_gradient[~batch.action_mask] == 0).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
@law
@given(reductions)
def test_without_any_action_token_the_loss_is_zero_and_attached_to_the_graph(name, reduction):
    result, gradient = _evaluate(LOSSES[name], poisoned(scored_batch([[False], [False, False]], reduction, seed=0)))
    assert result.total == 0
    assert (gradient == 0).all()
    assert not any(figure.requires_grad for figure in result.metrics.values())


@more
@given(losses, scored_batches(spread=30.0))
def test_large_ratios_leave_everything_finite(loss, batch):
    result, gradient = _evaluate(loss, batch)
    assert gradient.isfinite().all() and result.total.isfinite()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - DETACHED))
def test_gradients_are_the_derivatives_of_the_values(name):
    # Numbers from the seed, away from the kinks of the clips by more than gradcheck's step.
    batch = scored_batch([[True, False, True], [False, True, True, True]], Reduction(), seed=3)
    current = batch.rollout_logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda current: LOSSES[name](current, batch).total, (current,))


@law
@given(scored_batches(spread=0.0))
def test_on_policy_every_gradient_is_the_plain_policy_gradient(batch):
    """Row-constant advantages, as the sequence losses mean them; the sequence ratio then spreads nothing within a row."""
    row = batch.row_of_token
    batch = dataclasses.replace(batch, advantages=torch.where(batch.action_mask, batch.values[batch.cu_seqlens[:-1].long()][row] + 1, 0.0))
    old, judged = batch.old_logp, _judged(batch)
    _, expected = _evaluate(lambda current, batch: reinforce_loss(current, *judged), batch)
    assert_close(expected, -batch.weights * batch.advantages)
    for loss in (
        lambda current, batch: clipped_surrogate(current, old, *judged, **PPO),
        lambda current, batch: gspo_loss(current, old, *judged, batch.cu_seqlens, **PPO),
        lambda current, batch: gspo_token_loss(current, old, *judged, batch.cu_seqlens, **PPO),
        lambda current, batch: gmpo_loss(current, old, *judged, batch.cu_seqlens, log_clip_low=0.4, log_clip_high=0.4),
        lambda current, batch: cispo_loss(current, old, *judged, cap=5.0),
        lambda current, batch: sapo_loss(current, old, *judged),
        lambda current, batch: dppo_loss(current, old, *judged, divergence="tv", threshold=0.0),
    ):
        assert_close(_evaluate(loss, batch)[1], expected)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_keeps_the_protocol(algo):
    assert isinstance(algo(), Algorithm) and not isinstance(algo(), ActorCritic)
    assert list(violations(algo())) == []
    assert algo().needs == {"old_logp"}  # no KL penalty in any of the papers
    assert algo(kl=IN_LOSS).needs == {"old_logp", "ref_logp"}


def test_the_papers_defaults():
    sequence = Reduction(over="sequence")
    assert DAPO() == DAPO(clip=Clip(low=0.2, high=0.28), reduction=Reduction())
    assert GSPO() == GSPO(clip=Clip(low=3e-4, high=4e-4), gradient="sequence", reduction=sequence)
    assert CISPO() == CISPO(ratio_cap=5.0, ratio_floor=0.0, reduction=Reduction())
    assert SAPO() == SAPO(temperature_positive=1.0, temperature_negative=1.05, reduction=sequence)
    assert GMPO() == GMPO(log_clip_low=0.4, log_clip_high=0.4, reduction=sequence)


@pytest.mark.parametrize(
    ("algo", "found"),
    [
        (DAPO(clip=Clip(low=1.5, dual=1.0)), {"clip.low": "[0, 1]", "clip.dual": "(1, inf)"}),
        (GSPO(clip=Clip(high=-0.1)), {"clip.high": "[0, inf)"}),
        (CISPO(ratio_cap=0.2, ratio_floor=1.1), {"ratio_cap": "[1, inf)", "ratio_floor": "[0, 1]"}),
        (SAPO(temperature_negative=0.0), {"temperature_negative": "(0, inf)"}),
        (GMPO(log_clip_low=-0.4, entropy_coef=-1.0), {"log_clip_low": "[0, inf)", "entropy_coef": "[0, inf)"}),
    ],
)
def test_values_out_of_range_are_found(algo, found):
    assert {name: str(limit) for name, _, limit in violations(algo)} == found


@pytest.mark.parametrize("algo", ALGORITHMS)
@law
@given(batch=scored_batches(), normalize_std=st.booleans(), kl=st.sampled_from([IN_REWARD, IN_LOSS]))
def test_advantages_are_grpos(algo, batch, normalize_std, kl):
    fields = {"kl": kl, "advantage": GroupAdvantage(normalize_std=normalize_std)}
    expected = GRPO(**fields).advantages(batch)
    actual = algo(**fields).advantages(poisoned(batch))
    assert actual.returns is None
    assert_close(actual.advantages, expected.advantages, rtol=0, atol=0)


@pytest.mark.parametrize("algo", ALGORITHMS)
@law
@given(batch=scored_batches())
def test_penalties_are_added_once_and_reported(algo, batch):
    outputs = Outputs(logp=batch.rollout_logp, entropy=-batch.rollout_logp)
    plain = algo().loss(dataclasses.replace(outputs, entropy=None), batch)
    both = algo(kl=IN_LOSS, entropy_coef=0.3).loss(outputs, batch)
    assert_close(both.total, plain.total + 0.1 * both.metrics["kl"] - 0.3 * both.metrics["entropy"])
    assert set(both.metrics) == set(plain.metrics) | {"kl", "entropy"}
    figure_only = algo().loss(outputs, batch)
    assert_close(figure_only.total, plain.total)
    assert_close(figure_only.metrics["entropy"], (-batch.weights * batch.rollout_logp).sum())
    with pytest.raises(ValueError, match=r"entropy_coef is 0\.3, but the outputs have no entropy"):
        algo(entropy_coef=0.3).loss(dataclasses.replace(outputs, entropy=None), batch)


@law
@given(scored_batches())
def test_dapo_with_equal_bounds_and_weights_by_token_is_grpos_loss(batch):
    outputs = Outputs(logp=batch.rollout_logp)
    grpo = GRPO(kl=KLPenalty(init_coef=0.0), reduction=Reduction())
    dapo = DAPO(clip=Clip())
    assert dapo.reduction == grpo.reduction
    assert_close(dapo.loss(outputs, batch).total, grpo.loss(outputs, batch).total, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("algo", "sign", "expected"),
    [
        (DAPO(), 1.0, -0.079352),  # (-1 - 1.28 - .670320 + 1.648721 + .904837) / 5
        (GSPO(), 1.0, 0.127093),
        (GSPO(), -1.0, -0.000350),
        (CISPO(), 1.0, 0.274542),
        (CISPO(ratio_cap=1.2, ratio_floor=0.8), 1.0, 0.348742),
        (SAPO(), 1.0, 0.081530),
        (GMPO(log_clip_low=0.35, log_clip_high=0.35), -1.0, -0.074838),
    ],
)
def test_losses_golden_of_f1_under_the_algorithms_own_reduction(algo, sign, expected):
    # Derived where the functions are tested; here: the settings reach them, and the reduction is the paper's.
    example = f1(sign=sign)
    batch = scored_batch([[False, True, True, False, True], [False, True, True, False]], algo.reduction, seed=0)
    batch = dataclasses.replace(batch, old_logp=example.old_logp, advantages=example.advantages)
    loss = algo.loss(Outputs(logp=example.logp), batch)
    assert math.isclose(float(loss.total.detach()), expected, abs_tol=1e-6)
