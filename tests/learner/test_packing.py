"""Micro-batches: the cap, every row once, equal counts, and the way back."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.learner.packing import plan, shards, unshard
from tests.learner.tiny import make_batch

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
@settings(max_examples=20)
def test_planning_is_deterministic(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    assert plan(lengths, ranks=ranks, max_tokens=max_tokens) == plan(lengths, ranks=ranks, max_tokens=max_tokens)


def test_a_known_plan() -> None:
    # Longest first to the lighter rank: 8 -> 0, 7 -> 1, 5 -> 1 (7 < 8), 4 -> 0 (8 < 12), 3 -> 0 or 1 at 12 each, attention
    # share 12 = 8 + 4 (80 squares) against 7 + 5 (74 squares): rank 1. Cap 12: rank 0 {8, 4}, rank 1 {7, 5} and {3}.
    assert plan([8, 3, 7, 5, 4], ranks=2, max_tokens=12) == [[[0, 4], [4]], [[2, 3], [1]]]


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
