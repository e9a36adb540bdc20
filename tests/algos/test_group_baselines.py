"""Baselines from a prompt's other samples: golden values of F2, references, and what they share."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import group_centred, group_normalised
from hone.algos.group_baselines import (
    action_counts,
    greedy_baselines,
    greedy_centred,
    group_figures,
    group_index,
    leave_one_out,
    length_weighted_centred,
    max_rl,
    pass_at_k,
    pass_at_k_advantages,
)
from tests.algos.strategies import law
from tests.reference import numpy_baselines, numpy_corrections

NAN = math.nan


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _one_group(rows):
    return torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)


# A score that must not matter stands on a row that is not live, in the middle of F2's group.
SCORES, GROUP, LIVE = _fp64(1.0, 0.0, NAN, 0.5, 0.0), torch.tensor([7, 7, 7, 7, 7]), torch.tensor([True, True, False, True, True])


def test_leave_one_out_golden():
    # Others' means .5/3, 1.5/3, 1/3, 1.5/3; as well 4/3 (r - .375).
    assert_close(leave_one_out(SCORES, GROUP, LIVE), _fp64(5 / 6, -0.5, 0.0, 1 / 6, -0.5))


def test_length_weighted_golden():
    # Lengths 4, 2, 3, 1: b = (4 + 0 + 1.5 + 0) / 10 = .55.
    lengths = torch.tensor([4, 2, 0, 3, 1])
    assert_close(length_weighted_centred(SCORES, GROUP, lengths), _fp64(0.45, -0.55, 0.0, -0.05, -0.55))


def test_max_rl_golden():
    # Mean .375: .625 / .375, -1, .125 / .375, -1.
    assert_close(max_rl(SCORES, GROUP, LIVE, eps=0.0), _fp64(5 / 3, -1.0, 0.0, 1 / 3, -1.0))


@pytest.mark.parametrize(
    ("correct", "rho", "if_correct", "if_wrong"),
    [
        # n = 4, k = 2. c = 1: rho = 1 - 3/6, sigma .5; .5 / .5; (.5 - C(2,1)/C(3,1)) / .5 = -1/3.
        (1, 0.5, 0.999998, -0.333333),
        # c = 2: rho = 1 - 1/6, sigma sqrt(5)/6; (1/6) / sigma; (1/6 - C(1,1)/C(3,1)) / sigma.
        (2, 5 / 6, 0.447212, -0.447212),
        # c = 3: every pair holds a correct one. c = 0: none does.
        (3, 1.0, 0.0, 0.0),
        (0, 0.0, 0.0, 0.0),
    ],
)
def test_pass_at_k_golden(correct, rho, if_correct, if_wrong):
    assert_close(pass_at_k(torch.tensor([correct]), torch.tensor([4]), k=2), _fp64(rho))
    scores = _fp64(*([1.0] * correct + [0.0] * (4 - correct)), NAN)
    live = torch.tensor([True] * 4 + [False])
    expected = _fp64(*([if_correct] * correct + [if_wrong] * (4 - correct)), 0.0)
    assert_close(pass_at_k_advantages(scores, torch.zeros(5, dtype=torch.long), live, k=2, eps=1e-6), expected, rtol=0, atol=1e-6)


def test_greedy_golden_looks_prompts_up_by_id():
    # F2 with b = .25, and a second prompt with b = 2 whose greedy sample comes first.
    scores, group = _fp64(1.0, 0.0, NAN, 0.5, 0.0, 2.0), torch.tensor([7, 7, 7, 7, 7, -1])
    live = torch.tensor([True, True, False, True, True, True])
    greedy_scores, greedy_group = _fp64(2.0, 0.25, 9.0), torch.tensor([-1, 7, 4])
    assert_close(greedy_centred(scores, group, live, greedy_scores, greedy_group), _fp64(0.75, -0.25, 0.0, 0.25, -0.25, 0.0))
    assert_close(greedy_baselines(group, greedy_scores, greedy_group), _fp64(0.25, 0.25, 0.25, 0.25, 0.25, 2.0))


def test_a_prompt_needs_exactly_one_greedy_sample():
    group, live = torch.tensor([3, 5]), torch.tensor([True, True])
    with pytest.raises(ValueError, match="group 5 has no greedy sample; score one response per prompt"):
        greedy_centred(_fp64(1, 1), group, live, _fp64(1, 1), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="greedy_group holds 3 twice"):
        greedy_centred(_fp64(1, 1), group, live, _fp64(1, 1, 1), torch.tensor([3, 5, 3]))
    # A row without action tokens asks for none.
    assert_close(greedy_centred(_fp64(1, 1), group, torch.tensor([True, False]), _fp64(0.5), torch.tensor([3])), _fp64(0.5, 0.0))


def test_scores_that_an_estimator_cannot_use_are_refused():
    group, live = _one_group(2)
    with pytest.raises(ValueError, match=r"scores go down to -1\.0; MaxRL needs them at least 0"):
        max_rl(_fp64(1, -1), group, live, eps=1e-6)
    with pytest.raises(ValueError, match=r"scores hold 0\.5; pass@k needs every one to be 0"):
        pass_at_k_advantages(_fp64(1, 0.5), group, live, k=1, eps=1e-6)
    with pytest.raises(ValueError, match="k is 0; pass@k needs at least 1"):
        pass_at_k_advantages(_fp64(1, 0), group, live, k=0, eps=1e-6)
    for correct in (-1, 5):
        with pytest.raises(ValueError, match=f"correct holds {correct} of 4 samples at index 1"):
            pass_at_k(torch.tensor([4, correct]), torch.tensor([4, 4]), k=2)


def test_action_counts_and_group_index_golden():
    mask = torch.tensor([True, False, True, False, True])
    assert action_counts(mask, torch.tensor([0, 3, 4, 5, 5], dtype=torch.int32)).tolist() == [2, 0, 1, 0]
    assert group_index(torch.tensor([5, -1, 2**40, 5])).tolist() == [1, 0, 2, 1]
    assert group_index(torch.tensor([], dtype=torch.long)).tolist() == []


def _with_lengths(scores, group, live):
    return length_weighted_centred(scores, group, torch.where(live, 1 + torch.arange(scores.numel()) % 3, 0))


ESTIMATORS = {
    "leave_one_out": leave_one_out,
    "length_weighted": _with_lengths,
    "max_rl": lambda *rows: max_rl(*rows, eps=0.0),
    "pass_at_2": lambda *rows: pass_at_k_advantages(*rows, k=2, eps=0.0),
}
every = pytest.mark.parametrize("name", ESTIMATORS)


@every
@pytest.mark.parametrize("rows", [1, 2, 7, 12])
@pytest.mark.parametrize("score", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_and_a_group_of_one_give_exact_zeros(name, rows, score, dtype):
    if name == "pass_at_2" and score == 0.1:
        score = 1.0
    advantages = ESTIMATORS[name](torch.full((rows,), score, dtype=dtype), *_one_group(rows))
    assert advantages.dtype == dtype
    assert (advantages == 0).all()


@every
def test_nothing_live_gives_zeros_and_half_precision_is_promoted(name):
    scores = torch.tensor([NAN, math.inf], dtype=torch.bfloat16)
    advantages = ESTIMATORS[name](scores, torch.tensor([0, 0]), torch.tensor([False, False]))
    assert advantages.tolist() == [0.0, 0.0] and advantages.dtype == torch.float32
    assert ESTIMATORS[name](scores[:0], torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.bool)).shape == (0,)


rows = st.lists(st.tuples(st.booleans(), st.sampled_from([5, 0, 2**40, -1]), st.booleans()), min_size=1, max_size=12)
REFERENCES = {
    "leave_one_out": lambda *rows: numpy_baselines.per_group(*rows, numpy_baselines.leave_one_out),
    "length_weighted": lambda scores, group, live: numpy_baselines.length_weighted(
        scores, group, [(1 + row % 3) * its for row, its in enumerate(live)]
    ),
    "max_rl": lambda *rows: numpy_baselines.per_group(*rows, functools.partial(numpy_baselines.max_rl, eps=0.0)),
    "pass_at_2": lambda *rows: numpy_baselines.per_group(*rows, functools.partial(numpy_baselines.pass_at_k, k=2, eps=0.0)),
}


def _tensors(rows):
    scores = _fp64(*(float(score) if live else NAN for score, _, live in rows))
    return scores, torch.tensor([group for _, group, _ in rows]), torch.tensor([live for _, _, live in rows])


@every
@law
@given(rows=rows)
def test_every_estimator_equals_its_reference(name, rows):
    scores, group, live = ([row[column] for row in rows] for column in range(3))
    expected = REFERENCES[name]([float(score) for score in scores], group, live)
    assert_close(ESTIMATORS[name](*_tensors(rows)), _fp64(*expected), rtol=1e-9, atol=1e-12)


@law
@given(rows, st.integers(1, 6))
def test_pass_at_k_equals_the_enumeration_of_sets(rows, k):
    scores, group, live = _tensors(rows)
    expected = numpy_baselines.per_group(
        [float(row[0]) for row in rows], group.tolist(), live.tolist(), functools.partial(numpy_baselines.pass_at_k, k=k, eps=1e-6)
    )
    assert_close(pass_at_k_advantages(scores, group, live, k=k, eps=1e-6), _fp64(*expected), rtol=1e-9, atol=1e-9)


@every
@law
@given(rows=rows, data=st.data())
def test_the_order_of_rows_does_not_matter(name, rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    scores, group, live = _tensors(rows)
    # Equal lengths, so that a row's own does not move with its place.
    estimator = (lambda s, g, m: length_weighted_centred(s, g, m.long())) if name == "length_weighted" else ESTIMATORS[name]
    assert_close(estimator(scores[list(order)], group[list(order)], live[list(order)]), estimator(scores, group, live)[list(order)])


@law
@given(rows, st.floats(-100, 100), st.floats(0.01, 100))
def test_shifts_and_scales_and_how_the_estimators_relate(rows, shift, scale):
    scores, group, live = _tensors(rows)
    for name in ("leave_one_out", "length_weighted"):
        assert_close(ESTIMATORS[name](scores + shift, group, live), ESTIMATORS[name](scores, group, live), rtol=0, atol=1e-9)
    assert_close(ESTIMATORS["max_rl"](scale * scores, group, live), ESTIMATORS["max_rl"](scores, group, live))
    own, ids = scores[live], group[live]
    centred = group_centred(own, ids)
    size = _fp64(*(int((ids == one).sum()) for one in ids))
    assert_close((size - 1) / size * leave_one_out(scores, group, live)[live], centred)  # Dr. GRPO
    mean = own - centred
    assert_close(ESTIMATORS["max_rl"](scores, group, live)[live] * mean, centred)
    assert_close(length_weighted_centred(scores, group, 3 * live.long())[live], centred)
    # Pass@1 is GRPO with the population's deviation: sqrt((n - 1) / n) of Bessel's.
    grpo = group_normalised(own, ids, eps=0.0) * (size / (size - 1).clamp(min=1)).sqrt()
    assert_close(pass_at_k_advantages(scores, group, live, k=1, eps=0.0)[live], grpo)


@every
def test_advantages_are_constants_and_nan_is_refused(name):
    scores = _fp64(1.0, 0.0, 1.0).requires_grad_()
    group, live = _one_group(3)
    assert not ESTIMATORS[name](scores, group, live).requires_grad
    with pytest.raises(ValueError, match="scores"):
        ESTIMATORS[name](_fp64(1.0, NAN, 0.0), group, live)


def _counts(*rows):
    return {name: int(count) for name, count in group_figures(*rows).items()}


def test_groups_that_teach_nothing_are_counted_golden():
    # Groups 5 (1, 0), -1 (.1 three times, and a row that is not live), 2^40 (one live row), 0 (no live row), 7 (one).
    scores = _fp64(1.0, 0.1, 0.0, 0.1, NAN, 0.1, 3.0, 2.0, NAN, 1.0)
    group = torch.tensor([5, -1, 5, -1, -1, -1, 2**40, 2**40, 0, 7])
    live = torch.tensor([True, True, True, True, False, True, True, False, False, True])
    assert _counts(scores, group, live) == {"groups": 4, "groups_of_one": 2, "groups_of_equals": 1}
    assert _counts(scores, group, torch.zeros_like(live)) == {"groups": 0, "groups_of_one": 0, "groups_of_equals": 0}
    # Equal in the precision they are given in: seven thirds are equal, and 1 and 1 + 1e-12 are not.
    one = torch.zeros(7, dtype=torch.long)
    assert _counts(torch.full((7,), 1 / 3), one, one == 0)["groups_of_equals"] == 1
    assert _counts(_fp64(1.0, 1.0 + 1e-12), one[:2], one[:2] == 0)["groups_of_equals"] == 0


@law
@given(rows=rows, data=st.data())
def test_the_counts_of_groups_equal_the_reference_in_any_order(rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    scores, group, live = _tensors(rows)
    expected = numpy_corrections.group_figures(*([row[column] for row in rows] for column in range(3)))
    assert _counts(scores, group, live) == _counts(scores[list(order)], group[list(order)], live[list(order)]) == expected
    taught_nothing = torch.tensor(
        [bool((leave_one_out(scores, group, live)[live & (group == own)] == 0).all()) for own in group[live].unique()]
    )
    assert int(taught_nothing.sum()) == expected["groups_of_one"] + expected["groups_of_equals"]


def test_a_greedy_baseline_refuses_a_score_that_is_no_number():
    group, greedy = torch.tensor([3, 3]), (_fp64(0.5), torch.tensor([3]))
    with pytest.raises(ValueError, match="greedy_centred: 1 of 1 scores are not finite, at index 1 nan; mend the reward function"):
        greedy_centred(_fp64(NAN, NAN), group, torch.tensor([False, True]), *greedy)
