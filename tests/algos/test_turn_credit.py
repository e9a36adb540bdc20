"""Credit per turn, per state and per step: golden values, references, laws."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import gae
from hone.algos.batch import select
from hone.algos.reduce import Reduction
from hone.algos.turn_credit import anchor_centred, anchor_normalised, gigpo, process_normalised, turn_gae, turn_starts
from tests.algos.strategies import law, poisoned, scored_batch, scored_batches
from tests.reference import numpy_algos, numpy_baselines
from tests.reference.fixtures import f3, scatter

unit = st.floats(0.0, 1.0)
NAN = math.nan


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_turns_golden():
    # Rows TTFT, T, F, TT: the second row's turn begins where the first row's ends, and so does the fourth's.
    mask = torch.tensor([True, True, False, True, True, False, True, True])
    starts = turn_starts(mask, torch.tensor([0, 4, 5, 6, 8, 8], dtype=torch.int32))
    assert starts.tolist() == [True, False, False, True, True, False, True, False]
    assert mask.tolist() == [True, True, False, True, True, False, True, True]  # left as it was


def test_turn_gae_golden_of_f3():
    rewards, values, mask, cu_seqlens = f3()
    # Turns {0, 1} with V .5 and {3, 4} with V .4, rewards 0 and 1: 1 - .4 = .6; .4 - .5 + .95 .6 = .47.
    advantages, returns = turn_gae(rewards, values, mask, cu_seqlens, gamma=1.0, lambd=0.95)
    assert_close(advantages, _fp64(0.47, 0.47, 0.0, 0.6, 0.6))
    assert_close(returns, _fp64(0.97, 0.97, 0.0, 1.0, 1.0))
    # Cut off before a state of value .3: .9; -.1 + .95 .9 = .755.
    advantages, _ = turn_gae(rewards, values, mask, cu_seqlens, gamma=1.0, lambd=0.95, bootstrap=_fp64(0.3))
    assert_close(advantages, _fp64(0.755, 0.755, 0.0, 0.9, 0.9))


# Two rows of one prompt, an environment token between two turns each; states 8 then 9, and 8 then 4.
MASK = torch.tensor([True, True, False, True, True, False, True])
CU = torch.tensor([0, 4, 7], dtype=torch.int32)
STATES = torch.tensor([8, -3, -1, 9, 8, -7, 4])  # only those at a turn's start are read
REWARDS = scatter(_fp64(0.0, 0.0, 1.0, 0.0, 0.5), MASK)
SAME = torch.zeros(2, dtype=torch.long)


def test_gigpo_golden():
    # gamma .5: R of the turns from state 8: .5 1 = .5 and .5 .5 = .25, mean .375; states 9 and 4 were met once.
    step = anchor_centred(REWARDS, STATES, MASK, CU, SAME, gamma=0.5)
    assert_close(step, _fp64(0.125, 0.125, 0.0, 0.0, -0.125, 0.0, 0.0))
    # std of two numbers, Bessel: their distance over sqrt(2); so +-1/sqrt(2), for the step as for the episode (1 and .5).
    root = math.sqrt(0.5)
    step = anchor_normalised(REWARDS, STATES, MASK, CU, SAME, gamma=0.5, eps=0.0)
    assert_close(step, root * _fp64(1.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0))
    both = gigpo(REWARDS, STATES, MASK, CU, SAME, gamma=0.5, step_weight=0.5, eps=0.0)
    assert_close(both, root * _fp64(1.5, 1.5, 0.0, 1.0, -1.5, 0.0, -1.0))


def test_states_of_different_prompts_are_different_states():
    assert (anchor_centred(REWARDS, STATES, MASK, CU, torch.tensor([0, 1]), gamma=0.5) == 0).all()


def test_gigpo_leaves_a_row_without_actions_out_of_its_group():
    mask, cu_seqlens = torch.cat([MASK, torch.tensor([False])]), torch.tensor([0, 4, 7, 8], dtype=torch.int32)
    rewards, states = torch.cat([REWARDS, _fp64(NAN)]), torch.cat([STATES, torch.tensor([8])])
    both = gigpo(rewards, states, mask, cu_seqlens, torch.zeros(3, dtype=torch.long), gamma=0.5, step_weight=0.5, eps=0.0)
    assert_close(both[:-1], gigpo(REWARDS, STATES, MASK, CU, SAME, gamma=0.5, step_weight=0.5, eps=0.0))
    assert both[-1] == 0


def test_process_golden():
    # Steps 1, 0 and .5, .5, 1: mean .6, squares .16 + .36 + .01 + .01 + .16 = .7, std sqrt(.7 / 4) = .418330;
    # .956183, -1.434274 and -.239046, -.239046, .956183, summed from the end. The environment's token is skipped, the
    # second row's first step has two tokens, its last is followed by a token of no step.
    mask = torch.tensor([False, True, False, True, True, True, True, True, True])
    ends = torch.tensor([False, True, False, True, False, True, True, True, False])
    rewards = scatter(_fp64(1.0, 0.0, 0.5, 0.5, 1.0), ends)
    cu_seqlens, group = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([6, 6])
    advantages = process_normalised(rewards, ends, mask, cu_seqlens, group, eps=0.0)
    expected = _fp64(0.0, -0.478091, 0.0, -1.434274, 0.478091, 0.478091, 0.717137, 0.956183, 0.0)
    assert_close(advantages, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="step_ends marks token 2, which the policy did not choose"):
        process_normalised(rewards, ends | ~mask & (ends.cumsum(0) > 0), mask, cu_seqlens, group, eps=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1])
def test_equal_steps_and_returns_give_exact_zeros(reward):
    mask, cu_seqlens = torch.ones(7, dtype=torch.bool), torch.arange(8, dtype=torch.int32)
    rewards, group, states = torch.full((7,), reward), torch.zeros(7, dtype=torch.long), torch.zeros(7, dtype=torch.long)
    assert (process_normalised(rewards, mask, mask, cu_seqlens, group, eps=0.0) == 0).all()
    assert (anchor_centred(rewards, states, mask, cu_seqlens, group, gamma=0.95) == 0).all()
    assert (gigpo(rewards, states, mask, cu_seqlens, group, gamma=0.95, step_weight=1.0, eps=0.0) == 0).all()


def _rows(batch):
    for row in range(batch.rows):
        start, stop = int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])
        yield row, start, numpy_baselines.turns_of(batch.action_mask[start:stop].tolist())


@law
@given(scored_batches(), unit, unit)
def test_turn_gae_equals_the_reference_whatever_stands_off_the_mask(batch, gamma, lambd):
    dirty, after = poisoned(batch), torch.arange(batch.rows, dtype=torch.float64)
    judged = turn_gae(dirty.rewards, dirty.values, dirty.action_mask, dirty.cu_seqlens, gamma=gamma, lambd=lambd, bootstrap=after)
    expected, targets = torch.zeros_like(batch.rewards), torch.zeros_like(batch.rewards)
    for row, start, turns in _rows(batch):
        rewards = [sum(float(batch.rewards[start + token]) for token in turn) for turn in turns]
        values = [float(batch.values[start + turn[0]]) for turn in turns]
        advantages = numpy_algos.gae(rewards, values, gamma=gamma, lambd=lambd, value_after=float(row))
        for turn, advantage, value in zip(turns, advantages, values, strict=True):
            for token in turn:
                expected[start + token], targets[start + token] = advantage, advantage + value
    assert_close(judged, (expected, targets))


@law
@given(scored_batches(), unit, st.sampled_from([None, 1e-6]))
def test_anchors_equal_the_reference_whatever_stands_off_the_mask(batch, gamma, eps):
    states = batch.tokens % 3
    rewards = poisoned(batch).rewards
    rows = (states, batch.action_mask, batch.cu_seqlens, batch.group)
    step = anchor_centred(rewards, *rows, gamma=gamma) if eps is None else anchor_normalised(rewards, *rows, gamma=gamma, eps=eps)
    returns, cells, places = [], [], []
    for row, start, turns in _rows(batch):
        sums = [sum(float(batch.rewards[start + token]) for token in turn) for turn in turns]
        returns += numpy_algos.returns(sums, gamma=gamma)
        cells += [(int(batch.group[row]), int(states[start + turn[0]])) for turn in turns]
        places += [[start + token for token in turn] for turn in turns]
    expected = torch.zeros_like(batch.rewards)
    for advantage, tokens in zip(numpy_baselines.anchored(returns, cells, eps=eps), places, strict=True):
        expected[tokens] = advantage
    assert_close(step, expected, rtol=1e-6, atol=1e-9)


@law
@given(scored_batches())
def test_process_rewards_equal_the_reference_whatever_stands_off_the_mask(batch):
    ends = batch.action_mask & (batch.tokens % 2 == 0)
    rewards = torch.where(ends, batch.rewards, NAN)
    step_group = batch.group[batch.row_of_token[ends]].tolist()
    steps = numpy_algos.group_normalised(batch.rewards[ends].tolist(), step_group, eps=1e-6)
    places = ends.nonzero().flatten().tolist()
    expected = torch.zeros_like(batch.rewards)
    for token in batch.action_mask.nonzero().flatten().tolist():
        own = int(batch.row_of_token[token])
        later = [step for step, place in zip(steps, places, strict=True) if place >= token and int(batch.row_of_token[place]) == own]
        expected[token] = sum(later)
    assert_close(process_normalised(rewards, ends, batch.action_mask, batch.cu_seqlens, batch.group, eps=1e-6), expected)


@law
@given(scored_batches(), unit, unit)
def test_turns_of_one_token_are_steps(batch, gamma, lambd):
    # Every action token followed by the environment's: turn-level and token-level GAE agree.
    mask = torch.stack([batch.action_mask, torch.zeros_like(batch.action_mask)], dim=1).flatten()
    rewards, values = (numbers.repeat_interleave(2) for numbers in (batch.rewards, batch.values))
    rows = (rewards, values, mask, 2 * batch.cu_seqlens)
    assert_close(turn_gae(*rows, gamma=gamma, lambd=lambd), gae(*rows, gamma=gamma, lambd=lambd))


@law
@given(scored_batches(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(batch, random):
    order = random.sample(range(batch.rows), batch.rows)
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    moved = select(batch, order)

    def judged(its):
        states, rows = its.tokens % 3, (its.action_mask, its.cu_seqlens)
        ends = its.action_mask & (its.tokens % 2 == 0)
        yield turn_gae(its.rewards, its.values, *rows, gamma=0.9, lambd=0.8)[0]
        yield gigpo(its.rewards, states, *rows, its.group, gamma=0.9, step_weight=1.0, eps=1e-3)
        yield process_normalised(its.rewards, ends, *rows, its.group, eps=1e-3)

    for one, other in zip(judged(batch), judged(moved), strict=True):
        assert_close(one[tokens], other)


def test_results_are_constants_in_at_least_fp32():
    batch = scored_batch([[True, False, True], [True]], Reduction(), seed=0)
    half = dataclasses.replace(batch, rewards=batch.rewards.bfloat16().requires_grad_(), values=batch.values.bfloat16().requires_grad_())
    states, rows = half.tokens % 2, (half.action_mask, half.cu_seqlens)
    for numbers in (
        *turn_gae(half.rewards, half.values, *rows, gamma=1.0, lambd=1.0),
        gigpo(half.rewards, states, *rows, half.group, gamma=1.0, step_weight=1.0, eps=1e-6),
        process_normalised(half.rewards, half.action_mask, *rows, half.group, eps=1e-6),
    ):
        assert numbers.dtype == torch.float32 and not numbers.requires_grad
