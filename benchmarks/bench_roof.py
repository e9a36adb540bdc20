"""What this machine can do, and the one way the other benchmarks compare: ours, peers and a roof in turn, in one process.

Flow: `beside` times ours with pytest-benchmark; before each of its rounds every peer and the roof run once. A neighbour
that slows the machine then slows all of them, and ratios of medians mean something where seconds do not.
"""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
"""For `pytest.mark.parametrize("device", DEVICES)`."""


def beside(
    benchmark: BenchmarkFixture,
    ours: Callable[[], object],
    *,
    peers: Mapping[str, Callable[[], object]],
    roof: Callable[[], object],
    rounds: int,
    calls: int = 1,
    device: str = "cpu",
) -> None:
    """Times all of them; `extra_info` gets milliseconds, `times_slower_than_ours_<peer>`, and `share_of_roof` = roof / ours.

    Times are medians over calls. A round makes `calls` of them in a row, ours and others alike: more than one for what takes
    a few milliseconds or less, where the first call after another's turn mostly meets cold caches and memory that the system
    has to hand out anew. `ours_first_call_ms` tells what that one takes.

    No warm-up round: the caller has run ours and the peers once, to assert that they agree. On CUDA a call ends when the
    device has finished.
    """

    def timed(function: Callable[[], object]) -> list[float]:
        """Seconds of each call."""
        ends = [time.perf_counter()]
        for _ in range(calls):
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
        return [end - start for start, end in pairwise(ends)]

    others = {**peers, "roof": roof}
    seconds: dict[str, list[float]] = {name: [] for name in others}
    own_seconds: list[float] = []

    def time_the_others() -> None:
        for name, function in others.items():
            seconds[name] += timed(function)

    benchmark.pedantic(lambda: own_seconds.extend(timed(ours)), setup=time_the_others, rounds=rounds)
    ours_s = median(own_seconds)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["calls_per_round"] = calls
    benchmark.extra_info["ours_ms"] = 1e3 * ours_s
    benchmark.extra_info["ours_first_call_ms"] = 1e3 * median(own_seconds[::calls])
    for name in others:
        benchmark.extra_info[f"{name}_ms"] = 1e3 * median(seconds[name])
    for name in peers:
        benchmark.extra_info[f"times_slower_than_ours_{name}"] = median(seconds[name]) / ours_s
    benchmark.extra_info["share_of_roof"] = median(seconds["roof"]) / ours_s


@pytest.mark.parametrize("device", DEVICES)
def test_memory_copy(benchmark: BenchmarkFixture, device: str) -> None:
    source = torch.ones(16 * 2**20, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(copy, rounds=15, warmup_rounds=1)
    assert torch.equal(source, target)
    benchmark.extra_info["gb_per_s_read_and_written"] = 2 * source.nbytes / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matrix_product(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    side = 1536
    left = torch.ones(side, side, dtype=dtype)
    product = benchmark.pedantic(torch.matmul, args=(left, left), rounds=7, warmup_rounds=1)
    assert bool((product == side).all())
    benchmark.extra_info["gflop_per_s"] = 2 * side**3 / benchmark.stats.stats.median / 1e9
