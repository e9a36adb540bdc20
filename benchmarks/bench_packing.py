"""Micro-batches: our plan beside Karmarkar-Karp, and bins against their lower bound.

N rows, log-normal. The peer balances tokens over k parts without a cap (OpenRLHF's own function, which is verl's); ours
balances costs over k ranks, cuts each rank's rows under the cap, and counts the same on every rank. The roof is sorting the
lengths, which any plan that starts with the longest row must do.
"""

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_roof import beside
from benchmarks.peers import openrlhf
from hone.learner.packing import plan

HIDDEN_SIZE = 4096


def log_normal_lengths(rows: int) -> list[int]:
    """Rows of a median of 2,048 tokens, at most 8,192."""
    generator = torch.Generator().manual_seed(0)
    return (2048 * torch.randn(rows, generator=generator).mul(0.8).exp()).long().clamp(16, 8192).tolist()


def imbalance(loads: list[float]) -> float:
    """How far the heaviest part is above the mean."""
    return max(loads) * len(loads) / sum(loads) - 1


# 64 parts whole, then the parts of 64 ranks under a cap, then one rank's micro-batches.
@pytest.mark.parametrize(("ranks", "capacity"), [(64, 2**20), (64, 16_384), (1, 16_384)])
@pytest.mark.parametrize("rows", [4096])
def test_plan(benchmark: BenchmarkFixture, rows: int, ranks: int, capacity: int) -> None:
    partition = openrlhf("utils/seqlen_balancing.py").get_seqlen_balanced_partitions
    lengths = log_normal_lengths(rows)
    costs = [length * (1 + length / (12 * HIDDEN_SIZE)) for length in lengths]
    bound = math.ceil(sum(lengths) / (ranks * capacity))
    parts = ranks * bound

    def ours() -> list[list[list[int]]]:
        return plan(lengths, ranks=ranks, max_tokens=capacity, hidden_size=HIDDEN_SIZE)

    def peer() -> list[list[int]]:
        return partition(lengths, parts, equal_size=False)

    planned, balanced = ours(), peer()
    of_rank = [[row for micro_batch in micro_batches for row in micro_batch] for micro_batches in planned]
    assert sorted(row for rows_of_rank in of_rank for row in rows_of_rank) == list(range(rows))
    fullest = max(sum(lengths[row] for row in micro_batch) for micro_batches in planned for micro_batch in micro_batches)
    assert fullest <= capacity and len(planned[0]) <= bound + 1
    ours_imbalance = imbalance([sum(costs[row] for row in rows_of_rank) for rows_of_rank in of_rank])
    assert ours_imbalance <= 1e-3
    benchmark.extra_info.update(
        lower_bound=bound,
        ours_micro_batches=len(planned[0]),
        ours_cost_imbalance=ours_imbalance,
        ours_fullest_tokens=fullest,
        karmarkar_karp_fullest_tokens=max(sum(lengths[row] for row in part) for part in balanced),
        karmarkar_karp_cost_imbalance=imbalance([sum(costs[row] for row in part) for part in balanced]),
    )
    repeats = {"rounds": 3} if parts > 100 else {"rounds": 3, "calls": 10}  # ours is under a millisecond there
    beside(benchmark, ours, peers={"karmarkar_karp": peer}, roof=lambda: sorted(lengths), **repeats)
