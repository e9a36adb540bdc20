"""The loop's thread, and the asynchronous loop over parts of paper: real producer, real buffer, real threads."""

import asyncio
import contextlib
import dataclasses
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from hone.algos.algorithms import ALGORITHMS
from hone.algos.batch import Batch, Scored
from hone.algos.protocol import Algorithm
from hone.launch.ahead import Ahead, LoopThread
from hone.launch.gap import GapExceeded
from hone.launch.train import Start
from hone.launch.train_async import train_async
from hone.rollout.buffer import Buffer, Window
from hone.rollout.executor import Group
from hone.rollout.producer import Kept, Producer
from hone.rollout.types import Prompt
from tests.rollout.test_buffer import group_of, prompt_of


def test_what_was_started_goes_on_between_two_calls() -> None:
    runner = LoopThread()
    reached = threading.Event()

    async def begin() -> asyncio.Task[None]:
        async def later() -> None:
            await asyncio.sleep(0)
            reached.set()

        return asyncio.ensure_future(later())

    task = runner.run(begin())
    assert reached.wait(30) and task is not None
    runner.close()


def test_a_coroutines_error_is_the_callers_and_closing_ends_what_still_runs() -> None:
    runner, ended = LoopThread(), threading.Event()

    async def fail() -> None:
        raise KeyError("no such prompt")

    async def hang() -> None:
        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        hung.append(asyncio.ensure_future(forever()))
        await asyncio.sleep(0)

    hung: list[asyncio.Future[None]] = []
    with pytest.raises(KeyError, match="no such prompt"):
        runner.run(fail())
    runner.run(hang())
    runner.close()
    assert ended.is_set() and not [thread for thread in threading.enumerate() if thread.name == "hone-rollout"]


class Paper:
    """Parts whose learner only counts; the executor's engine serves what was last published."""

    def __init__(self, chance: random.Random) -> None:
        self.version, self._chance, self.learnt, self.asked = -1, chance, 0, list[tuple[str, int]]()

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Any = None) -> list[Group]:
        (prompt,) = prompts
        self.asked.append((prompt.prompt_id, step))
        version = self.version
        await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.02]))
        return [group_of(prompt, version=version, samples=2)]

    def prompts(self) -> Iterator[list[Prompt]]:
        raise AssertionError("the producer draws")

    def act(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        raise AssertionError("the producer acts")

    def recompute(self, batch: Batch, needs: frozenset[str]) -> Batch:
        return dataclasses.replace(batch, old_logp=batch.rollout_logp, ref_logp=batch.rollout_logp)

    def learn(self, scored: Scored, algo: Algorithm, *, policy_too: bool) -> dict[str, float]:
        self.learnt += 1
        return {"policy_loss": 0.0}

    def publish(self, *, version: int) -> dict[str, float]:
        self.version = version
        return {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def measured(self, batch: Batch) -> dict[str, float]:
        return {}


def session(
    paper: Paper, window: Window, *, first: int = 0, kept: Kept | None = None, drawn: int = 0
) -> tuple[Ahead, list[str], list[str]]:
    issued, dropped = [f"p{number}" for number in range(drawn)], list[str]()

    def draw(step: int) -> Prompt | None:
        issued.append(f"p{len(issued)}")
        return prompt_of(len(issued) - 1)

    producer = Producer(
        executor=paper,
        buffer=Buffer(window, version=first, taken=first),
        draw=draw,
        dropped=lambda prompt_id, step, reason: dropped.append(prompt_id),
        stragglers="reissue",
    )
    if kept is not None:
        producer.put_back(kept)
    return Ahead(producer=producer, runner=LoopThread()), issued, dropped


@contextlib.contextmanager
def ended(ahead: Ahead, reason: str) -> Iterator[None]:
    yield
    ahead.end(reason)
    ahead.runner.close()


@pytest.mark.parametrize(("queue", "extra"), [(1, 0), (2, 0), (1, 2)])
def test_the_loop_keeps_the_bound_and_the_ledger_and_a_run_taken_up_again_goes_on(queue: int, extra: int) -> None:
    paper, algo = Paper(random.Random(queue)), ALGORITHMS["grpo"]()
    window = Window(batch=3, ahead=queue, staleness=queue + (extra > 0), extra=extra, last_step=12)
    ahead, issued, dropped = session(paper, window)
    how = {"batch_size": 6, "max_epochs": 1, "max_steps": 12, "critic_only_steps": 0, "seed": 0}
    trained, lags = list[str](), list[float]()
    kept, drawn, dropped_then, shuffle = Kept(groups=[], prompts=[]), 0, list[str](), b""
    with ended(ahead, ""):
        for step in train_async(algo, paper, rollout=ahead, **how):  # pyright: ignore[reportArgumentType]
            trained += [group.prompt.prompt_id for group in step.groups]
            lags.append(step.metrics["staleness/version_lag_max"])
            if step.number == 5:
                kept, drawn, dropped_then = ahead.at_rest(lambda found: (found, len(issued), list(dropped)))
                shuffle = step.shuffle
                break
    first_issued = issued[:drawn]
    still = [group.prompt.prompt_id for group in kept.groups] + [prompt.prompt_id for prompt in kept.prompts]
    assert sorted(trained + dropped_then + still) == sorted(first_issued)

    paper.version = -1
    ahead, issued, dropped = session(paper, window, first=5, kept=kept, drawn=drawn)
    with ended(ahead, "over"):
        for step in train_async(algo, paper, rollout=ahead, start=Start(step=5, shuffle=shuffle), **how):  # pyright: ignore[reportArgumentType]
            trained += [group.prompt.prompt_id for group in step.groups]
            lags.append(step.metrics["staleness/version_lag_max"])
    assert len(lags) == 12 and max(lags) <= window.staleness and len(trained) == 36
    assert sorted(trained + dropped_then + dropped) == sorted(issued)
    if not extra:
        assert max(lags) >= 1  # it was ahead


def test_a_batch_beyond_the_gate_is_not_learnt_from_and_its_age_is_named() -> None:
    class Aging(Paper):
        """Samples of an older version than the learner's are 0.5 nats off."""

        def recompute(self, batch: Batch, needs: frozenset[str]) -> Batch:
            logp = batch.rollout_logp + 0.5 * (batch.version < self.version)
            return dataclasses.replace(super().recompute(batch, needs), old_logp=logp)

    paper = Aging(random.Random(1))
    ahead, _, _ = session(paper, Window(batch=3, ahead=1, staleness=1, last_step=12))
    how = {"batch_size": 6, "max_epochs": 1, "max_steps": 12, "critic_only_steps": 0, "seed": 0, "max_gap": 0.01}
    steps = []
    with pytest.raises(GapExceeded, match=r"suspect: stale weights: .* up to 1 policy versions ago") as raised:
        for step in train_async(ALGORITHMS["grpo"](), paper, rollout=ahead, **how):  # pyright: ignore[reportArgumentType]
            steps.append(step.number)
    assert paper.learnt == len(steps) == raised.value.evidence["step"] - 1  # pyright: ignore[reportOperatorIssue] - an int
    ahead.end("")
    ahead.runner.close()
