"""Micro-batches: our plan (longest first, best fit) beside first fit in the order of arrival; time, and bins against their lower bound.

The lower bound on bins is the tokens over the cap, rounded up; the roof in time is sorting the lengths, which any plan
that starts with the longest row must do.
"""

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_roof import beside
from hone.learner.packing import plan


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Each row, as it comes, into the first micro-batch it fits."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row, length in enumerate(lengths):
        for index, left in enumerate(room):
            if length <= left:
                bins[index].append(row)
                room[index] -= length
                break
        else:
            bins.append([row])
            room.append(capacity - length)
    return bins


@pytest.mark.parametrize("capacity", [16_384, 32_768])
@pytest.mark.parametrize("rows", [512, 4096])
def test_bins(benchmark: BenchmarkFixture, rows: int, capacity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (1800 * torch.randn(rows, generator=generator).mul(0.75).exp()).long().clamp(16, 16_384).tolist()

    def ours() -> list[list[int]]:
        return plan(lengths, ranks=1, max_tokens=capacity)[0]

    def peer() -> list[list[int]]:
        return first_fit(lengths, capacity)

    for bins in (ours(), peer()):
        assert sorted(row for of_bin in bins for row in of_bin) == list(range(rows))
        assert max(sum(lengths[row] for row in of_bin) for of_bin in bins) <= capacity
    lower_bound = math.ceil(sum(lengths) / capacity)
    assert len(ours()) <= lower_bound + 1
    benchmark.extra_info.update(lower_bound=lower_bound, ours_bins=len(ours()), first_fit_bins=len(peer()))
    beside(benchmark, ours, peers={"first_fit": peer}, roof=lambda: sorted(lengths), rounds=7)
