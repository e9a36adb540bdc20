"""PPO and GRPO as composed: needs, advantages, penalties, and what their fields refuse."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae, group_normalised, row_sums, spread, whiten
from hone.algos.algorithms import ALGORITHMS
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.ppo import PPO, GAEAdvantage
from hone.algos.algorithms.terms import Clip, GroupAdvantage, KLPenalty
from hone.algos.kl import kl_per_token
from hone.algos.protocol import ActorCritic, Algorithm, Outputs
from hone.algos.ranges import violations
from hone.algos.reduce import Reduction
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches

IN_REWARD, IN_LOSS, NONE = KLPenalty(init_coef=0.1), KLPenalty(init_coef=0.1, use_loss=True), KLPenalty(init_coef=0.0)


def test_every_algorithm_stands_under_its_name_and_keeps_the_protocol():
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.name == name
        assert isinstance(algorithm(), Algorithm)
        assert list(violations(algorithm())) == []
        assert isinstance(algorithm(), ActorCritic) == ("values" in algorithm().needs)


@pytest.mark.parametrize(
    ("algo", "needs"),
    [
        (PPO(), {"old_logp", "values", "ref_logp"}),
        (PPO(kl=NONE), {"old_logp", "values"}),
        (PPO(kl=IN_LOSS), {"old_logp", "values", "ref_logp"}),
        (GRPO(), {"old_logp", "ref_logp"}),
        (GRPO(kl=NONE), {"old_logp"}),
    ],
)
def test_needs(algo, needs):
    assert algo.needs == needs


def test_values_out_of_range_are_found_with_their_dotted_name():
    algo = PPO(clip=Clip(low=1.5, dual=1.0), value_clip=0.0, kl=KLPenalty(init_coef=-1.0), advantage=GAEAdvantage(lambd=1.1))
    found = {name: str(limit) for name, _, limit in violations(algo)}
    assert found == {
        "clip.dual": "(1, inf)",
        "value_clip": "(0, inf)",
        "clip.low": "[0, 1]",
        "kl.init_coef": "[0, inf)",
        "advantage.lambd": "[0, 1]",
    }


def test_a_penalty_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="no gradient in expectation"):
        KLPenalty(use_loss=True, estimator="k1", gradient="as_written")


@law
@given(scored_batches(), st.booleans())
def test_ppo_takes_gae_of_rewards_less_the_penalty_and_whitens_only_the_advantages(batch, normalize):
    advantage = GAEAdvantage(gamma=0.9, lambd=0.8, normalize=normalize)
    judged = PPO(kl=IN_REWARD, advantage=advantage).advantages(poisoned(batch))
    rewards = batch.rewards - 0.1 * (batch.old_logp - batch.ref_logp)
    advantages, returns = gae(rewards, batch.values, batch.action_mask, batch.cu_seqlens, gamma=0.9, lambd=0.8)
    assert_close(judged.returns, returns)
    assert_close(judged.advantages, whiten(advantages, batch.action_mask) if normalize else advantages)


@law
@given(scored_batches())
def test_grpo_compares_live_rows_within_their_group(batch):
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    judged = GRPO(kl=NONE).advantages(poisoned(batch))
    assert judged.returns is None
    scores = row_sums(batch.rewards, mask, cu_seqlens)
    live = torch.tensor([bool(mask[start:stop].any()) for start, stop in itertools.pairwise(cu_seqlens)])
    relative = torch.zeros_like(scores)
    relative[live] = group_normalised(scores[live], batch.group[live], eps=1e-6)
    assert_close(judged.advantages, spread(relative, mask, cu_seqlens))


def test_grpo_golden_of_f2_with_a_row_without_actions_that_stays_out():
    # Scores 1, 0, (nothing), .5, 0 in one group; the row without actions must not pull the mean.
    batch = scored_batch([[True], [True], [False], [False, True, True], [True]], Reduction(), seed=0)
    rewards = torch.tensor([1.0, 0.0, math.nan, math.nan, 0.2, 0.3, 0.0], dtype=torch.float64)
    batch = dataclasses.replace(batch, rewards=rewards, group=torch.zeros(5, dtype=torch.long))
    expected = torch.tensor([1.305580, -0.783348, 0, 0, 0.261116, 0.261116, -0.783348], dtype=torch.float64)
    assert_close(GRPO().advantages(batch).advantages, expected, rtol=0, atol=1e-6)
    centred = GRPO(advantage=GroupAdvantage(normalize_std=False)).advantages(batch).advantages
    assert_close(centred, torch.tensor([0.625, -0.375, 0, 0, 0.125, 0.125, -0.375], dtype=torch.float64))


@law
@given(scored_batches(), st.floats(-50, 50))
def test_grpo_ignores_a_constant_added_to_every_score(batch, shift):
    last = torch.zeros_like(batch.action_mask)
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        actions = batch.action_mask[start:stop].nonzero().flatten()
        if actions.numel():
            last[start + actions[-1]] = True
    moved = dataclasses.replace(batch, rewards=batch.rewards + shift * last)
    assert_close(GRPO().advantages(moved).advantages, GRPO().advantages(batch).advantages, rtol=0, atol=1e-6)


@law
@given(scored_batches())
def test_grpo_with_the_penalty_in_the_reward_adds_its_reward_to_go_after_the_normalisation(batch):
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    penalty = kl_per_token(batch.old_logp, batch.ref_logp, mask, estimator="k1")
    expected = GRPO(kl=NONE).advantages(batch).advantages - 0.1 * discounted_returns(penalty, mask, cu_seqlens, gamma=1.0)
    assert_close(GRPO(kl=IN_REWARD).advantages(batch).advantages, expected)


@law
@given(scored_batches())
def test_the_penalty_acts_in_one_place_and_is_reported_in_both(batch):
    outputs = Outputs(logp=batch.rollout_logp)
    without, in_reward, in_loss = (GRPO(kl=kl).loss(outputs, batch) for kl in (NONE, IN_REWARD, IN_LOSS))
    assert_close(in_reward.total, without.total)
    assert_close(in_loss.total, without.total + 0.1 * in_loss.metrics["kl"])
    assert_close(in_reward.metrics["kl"], in_loss.metrics["kl"])
    assert set(without.metrics) == {"policy_loss", "ppo_clip_ratio", "ppo_kl"}
    assert_close(GRPO(kl=IN_LOSS).advantages(batch).advantages, GRPO(kl=NONE).advantages(batch).advantages)


def test_an_infinite_penalty_in_the_reward_does_not_reach_the_loss():
    batch = scored_batch([[True]], Reduction(), seed=0)
    batch = dataclasses.replace(batch, ref_logp=batch.rollout_logp + 2000)  # k3 = exp(2000)
    loss = PPO(kl=KLPenalty(estimator="k3")).loss(Outputs(logp=batch.rollout_logp), batch)
    assert loss.total.isfinite() and loss.metrics["kl"].isinf()


def test_the_entropy_is_a_figure_without_a_bonus_and_a_loss_with_one():
    batch = scored_batch([[True, True]], Reduction(), seed=0)
    entropy = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    outputs = Outputs(logp=batch.rollout_logp, entropy=entropy)
    plain, bonus = PPO().loss(outputs, batch), PPO(entropy_coef=0.2).loss(outputs, batch)
    assert plain.metrics["entropy"] == bonus.metrics["entropy"] == 1.0
    assert not plain.total.requires_grad and bonus.total.requires_grad
    assert_close(bonus.total, plain.total - 0.2)
    with pytest.raises(ValueError, match=r"entropy_coef is 0\.2, but the outputs have no entropy"):
        PPO(entropy_coef=0.2).loss(Outputs(logp=batch.rollout_logp), batch)


def test_a_missing_field_names_who_fills_it():
    batch = dataclasses.replace(scored_batch([[True]], Reduction(), seed=0), ref_logp=None)
    with pytest.raises(ValueError, match="the batch has no ref_logp; the learner fills it"):
        PPO().loss(Outputs(logp=batch.rollout_logp), batch)
