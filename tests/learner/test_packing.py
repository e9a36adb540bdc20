"""Micro-batches: the cap, every row once, equal counts, and the way back."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.algos.offline import weighed_pairs
from hone.learner.packing import plan, shards, unshard, unshard_rows
from tests.learner.tiny import make_batch


def log_normal(rows: int, *, longest: int = 8192) -> list[int]:
    drawn = longest / 4 * torch.randn(rows, generator=torch.Generator().manual_seed(0)).mul(0.8).exp()
    return drawn.long().clamp(16, longest).tolist()


plans = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5), st.integers(40, 90))


@given(plans)
def test_every_row_once_under_the_cap_with_equal_counts(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    planned = plan(lengths, ranks=ranks, max_tokens=max_tokens)
    assert len(planned) == ranks
    assert len({len(of_rank) for of_rank in planned}) == 1
    for of_rank in planned:
        for micro_batch in of_rank:
            assert 0 < sum(lengths[row] for row in micro_batch) <= max_tokens
    assert {row for of_rank in planned for micro_batch in of_rank for row in micro_batch} == set(range(len(lengths)))


@given(plans)
@settings(max_examples=50)
def test_shards_hold_every_row_once_apart_from_fillers_and_unshard_brings_all_back(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    batch = make_batch(lengths)
    parts = shards(batch, ranks=ranks, max_tokens=max_tokens)
    real = [
        part.rows[row]
        for part in parts
        for index, micro_batch in enumerate(part.micro_batches)
        if index not in part.fillers
        for row in micro_batch
    ]
    assert sorted(real) == list(range(len(lengths)))
    # What a rank computes for a filler means nothing: NaN there must not come back.
    arrays = []
    for part in parts:
        bounds, values = part.batch.cu_seqlens.tolist(), torch.full((int(part.batch.cu_seqlens[-1]),), float("nan"))
        for index, micro_batch in enumerate(part.micro_batches):
            for row in micro_batch if index not in part.fillers else ():
                values[bounds[row] : bounds[row + 1]] = part.batch.tokens[bounds[row] : bounds[row + 1]].float()
        arrays.append(values)
    assert torch.equal(unshard(parts, arrays, cu_seqlens=batch.cu_seqlens), batch.tokens.float())


@given(plans)
@settings(max_examples=50)
def test_results_of_rows_come_back_in_order(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    batch = make_batch(lengths)
    parts = shards(batch, ranks=ranks, max_tokens=max_tokens)
    arrays = []
    for part in parts:
        values = torch.full((part.batch.rows,), float("nan"))  # nobody reads what a filler brings
        values[part.own_rows] = part.batch.group[part.own_rows].float()
        arrays.append(values)
    assert torch.equal(unshard_rows(parts, arrays), batch.group.float())
    with pytest.raises(ValueError, match="rows for shards of"):
        unshard_rows(parts, [*arrays[:-1], arrays[-1][:-1]])


@given(plans)
@settings(max_examples=20)
def test_planning_is_deterministic(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    assert plan(lengths, ranks=ranks, max_tokens=max_tokens) == plan(lengths, ranks=ranks, max_tokens=max_tokens)


def test_a_known_plan() -> None:
    # Longest first to the lighter rank: 8 -> 0, 7 -> 1, 5 -> 1 (7 < 8), 4 -> 0 (8 < 12), 3 -> 0 or 1 at 12 each, attention
    # share 12 = 8 + 4 (80 squares) against 7 + 5 (74 squares): rank 1. Cap 12: rank 1 needs two micro-batches for its 15, 7 and
    # 5 + 3, the heavier first; rank 0 then takes two as well, 8 and 4.
    assert plan([8, 3, 7, 5, 4], ranks=2, max_tokens=12) == [[[0], [4]], [[1, 3], [2]]]


def test_best_fit_where_like_sizes_do_not_fit() -> None:
    # 18 tokens into two of 9: dealt out, 6 | 5, then 3 to 5, 2 to 6, 2 to either at 8 each makes 10. Best fit: 6 + 3 | 5 + 2 + 2.
    assert plan([6, 5, 3, 2, 2], ranks=1, max_tokens=9) == [[[0, 2], [1, 3, 4]]]


@given(plans, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=50)
def test_units_stay_together_and_caps_hold(case: tuple[list[int], int, int], rows_per_unit: int, units: int) -> None:
    lengths, ranks, max_tokens = case[0] * rows_per_unit, case[1], case[2] * rows_per_unit
    planned = plan(lengths, ranks=ranks, max_tokens=max_tokens, rows_per_unit=rows_per_unit, max_rows=units * rows_per_unit)
    assert len({len(of_rank) for of_rank in planned}) == 1
    for micro_batch in (one for of_rank in planned for one in of_rank):
        assert 0 < sum(lengths[row] for row in micro_batch) <= max_tokens
        assert len(micro_batch) <= units * rows_per_unit
        whole = {row // rows_per_unit * rows_per_unit + place for row in micro_batch for place in range(rows_per_unit)}
        assert whole == set(micro_batch) and micro_batch == sorted(micro_batch)
    assert {row for of_rank in planned for one in of_rank for row in one} == set(range(len(lengths)))


def test_fixed_micro_batches_without_a_tokens_need() -> None:
    planned = plan([7, 7, 7, 7, 7, 7, 7], ranks=2, max_tokens=1000, max_rows=2)
    assert [[len(one) for one in of_rank] for of_rank in planned] == [[2, 2], [2, 1]]


def test_a_filler_of_pairs_is_a_pair() -> None:
    parts = shards(weighed_pairs(make_batch([4, 5, 2, 3])), ranks=3, max_tokens=20)
    assert [part.rows for part in parts] == [(0, 1), (2, 3), (2, 3)]
    assert [part.fillers for part in parts] == [frozenset(), frozenset(), frozenset({0})]


def test_costs_of_64_ranks_are_alike_within_a_thousandth_and_bins_within_one_of_their_bound() -> None:
    lengths = log_normal(4096)
    for hidden_size in (896, 4096):
        planned = plan(lengths, ranks=64, max_tokens=16_384, hidden_size=hidden_size)
        costs = [sum(lengths[row] * (1 + lengths[row] / (12 * hidden_size)) for one in of_rank for row in one) for of_rank in planned]
        assert max(costs) <= 1.001 * sum(costs) / 64
        assert len(planned[0]) <= -(-sum(lengths) // (64 * 16_384)) + 1
    (alone,) = plan(lengths, ranks=1, max_tokens=16_384)
    assert len(alone) <= -(-sum(lengths) // 16_384) + 1


def test_attention_makes_a_long_row_dearer_in_a_narrow_model() -> None:
    # 100 tokens at hidden size 1: 100 (1 + 100 / 12) = 933, as 86 rows of 10 at 10 (1 + 10 / 12) = 18.3 are 1577: the one row
    # of 100 stands against 42 of them, and against 10 where attention is nothing.
    lengths = [100, *([10] * 86)]
    narrow, wide = (plan(lengths, ranks=2, max_tokens=2000, hidden_size=size) for size in (1, 10**6))
    assert [len(of_rank[0]) for of_rank in narrow] == [1 + 18, 68]
    assert [len(of_rank[0]) for of_rank in wide] == [1 + 38, 48]


def test_more_ranks_than_rows_get_a_filler_of_the_shortest_row() -> None:
    assert plan([9, 3], ranks=3, max_tokens=10) == [[[0]], [[1]], [[1]]]
    parts = shards(make_batch([9, 3]), ranks=3, max_tokens=10)
    assert [part.fillers for part in parts] == [frozenset(), frozenset(), frozenset({0})]


def test_ranks_are_balanced_within_a_hundredth() -> None:
    lengths = torch.randint(10, 400, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    loads = [sum(part.batch.lengths.tolist()) for part in shards(make_batch(lengths), ranks=4, max_tokens=4096)]
    assert max(loads) <= 1.01 * sum(loads) / 4
    # and the micro-batches are as few as the tokens allow, but for one
    assert len(plan(lengths, ranks=1, max_tokens=4096)[0]) <= -(-sum(lengths) // 4096) + 1


def test_a_row_over_the_cap_names_length_limit_and_flags() -> None:
    with pytest.raises(ValueError, match=r"65 tokens .* 64; raise --train\.max-tokens-per-gpu or lower --rollout\.max-new-tokens"):
        plan([3, 65], ranks=1, max_tokens=64)
    with pytest.raises(ValueError, match="every prompt of the step was dropped"):
        plan([], ranks=1, max_tokens=64)
    with pytest.raises(ValueError, match="2 rows of 65 tokens together do not fit a micro-batch of 64"):
        plan([33, 32], ranks=1, max_tokens=64, rows_per_unit=2)
    with pytest.raises(ValueError, match="3 rows are no whole number of units of 2"):
        plan([3, 3, 3], ranks=1, max_tokens=64, rows_per_unit=2)
    with pytest.raises(ValueError, match=r"1 rows holds no unit of 2; raise --train\.micro-batch-size"):
        plan([3, 3], ranks=1, max_tokens=64, rows_per_unit=2, max_rows=1)


def test_unshard_refuses_arrays_that_do_not_fit() -> None:
    batch = make_batch([4, 5])
    parts = shards(batch, ranks=1, max_tokens=16)
    with pytest.raises(ValueError, match="rank 0 returned"):
        unshard(parts, [torch.zeros(8)], cu_seqlens=batch.cu_seqlens)
    with pytest.raises(ValueError, match="0 arrays for 1 shards"):
        unshard(parts, [], cu_seqlens=batch.cu_seqlens)


def test_a_shard_carries_its_own_rows() -> None:
    batch = dataclasses.replace(make_batch([4, 6, 5]), temperature=0.5)
    (part,) = shards(batch, ranks=1, max_tokens=10)
    assert part.rows == (0, 1, 2)
    assert part.batch.temperature == 0.5
    assert torch.equal(part.batch.tokens, batch.tokens)
