"""From a rollout to optimiser steps: every row once, weights per step, and nothing judged that is not finite."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.ppo import PPO
from hone.algos.algorithms.remax import ReMax, with_greedy
from hone.algos.batch import Batch, Scored
from hone.algos.judging import judge, optimiser_steps
from hone.algos.reduce import Reduction, token_weights
from tests.algos.strategies import PER_TOKEN, law, reductions, scored_batch, scored_batches


def _unjudged(scored):
    return Batch(**{field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)})


@law
@given(scored_batches(), st.sampled_from([PPO(), GRPO()]))
def test_judge_adds_advantages_and_weights_and_keeps_the_rest(scored, algo):
    batch = _unjudged(scored)
    judged = judge(algo, batch)
    assert type(judged) is Scored
    for field in dataclasses.fields(Batch):
        assert getattr(judged, field.name) is getattr(batch, field.name)
    assert_close(judged.advantages, algo.advantages(batch).advantages)
    assert_close(judged.weights, token_weights(batch.action_mask, batch.cu_seqlens, algo.reduction))
    assert (judged.returns is None) == (algo.name == "grpo")


@law
@given(scored_batches(), reductions, st.integers(1, 7), st.integers(0, 2**31))
def test_steps_hold_every_row_once_with_weights_of_their_own(scored, reduction, batch_size, seed):
    scored = dataclasses.replace(scored, group=torch.arange(scored.rows))
    steps = list(optimiser_steps(scored, batch_size=batch_size, reduction=reduction, generator=torch.Generator().manual_seed(seed)))
    assert [step.rows for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    assert 1 <= steps[-1].rows <= batch_size
    assert sorted(int(row) for step in steps for row in step.group) == list(range(scored.rows))
    for step in steps:
        assert_close(step.weights, token_weights(step.action_mask, step.cu_seqlens, reduction))
        for position, row in enumerate(step.group.tolist()):
            own = slice(int(step.cu_seqlens[position]), int(step.cu_seqlens[position + 1]))
            source = slice(int(scored.cu_seqlens[row]), int(scored.cu_seqlens[row + 1]))
            for name in set(PER_TOKEN) - {"weights"}:
                assert_close(step.require(name)[own], scored.require(name)[source], rtol=0, atol=0)


def test_the_generator_settles_the_order():
    scored = scored_batch([[True]] * 16, Reduction(), seed=0)
    scored = dataclasses.replace(scored, group=torch.arange(16))

    def order(seed):
        steps = optimiser_steps(scored, batch_size=5, reduction=Reduction(), generator=torch.Generator().manual_seed(seed))
        return [int(row) for step in steps for row in step.group]

    assert order(0) == order(0) != order(1)
    assert order(0) != list(range(16))


def test_a_step_needs_a_row():
    scored = scored_batch([[True]], Reduction(), seed=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(optimiser_steps(scored, batch_size=0, reduction=Reduction(), generator=torch.Generator()))


@pytest.mark.parametrize("name", ["old_logp", "ref_logp", "values"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named_with_its_place(name, value):
    batch = _unjudged(scored_batch([[True, True], [False, True]], Reduction(), seed=0))
    broken = getattr(batch, name).clone()
    broken[2] = math.nan  # off the mask: no matter
    judge(PPO(), dataclasses.replace(batch, **{name: broken}))
    broken[3] = value
    with pytest.raises(FloatingPointError, match=rf"{name}: 1 of 3 action tokens are not finite, the first {value} at token 1 of row 1"):
        judge(PPO(), dataclasses.replace(batch, **{name: broken}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_for_its_author_to_mend(value):
    batch = _unjudged(scored_batch([[True, True], [False, True]], Reduction(), seed=0))
    rewards = batch.rewards.clone()
    rewards[2] = math.nan  # off the mask: no matter
    judge(PPO(), dataclasses.replace(batch, rewards=rewards))
    rewards[3] = value
    with pytest.raises(
        ValueError, match=rf"1 of 3 rewards are not finite, at index 3 {value}; nothing was trained on them: mend the reward"
    ):
        judge(PPO(), dataclasses.replace(batch, rewards=rewards))


def test_an_advantage_that_overflows_is_named():
    batch = _unjudged(scored_batch([[True, True]], Reduction(), seed=0))
    batch = dataclasses.replace(batch, rewards=torch.full((2,), 1e308, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match=r"advantages of ppo: 2 of 2 .* clip or scale the rewards"):
        judge(PPO(), batch)


def test_a_field_that_the_algorithm_needs_must_be_there():
    batch = dataclasses.replace(_unjudged(scored_batch([[True]], Reduction(), seed=0)), values=None)
    judge(GRPO(), batch)
    with pytest.raises(ValueError, match="the batch has no values"):
        judge(PPO(), batch)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_an_engines_number_that_is_not_finite_is_no_rejected_token(mode, value):
    batch = _unjudged(scored_batch([[True, True], [False, True]], Reduction(), seed=0))
    broken = batch.rollout_logp.clone()
    broken[2] = math.nan  # off the mask: no matter
    for algo in (GRPO(correction=Correction(level="token", mode=mode)), GRPO()):
        judge(algo, dataclasses.replace(batch, rollout_logp=broken))
        with pytest.raises(FloatingPointError, match=rf"rollout_logp: 1 of 3 action tokens are not finite, the first {value} at token 1"):
            judge(algo, dataclasses.replace(batch, rollout_logp=torch.where(torch.arange(4) == 1, value, broken)))


def test_a_weight_that_overflows_is_named_unless_it_is_bounded():
    batch = _unjudged(scored_batch([[True], [True]], Reduction(), seed=0))
    batch = dataclasses.replace(batch, group=torch.zeros(2, dtype=torch.long), rewards=torch.tensor([1.0, 0.0]))
    batch = dataclasses.replace(batch, old_logp=torch.zeros(2), rollout_logp=torch.tensor([0.0, -200.0]))
    assert judge(GRPO(correction=Correction(level="token")), batch).advantages.isfinite().all()
    for normalize in (False, True):
        with pytest.raises(FloatingPointError, match=r"the correction: 1 of 2 action tokens .* give algo\.correction\.high a finite"):
            judge(GRPO(correction=Correction(level="token", high=math.inf, normalize=normalize)), batch)


def test_a_greedy_score_that_is_not_finite_is_named_with_its_row():
    batch = _unjudged(scored_batch([[True, False, True], [False], [True]], Reduction(), seed=0))
    batch = dataclasses.replace(batch, group=torch.tensor([4, 4, 9]))
    judge(ReMax(), with_greedy(batch, torch.tensor([0.5, 0.0]), torch.tensor([9, 4])))
    with pytest.raises(FloatingPointError, match=r"greedy_scores: 1 of 3 action tokens are not finite, the first nan at token 0 of row 2"):
        judge(ReMax(), with_greedy(batch, torch.tensor([math.nan, 0.0]), torch.tensor([9, 4])))
    with pytest.raises(ValueError, match="the batch has no greedy_scores; `with_greedy` fills it"):
        judge(ReMax(), batch)


@law
@given(scored_batches(), reductions)
def test_groups_of_live_rows_are_counted_whatever_the_reduction(scored, reduction):
    judged = judge(GRPO(reduction=reduction), _unjudged(scored))
    live = torch.tensor([bool(scored.action_mask[scored.row_of_token == row].any()) for row in range(scored.rows)])
    assert judged.figures["groups"] == scored.group[live].unique().numel()
    assert all(figure.shape == () and not figure.requires_grad for figure in judged.figures.values())
