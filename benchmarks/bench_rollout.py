"""What lies around an engine: a rollout through its executor beside the engine's own calls for the same requests.

The roof is the engine alone, asked at once for what the rollout asks it for. `overhead_share` is what the rollout takes longer, as a
share of it; `lag_p99_ms` how late the event loop comes to a clock that ticks every 10 ms while the rollout goes on. A fake engine's
latency is log-normal (sigma 1) with the median that is named; agents over HTTP share the process, and its cores, with the endpoint.
"""

import asyncio
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_roof import beside
from hone.rollout.config import RolloutConfig, VLLMConfig
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.executor import SingleTurn
from hone.rollout.types import Completion, Prompt, Request
from tests.rollout import loads

MEDIAN_S = 4.0
LONGEST_S = 40.0


class Asked:
    """Passes requests on to an engine and keeps them, call by call."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name = engine, engine.name
        self.calls: list[Sequence[Request]] = []

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The engine's own answer."""
        self.calls.append(requests)
        return await self.engine.generate(requests)


def measured(benchmark: BenchmarkFixture, runner: asyncio.Runner, executor: Any, prompts: Sequence[Prompt], *, rounds: int) -> None:
    """Times `executor` beside its engine alone; a rollout of several calls an episode waits for each, and so does the engine alone."""
    engine, held = executor.engine, []
    asked = Asked(engine)
    object.__setattr__(executor, "engine", asked)
    runner.run(executor.collect(prompts, step=0))
    object.__setattr__(executor, "engine", engine)
    episodes: dict[str, list[Sequence[Request]]] = {}
    for call in asked.calls:
        prompt = re.split("[:#@]", call[0].request_id)[1]
        episodes.setdefault(prompt, []).append(call)
    assert len(episodes) == len(prompts)

    async def episode(calls: list[Sequence[Request]]) -> None:
        for call in calls:
            await engine.generate(call)

    async def alone() -> None:
        await asyncio.gather(*(episode(calls) for calls in episodes.values()))

    async def ours() -> None:
        async with loads.watched() as seen:
            groups = await executor.collect(prompts, step=0)
        assert [group.prompt for group in groups] == list(prompts)
        held.append(seen)

    beside(benchmark, lambda: runner.run(ours()), peers={}, roof=lambda: runner.run(alone()), rounds=rounds)
    info = benchmark.extra_info
    info.update(
        prompts=len(prompts),
        calls=len(asked.calls),
        overhead_share=1 - info["share_of_roof"],
        lag_p99_ms=1e3 * max(seen.lag_s(0.99) for seen in held),
        lag_most_ms=1e3 * max(max(seen.lags) for seen in held),
        memory_mib=max(seen.memory for seen in held) / 2**20,
        descriptors=max(seen.descriptors for seen in held),
    )


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_ten_thousand_samples(benchmark: BenchmarkFixture, runner: asyncio.Runner) -> None:
    executor = loads.single_turn(median_s=MEDIAN_S, longest_s=LONGEST_S)
    measured(benchmark, runner, executor, loads.prompts(10_000), rounds=1)


def test_a_thousand_episodes(benchmark: BenchmarkFixture, runner: asyncio.Runner) -> None:
    executor = loads.multi_turn(median_s=MEDIAN_S / 2, longest_s=LONGEST_S / 2)
    measured(benchmark, runner, executor, loads.prompts(1_000), rounds=1)


def test_a_thousand_agents(benchmark: BenchmarkFixture, runner: asyncio.Runner) -> None:
    executor = loads.calling(loads.Visitors(), agents=1_000, median_s=MEDIAN_S / 2, longest_s=LONGEST_S / 2)
    measured(benchmark, runner, executor, loads.prompts(1_000), rounds=1)


@pytest.fixture(scope="module")
def vllm() -> Iterator[tuple[asyncio.Runner, VLLMEngine]]:
    from tests.rollout.conftest import tiny_model

    with tempfile.TemporaryDirectory(prefix="hone-bench-") as directory, asyncio.Runner() as runner:
        tiny_model("untied", Path(directory))

        async def started() -> VLLMEngine:
            return VLLMEngine(
                model=directory,
                name="vllm",
                config=VLLMConfig(kv_cache_gib=0.5),
                max_model_len=512,
                dtype="float32",
                backend="nccl" if torch.cuda.is_available() else "shared_memory",
                threads=os.cpu_count() or 1,
            )

        engine = runner.run(started())
        yield runner, engine
        runner.run(engine.shutdown())


def test_vllm(benchmark: BenchmarkFixture, vllm: tuple[asyncio.Runner, VLLMEngine]) -> None:
    runner, engine = vllm
    prompts = [Prompt(prompt_id=str(index), tokens=tuple(range(3, 23 + index % 8)), text="", label=None) for index in range(32)]
    executor = SingleTurn(
        engine=engine,
        judge=loads.Length(),
        tokenizer=loads.Points(),
        config=RolloutConfig(n_samples_per_prompt=8, max_new_tokens=64),
        run_seed=1,
        max_len=256,
        **loads.NAMES,
    )
    measured(benchmark, runner, executor, prompts, rounds=7)
