"""Advantages and returns: golden values of F2 and F3, references, and laws."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae, group_centred, group_index, group_normalised, row_sums, spread, whiten
from hone.algos.batch import select
from hone.algos.kernels import plain
from hone.algos.reduce import Reduction
from tests.algos.strategies import law, masks, poisoned, scored_batch, scored_batches
from tests.reference import numpy_algos
from tests.reference.fixtures import f2, f3, scatter

unit = st.floats(0.0, 1.0)


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gamma", "lambd", "expected"),
    [
        # From the end: 1 - .7 = .3; .7 - .4 + .95 .3 = .585; over the gap .4 - .6 + .95 .585 = .35575; .6 - .5 + .95 .35575.
        (1.0, 0.95, [0.4379625, 0.35575, 0.0, 0.585, 0.3]),
        (0.99, 0.95, [0.410881, 0.336929, 0.0, 0.575150, 0.3]),
        (1.0, 1.0, [0.5, 0.4, 0.0, 0.6, 0.3]),  # return 1 less the value
    ],
)
def test_gae_golden_carries_over_the_gap(gamma, lambd, expected):
    rewards, values, mask, cu_seqlens = f3()
    advantages, returns = gae(rewards, values, mask, cu_seqlens, gamma=gamma, lambd=lambd)
    assert_close(advantages, _fp64(*expected), rtol=0, atol=1e-6)
    assert_close(returns, torch.where(mask, _fp64(*expected) + torch.nan_to_num(values), 0.0), rtol=0, atol=1e-6)


def test_gae_golden_bootstraps_a_row_that_was_cut():
    rewards, values, mask, cu_seqlens = f3()
    # r = 0, value after the cut .3: .3 - .7 = -.4; .3 + .95 -.4 = -.08; -.2 + .95 -.08 = -.276; .1 + .95 -.276 = -.1622.
    advantages, _ = gae(0 * rewards, values, mask, cu_seqlens, gamma=1.0, lambd=0.95, bootstrap=_fp64(0.3))
    assert_close(advantages, _fp64(-0.1622, -0.276, 0.0, -0.08, -0.4))


def test_discounted_returns_golden_does_not_discount_the_gap():
    rewards, _, mask, cu_seqlens = f3()
    assert_close(discounted_returns(rewards, mask, cu_seqlens, gamma=0.9), _fp64(0.729, 0.81, 0.0, 0.9, 1.0))


@pytest.mark.parametrize(
    ("eps", "expected"),
    [(1e-6, [1.305580, -0.783348, 0.261116, -0.783348]), (1e-4, [1.305310, -0.783186, 0.261062, -0.783186])],
)
def test_group_normalised_golden(eps, expected):
    assert_close(group_normalised(f2(), torch.zeros(4, dtype=torch.long), eps=eps), _fp64(*expected), rtol=0, atol=1e-6)


def test_group_centred_golden():
    assert_close(group_centred(f2(), torch.zeros(4, dtype=torch.long)), _fp64(0.625, -0.375, 0.125, -0.375))  # mean .375


def test_one_success_in_eight_golden():
    scores = torch.tensor([1.0] + [0.0] * 7)
    advantages = group_normalised(scores, torch.zeros(8, dtype=torch.long), eps=0.0)
    assert_close(advantages, torch.tensor([2.474874] + [-0.353553] * 7))  # 7/8 and 1/8 over sqrt(1/8)


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_give_exact_zeros_though_their_mean_is_not_exact(count, dtype):
    scores, group = torch.full((count,), 0.1, dtype=dtype), torch.zeros(count, dtype=torch.long)
    assert (group_normalised(scores, group, eps=0.0) == 0).all()
    assert (group_centred(scores, group) == 0).all()


def test_group_functions_refuse_a_score_that_is_not_finite():
    scores, group = torch.tensor([1.0, math.nan, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    for call in (lambda: group_centred(scores, group), lambda: group_normalised(scores, group, eps=1e-6)):
        with pytest.raises(ValueError, match="1 of 4 scores are not finite, at index 1 nan"):
            call()


def test_whiten_golden_divides_by_the_count():
    mask = torch.tensor([True, True, False, True, True, True])
    whitened = whiten(scatter(_fp64(1, 2, 3, 4, 5), mask), mask)
    root2 = math.sqrt(2)  # variance (4 + 1 + 0 + 1 + 4) / 5 = 2
    assert_close(whitened, _fp64(-root2, -root2 / 2, 0.0, 0.0, root2 / 2, root2))


def test_whiten_keeps_its_accuracy_far_from_zero():
    mask = torch.ones(4, dtype=torch.bool)
    # E[x^2] - mean^2 in fp32 would answer 0 or below here.
    assert_close(whiten(torch.tensor([4096.0, 4097.0, 4096.0, 4097.0]), mask), torch.tensor([-1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_whiten_of_nothing_or_of_equal_numbers_is_exactly_zero(count):
    mask = torch.tensor([False] + [True] * count)
    # Seven copies of this number have a mean off by 1e-10 in fp64.
    assert (whiten(scatter(torch.full((count,), 1e6 + 0.1, dtype=torch.float64), mask), mask) == 0).all()


def test_row_sums_and_spread_golden():
    mask, cu_seqlens = torch.tensor([True, False, True, False, True]), torch.tensor([0, 3, 4, 5], dtype=torch.int32)
    rewards = torch.tensor([1.0, math.nan, 0.5, math.inf, 2.0])
    sums = row_sums(rewards, mask, cu_seqlens)
    assert_close(sums, torch.tensor([1.5, 0.0, 2.0]))
    assert_close(spread(sums, mask, cu_seqlens), torch.tensor([1.5, 0.0, 1.5, 0.0, 2.0]))


@law
@given(scored_batches(), unit, unit)
def test_gae_equals_the_reference_whatever_stands_off_the_mask(batch, gamma, lambd):
    dirty = poisoned(batch)
    after = torch.arange(batch.rows, dtype=torch.float64)
    advantages, returns = gae(dirty.rewards, dirty.values, dirty.action_mask, dirty.cu_seqlens, gamma=gamma, lambd=lambd, bootstrap=after)
    for row in range(batch.rows):
        own = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        mask = batch.action_mask[own]
        rewards, values = batch.rewards[own][mask].tolist(), batch.values[own][mask].tolist()
        expected = numpy_algos.gae(rewards, values, gamma=gamma, lambd=lambd, value_after=float(row))
        assert_close(advantages[own][mask], _fp64(*expected))
        assert_close(returns[own][mask], _fp64(*expected) + _fp64(*values))
    assert (advantages[~batch.action_mask] == 0).all() and (returns[~batch.action_mask] == 0).all()


@law
@given(scored_batches(), unit)
def test_gae_with_lambda_one_is_the_return_less_the_value(batch, gamma):
    rows = (batch.action_mask, batch.cu_seqlens)
    to_go = discounted_returns(batch.rewards, *rows, gamma=gamma)
    advantages, returns = gae(batch.rewards, torch.zeros_like(batch.values), *rows, gamma=gamma, lambd=1.0)
    assert_close(advantages, to_go)
    assert_close(returns, to_go)
    _, returns_whatever_the_critic = gae(batch.rewards, batch.values, *rows, gamma=gamma, lambd=1.0)
    assert_close(returns_whatever_the_critic, to_go)


@law
@given(scored_batches(), unit)
def test_discounted_returns_equal_the_reference(batch, gamma):
    to_go = discounted_returns(batch.rewards, batch.action_mask, batch.cu_seqlens, gamma=gamma)
    for row in range(batch.rows):
        own = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        mask = batch.action_mask[own]
        assert_close(to_go[own][mask], _fp64(*numpy_algos.returns(batch.rewards[own][mask].tolist(), gamma=gamma)))


@law
@given(scored_batches(), unit, st.data())
def test_a_lambda_per_row_equals_the_reference_whatever_stands_off_the_mask(batch, gamma, data):
    lambd = data.draw(st.lists(unit, min_size=batch.rows, max_size=batch.rows))
    dirty, after = poisoned(batch), torch.arange(batch.rows, dtype=torch.float64)
    advantages, returns = gae(
        dirty.rewards, dirty.values, dirty.action_mask, dirty.cu_seqlens, gamma=gamma, lambd=_fp64(*lambd), bootstrap=after
    )
    for row in range(batch.rows):
        own = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        mask = batch.action_mask[own]
        rewards, values = batch.rewards[own][mask].tolist(), batch.values[own][mask].tolist()
        expected = numpy_algos.gae(rewards, values, gamma=gamma, lambd=lambd[row], value_after=float(row))
        assert_close(advantages[own][mask], _fp64(*expected))
        assert_close(returns[own][mask], _fp64(*expected) + _fp64(*values))
    assert (advantages[~batch.action_mask] == 0).all() and (returns[~batch.action_mask] == 0).all()


@pytest.mark.parametrize("block", [2**18, 64, 7])
def test_gae_of_rows_that_span_chunks_and_blocks_equals_the_reference(monkeypatch, block):
    monkeypatch.setattr(plain, "BLOCK_TOKENS", block)
    rows = [[True] * 300, [False, True] * 20, [True], [False], [False] * 50 + [True] * 50]
    batch = poisoned(scored_batch(rows, Reduction(), seed=0))
    lambd, after = [0.97, 0.5, 1.0, 0.3, 0.0], [0.0, 2.0, -1.0, 5.0, 0.5]
    per_row = {"lambd": _fp64(*lambd), "bootstrap": _fp64(*after)}
    advantages, returns = gae(batch.rewards, batch.values, batch.action_mask, batch.cu_seqlens, gamma=0.999, **per_row)
    for row, (start, stop) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        mask = batch.action_mask[start:stop]
        rewards, values = batch.rewards[start:stop][mask].tolist(), batch.values[start:stop][mask].tolist()
        expected = _fp64(*numpy_algos.gae(rewards, values, gamma=0.999, lambd=lambd[row], value_after=after[row]))
        assert_close(advantages[start:stop][mask], expected, rtol=1e-12, atol=1e-12)
        assert_close(returns[start:stop][mask], expected + _fp64(*values), rtol=1e-12, atol=1e-12)
    assert (advantages[~batch.action_mask] == 0).all() and (returns[~batch.action_mask] == 0).all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name_on_the_mask_only(number):
    batch = scored_batch([[True, False, True], [True]], Reduction(), seed=0)
    for token, on_mask in ((1, False), (2, True)):
        broken = batch.rewards.clone()
        broken[token] = number
        calls = {
            "rewards": lambda broken=broken: gae(broken, batch.values, batch.action_mask, batch.cu_seqlens, gamma=0.9, lambd=0.9),
            "values": lambda broken=broken: gae(batch.rewards, broken, batch.action_mask, batch.cu_seqlens, gamma=0.9, lambd=0.9),
            "rewards ": lambda broken=broken: discounted_returns(broken, batch.action_mask, batch.cu_seqlens, gamma=0.9),
        }
        for name, call in calls.items():
            if on_mask:
                with pytest.raises(ValueError, match=f"1 of 3 {name.strip()} are not finite, at index 2 {number}"):
                    call()
            else:
                call()


def test_gae_of_nothing_is_nothing():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    for bounds in ([0], [0, 0, 0]):
        advantages, returns = gae(empty, empty, none, torch.tensor(bounds), gamma=0.9, lambd=0.9)
        assert advantages.shape == returns.shape == (0,)


def test_empty_rows_between_others_are_skipped():
    ones, mask = torch.ones(3), torch.tensor([True, True, True])
    bounds, after = torch.tensor([0, 0, 2, 2, 3, 3]), torch.tensor([9.0, 0.0, 9.0, 4.0, 9.0])
    to_go, _ = gae(ones, 0 * ones, mask, bounds, gamma=0.5, lambd=1.0, bootstrap=after)
    assert_close(to_go, torch.tensor([1.5, 1.0, 3.0]))  # 1 + 1 / 2, 1; 1 + 4 / 2


@law
@given(scored_batches(), st.randoms(use_true_random=False))
def test_advantages_do_not_depend_on_the_order_of_rows(batch, random):
    order = random.sample(range(batch.rows), batch.rows)
    moved = select(batch, order)
    before = gae(batch.rewards, batch.values, batch.action_mask, batch.cu_seqlens, gamma=0.9, lambd=0.8)
    after = gae(moved.rewards, moved.values, moved.action_mask, moved.cu_seqlens, gamma=0.9, lambd=0.8)
    tokens = torch.cat([torch.arange(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1])) for row in order])
    for one, other in zip(before, after, strict=True):
        assert_close(one[tokens], other)
    assert_close(whiten(batch.advantages, batch.action_mask)[tokens], whiten(moved.advantages, moved.action_mask))


groups = st.lists(st.tuples(st.integers(-3, 3).map(lambda k: k / 2), st.sampled_from([5, 0, 2**40, -1])), min_size=1, max_size=12)


@law
@given(groups, st.floats(-100, 100))
def test_group_advantages_equal_the_reference_and_ignore_a_constant_shift(rows, shift):
    scores, group = _fp64(*(score for score, _ in rows)), torch.tensor([group for _, group in rows])
    expected = numpy_algos.group_normalised(scores.tolist(), group.tolist(), eps=1e-6)
    assert_close(group_normalised(scores, group, eps=1e-6), _fp64(*expected))
    constant = group_normalised(scores, group, eps=1e-6) == 0
    for function in (group_centred, lambda scores, group: group_normalised(scores, group, eps=1e-6)):
        assert_close(function(scores + shift, group), function(scores, group), rtol=0, atol=1e-9)
        assert_close(function(scores, group).sum(), _fp64(0.0).squeeze(), rtol=0, atol=1e-9)
    assert (group_centred(scores, group)[constant] == 0).all()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, -1, 2**40, 5], [1, 0, 2, 1]),  # sorted
        ([9, 0, 2, 9, 2], [2, 0, 1, 2, 1]),  # counted
        ([3, 3], [0, 0]),
        ([], []),
    ],
)
def test_group_index_golden(ids, expected):
    assert group_index(torch.tensor(ids, dtype=torch.long)).tolist() == expected
    assert group_index(torch.tensor(ids, dtype=torch.long)).dtype == torch.long


@pytest.mark.parametrize("ids", [[7, 0, 7, 3, 0, 3], [70, 0, 70, 30, 0, 30], [2**40, -5, 2**40, 0, -5, 0]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_groups_are_told_by_any_ids(ids, dtype):
    if dtype == torch.int32:
        ids = [min(number, 2**31 - 1) for number in ids]
    scores, group = _fp64(1.0, 5.0, 0.0, 2.0, 3.0, 2.0), torch.tensor(ids, dtype=dtype)
    assert_close(group_centred(scores, group), _fp64(0.5, 1.0, -0.5, 0.0, -1.0, 0.0))
    root = math.sqrt(2)  # spreads 1 and 2 of two: deviations 1 / sqrt 2 and sqrt 2
    assert_close(group_normalised(scores, group, eps=0.0), _fp64(root / 2, root / 2, -root / 2, 0.0, -root / 2, 0.0))


@law
@given(masks, st.integers(0, 99))
def test_whitened_advantages_have_mean_zero_and_variance_one(rows, seed):
    batch = poisoned(scored_batch(rows, Reduction(), seed=seed))
    whitened = whiten(batch.advantages, batch.action_mask)[batch.action_mask]
    if whitened.numel() > 1:
        assert_close(whitened.mean(), _fp64(0.0).squeeze(), rtol=0, atol=1e-9)
        assert_close(whitened.var(correction=0), _fp64(1.0).squeeze())


def test_advantages_are_constants():
    rewards, values, mask, cu_seqlens = f3()
    advantages, returns = gae(rewards, values.requires_grad_(), mask, cu_seqlens, gamma=1.0, lambd=1.0)
    assert not advantages.requires_grad and not returns.requires_grad
