"""Rewards shaped before any baseline: golden values, state that can be cut and saved, and filters that drop what they say."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import row_sums
from hone.algos.shaping import (
    RunningMoments,
    clip_scores,
    groups_in_range,
    normalise_scores,
    overlong_penalty,
    rescored,
    stop_properly,
    update_moments,
    varied_groups,
)
from tests.algos.strategies import law, poisoned, scored_batches
from tests.reference import numpy_baselines

NAN = math.nan


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_clip_golden():
    assert_close(clip_scores(_fp64(-11, -1, 11), low=-10.0, high=10.0), _fp64(-10, -1, 10))
    assert clip_scores(_fp64(NAN), low=0.0, high=1.0).isnan().all()
    with pytest.raises(ValueError, match=r"clipped to \[1\.0, 1\.0\]"):
        clip_scores(_fp64(0), low=1.0, high=1.0)


def test_overlong_golden():
    # DAPO: L = 20480, c = 4096. 16384 is the last free length, 17408 a quarter into the buffer, nothing falls past -1.
    lengths = torch.tensor([0, 16384, 17408, 20480, 24576])
    expected = _fp64(0.0, 0.0, -0.25, -1.0, -1.0)
    assert_close(overlong_penalty(lengths, max_length=20480, buffer=4096), expected)
    assert_close(overlong_penalty(lengths, max_length=20480, buffer=4096, factor=0.5), 0.5 * expected)
    for buffer in (0, 11):
        with pytest.raises(ValueError, match=f"the overlong buffer is {buffer} tokens of 10"):
            overlong_penalty(lengths, max_length=10, buffer=buffer)


@pytest.mark.parametrize(
    ("coef", "expected"),
    [
        (0.0, [0.0, 2.0, -1.0]),  # nothing earned by a row cut off, and nothing excused
        (0.5, [1.0, 2.0, -1.0]),
        (1.0, [2.0, 2.0, -1.0]),
        (-0.5, [-0.5, 2.0, -1.0]),
        (-3.0, [-3.0, 2.0, -3.0]),
    ],
)
def test_stop_properly_golden_never_raises_a_score(coef, expected):
    # Cut off, not cut off, cut off.
    assert_close(stop_properly(_fp64(2, 2, -1), torch.tensor([True, False, True]), coef=coef), _fp64(*expected))


def test_stop_properly_refuses_to_reward_a_row_cut_off():
    with pytest.raises(ValueError, match=r"stop-properly coefficient is 1\.1"):
        stop_properly(_fp64(1), torch.tensor([True]), coef=1.1)


def test_rescored_golden():
    # Rows: turn rewards .5 then 1, to sum to 1.2; a row without actions; one action.
    mask = torch.tensor([True, False, True, True, False, False, True])
    rewards = _fp64(0.5, NAN, 0.0, 1.0, NAN, math.inf, 3.0)
    moved = rescored(rewards, _fp64(1.2, 9.0, -1.0), mask, torch.tensor([0, 5, 6, 7], dtype=torch.int32))
    assert_close(moved, _fp64(0.5, 0.0, 0.0, 0.7, 0.0, 0.0, -1.0))


@law
@given(scored_batches())
def test_rescored_rows_sum_to_their_scores_whatever_stands_off_the_mask(batch):
    rows = (batch.action_mask, batch.cu_seqlens)
    scores = torch.arange(batch.rows, dtype=torch.float64)
    moved = rescored(poisoned(batch).rewards, scores, *rows)
    live = row_sums(torch.ones_like(batch.rewards), *rows) > 0
    assert_close(row_sums(moved, *rows), torch.where(live, scores, 0.0))
    assert ((moved != torch.where(batch.action_mask, batch.rewards, 0.0)).sum() <= live.sum()).all()
    assert_close(rescored(poisoned(batch).rewards, row_sums(batch.rewards, *rows), *rows), batch.rewards)


def test_running_moments_golden():
    # 1, 3: mean 2, squares 2. Then 8: mean 4, squares 9 + 1 + 16 = 26, std sqrt(26 / 3).
    first = update_moments(RunningMoments(), _fp64(1, 3))
    assert first == RunningMoments(count=2, mean=2.0, squares=2.0)
    second = update_moments(first, _fp64(8))
    assert second.count == 3 and second.mean == 4.0 and second.squares == pytest.approx(26)
    assert first == RunningMoments(count=2, mean=2.0, squares=2.0)
    assert_close(normalise_scores(_fp64(4, 7), second, eps=0.0), _fp64(0, 3 / math.sqrt(26 / 3)))


def test_before_two_different_scores_nothing_is_scaled():
    assert_close(normalise_scores(_fp64(0.25), RunningMoments(), eps=1e-8), _fp64(0.25))
    constant = RunningMoments()
    equal = torch.full((7,), 1e6 + 0.1, dtype=torch.float64)  # whose sum by seven is off by 1e-10
    for _ in range(3):
        constant = update_moments(constant, equal)
    assert constant.std == 0.0
    assert (normalise_scores(equal, constant, eps=0.0) == 0).all()
    assert update_moments(constant, _fp64()) == constant


def test_a_score_that_is_not_finite_does_not_enter_the_state():
    with pytest.raises(ValueError, match="scores: 1 of 2 are not finite, the first nan"):
        update_moments(RunningMoments(), _fp64(1, NAN))


finite = st.floats(-1e3, 1e3)


@law
@given(st.lists(st.lists(finite, max_size=5), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything_at_once_and_survive_saving(parts):
    moments = RunningMoments()
    for part in parts:
        moments = RunningMoments(**json.loads(json.dumps(dataclasses.asdict(update_moments(moments, _fp64(*part))))))
    everything = [score for part in parts for score in part]
    assert moments.count == len(everything)
    if everything:
        mean, std = numpy_baselines.moments(everything)
        assert moments.mean == pytest.approx(mean, abs=1e-9) and moments.std == pytest.approx(std, abs=1e-6)


# Groups: 0 and 1; equal; one live row; no live row. A row that is not live holds what must not matter.
SCORES = _fp64(0, 1, NAN, 0.1, 0.1, 0.1, 1, NAN, 5, NAN)
GROUP = torch.tensor([4, 9, 4, 2, 2, 2, -7, -7, 3, 3])
LIVE = torch.tensor([True, True, False, True, True, True, True, False, False, False])
GROUP[1] = 4


def test_filters_golden():
    kept = [True, True, True, False, False, False, False, False, False, False]
    assert varied_groups(SCORES, GROUP, LIVE).tolist() == kept
    assert varied_groups(SCORES, GROUP, LIVE, min_std=0.49).tolist() == kept  # the deviation of 0 and 1 is .5
    assert not varied_groups(SCORES, GROUP, LIVE, min_std=0.5).any()
    assert groups_in_range(SCORES, GROUP, LIVE, low=0.0, high=1.0).tolist() == [True] * 6 + [False] * 4
    assert groups_in_range(SCORES, GROUP, LIVE, low=0.1, high=0.5).tolist() == [False] * 10  # the bounds are outside
    assert groups_in_range(SCORES, GROUP, LIVE, low=0.05, high=0.5).tolist() == [False] * 3 + [True] * 3 + [False] * 4


def test_filters_name_what_they_cannot_judge():
    with pytest.raises(ValueError, match="scores: that of row 2 is nan"):
        varied_groups(SCORES, GROUP, torch.ones_like(LIVE))
    with pytest.raises(ValueError, match="scores: that of row 2 is nan"):
        groups_in_range(SCORES, GROUP, torch.ones_like(LIVE), low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"no mean score lies between 1\.0 and 1\.0"):
        groups_in_range(SCORES, GROUP, LIVE, low=1.0, high=1.0)


rows = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([5, 0, -1]), st.booleans()), min_size=1, max_size=12)


@law
@given(rows, st.data())
def test_filters_keep_whole_groups_by_what_is_live_in_any_order(rows, data):
    def tensors(rows):
        scores = _fp64(*(score if live else NAN for score, _, live in rows))
        return scores, torch.tensor([group for _, group, _ in rows]), torch.tensor([live for _, _, live in rows])

    varied, within = varied_groups(*tensors(rows)), groups_in_range(*tensors(rows), low=0.0, high=1.0)
    for (_, own, _), is_varied, is_within in zip(rows, varied.tolist(), within.tolist(), strict=True):
        members = [score for score, group, live in rows if group == own and live]
        assert is_varied == (len(set(members)) > 1)
        assert is_within == (bool(members) and 0 < sum(members) / len(members) < 1)
    order = data.draw(st.permutations(range(len(rows))))
    assert varied_groups(*tensors([rows[row] for row in order])).tolist() == varied[list(order)].tolist()
