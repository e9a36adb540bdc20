"""The producer over a scripted executor: what is begun, taken, dropped, begun again and kept, whatever takes how long.

1. Every prompt drawn ends once: trained, dropped with a reason, or (kept) taken over by the run that goes on.
2. No trained token is older than the bound; without over-sampling nothing is dropped for its age.
3. With over-sampling the first to finish make the batch; abort, reissue and keep do what they say to the others.
4. A failure reaches whoever takes next, and ends nothing twice.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.algos.batch import Attachment
from hone.rollout import kept_file
from hone.rollout.buffer import Buffer, Window, oldest
from hone.rollout.errors import EngineError, RewardError
from hone.rollout.executor import Group
from hone.rollout.producer import STRAGGLER, Kept, Producer
from hone.rollout.types import Prompt
from tests.rollout.test_buffer import group_of, prompt_of


@dataclass
class Scripted:
    """An executor whose group of a prompt takes as many turns of the loop as `turns` says; `version` is what its engine serves."""

    turns: Callable[[str], int]
    version: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        (prompt,) = prompts
        self.asked.append((prompt.prompt_id, step))
        version = self.version
        try:
            for _ in range(self.turns(prompt.prompt_id)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(prompt.prompt_id)
            raise
        return [group_of(prompt, version=version)]


@dataclass
class Run:
    """A producer with its ledger."""

    window: Window
    executor: Any
    prompts: int
    settings: dict[str, Any] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def draw(step: int) -> Prompt | None:
            if len(self.drawn) == self.prompts:
                return None
            self.drawn.append(f"p{len(self.drawn)}")
            return prompt_of(len(self.drawn) - 1)

        def dropped(prompt_id: str, step: int, reason: str) -> None:
            assert prompt_id not in self.dropped
            self.dropped[prompt_id] = reason

        self.producer = Producer(executor=self.executor, buffer=Buffer(self.window), draw=draw, dropped=dropped, **self.settings)

    async def learn(self, steps: int, *, during: Callable[[], Awaitable[None]] | None = None) -> list[list[Group]]:
        """Some steps of a learner, or fewer where the data ends."""
        taken: list[list[Group]] = []
        await self.producer.serve(0)
        for step in range(1, steps + 1):
            groups = await self.producer.take()
            if not groups:
                break
            taken.append(groups)
            if during is not None:
                await during()
            self.executor.version = step
            await self.producer.serve(step)
        return taken


def ids(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


@st.composite
def settings(draw: st.DrawFn) -> tuple[Window, dict[str, Any], int, int]:
    ahead, extra = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    stragglers = draw(st.sampled_from(["abort", "reissue", *(["keep"] if ahead else [])]))
    window = Window(batch=draw(st.integers(1, 3)), ahead=ahead, staleness=ahead + draw(st.integers(0, 2)), extra=extra, last_step=6)
    return window, {"stragglers": stragglers, "overlaps": ahead > 0}, draw(st.integers(1, 40)), draw(st.integers(0, 2**32))


@given(drawn=settings())
def test_whatever_takes_how_long_every_prompt_ends_once_and_none_too_old(drawn: tuple[Window, dict[str, Any], int, int]) -> None:
    window, how, prompts, seed = drawn
    chance = random.Random(seed)
    slow = [chance.choice([0, 1, 2, 5, 40]) for _ in range(prompts)]
    run = Run(window, Scripted(turns=lambda prompt_id: slow[int(prompt_id[1:])]), prompts, how)

    async def during() -> None:
        for _ in range(chance.choice([0, 3, 10])):
            await asyncio.sleep(0)

    async def whole() -> list[list[Group]]:
        taken = await run.learn(6, during=during)
        await run.producer.end("over")
        return taken

    taken = asyncio.run(whole())
    trained = [prompt_id for groups in taken for prompt_id in ids(groups)]
    assert Counter(trained) + Counter(list(run.dropped)) == Counter(run.drawn)
    for step, groups in enumerate(taken, start=1):
        assert all(step - 1 - oldest(group) <= window.staleness for group in groups)
    assert all(len(groups) == window.batch for groups in taken[:-1])
    reasons = {reason.partition(":")[0] for reason in run.dropped.values()}
    assert reasons <= {"over", *(["stale", "straggler"] if window.extra else [])}
    if prompts >= 6 * (window.batch + window.extra):
        assert len(taken) == 6  # nobody waited for nothing
    if not window.extra and prompts <= 6 * window.batch:
        assert Counter(trained) == Counter(run.drawn)


def test_the_next_batch_is_sampled_while_the_learner_learns() -> None:
    executor = Scripted(turns=lambda _: 1)
    run = Run(Window(batch=2, ahead=1, staleness=1), executor, 100)
    begun: list[int] = []

    async def during() -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        begun.append(len(run.producer.buffer.finished))

    taken = asyncio.run(run.learn(4, during=during))
    assert begun == [2, 2, 2, 2]  # each time the next batch was there before the learner asked for it
    assert [[oldest(group) for group in groups] for groups in taken] == [[0, 0], [0, 0], [1, 1], [2, 2]]


SLOW = {"p0": 50}


def over_sampled(stragglers: str, *, staleness: int = 1, ahead: int = 0, steps: int = 3) -> tuple[Run, list[list[str]]]:
    executor = Scripted(turns=lambda prompt_id: SLOW.get(prompt_id, 1))
    window = Window(batch=2, ahead=ahead, staleness=staleness, extra=1)
    run = Run(window, executor, 100, {"stragglers": stragglers, "overlaps": ahead > 0})

    async def whole() -> list[list[str]]:
        taken = [ids(groups) for groups in await run.learn(steps)]
        run.producer.figures()
        return taken

    return run, asyncio.run(whole())


def test_abort_drops_the_straggler_and_its_request() -> None:
    run, taken = over_sampled("abort")
    assert taken[0] == ["p1", "p2"] and run.dropped["p0"] == STRAGGLER
    assert run.executor.cancelled[0] == "p0" and "p0" not in [one for groups in taken for one in groups]


def test_reissue_begins_the_straggler_anew_for_the_next_step_under_its_weights() -> None:
    run, taken = over_sampled("reissue")
    assert taken[0] == ["p1", "p2"] and run.executor.asked[:4] == [("p0", 1), ("p1", 1), ("p2", 1), ("p0", 2)]
    assert run.executor.cancelled[0] == "p0" and "p0" not in run.dropped and run.drawn.count("p0") == 1


def test_keep_lets_the_straggler_go_on_until_it_is_too_old() -> None:
    run, taken = over_sampled("keep", ahead=1, staleness=2, steps=4)
    assert run.executor.asked.count(("p0", 1)) == 1
    assert run.dropped["p0"].startswith("stale: not used by a step whose policy was at most 2 versions newer")
    SLOW["p0"] = 2
    try:
        run, taken = over_sampled("keep", ahead=1, staleness=2, steps=4)
    finally:
        SLOW["p0"] = 50
    assert "p0" not in run.dropped and "p0" in [one for groups in taken for one in groups]


def test_without_overlap_nothing_is_begun_while_the_learner_learns() -> None:
    run = Run(Window(batch=2, ahead=0, staleness=1, extra=2), Scripted(turns=lambda _: 1), 100, {"overlaps": False})
    asked: list[int] = []

    async def during() -> None:
        before = len(run.executor.asked)
        await asyncio.sleep(0)
        asked.append(len(run.executor.asked) - before)

    asyncio.run(run.learn(3, during=during))
    assert asked == [0, 0, 0]


def test_a_failure_reaches_whoever_takes() -> None:
    def turns(prompt_id: str) -> int:
        if prompt_id == "p3":
            raise EngineError("engine 0 failed")
        return 1

    run = Run(Window(batch=2, ahead=1, staleness=1), Scripted(turns=turns), 100)
    with pytest.raises(EngineError, match="engine 0 failed"):
        asyncio.run(run.learn(4))

    def draw(step: int) -> Prompt | None:
        raise OSError("the data is gone")

    run = Run(Window(batch=2, ahead=1, staleness=1), Scripted(turns=lambda _: 1), 100)
    run.producer.draw = draw
    with pytest.raises(OSError, match="the data is gone"):
        asyncio.run(run.learn(4))


def test_groups_that_teach_nothing_are_replaced_and_too_many_in_a_row_end_the_run() -> None:
    def even(group: Group) -> str | None:
        return None if int(group.prompt.prompt_id[1:]) % 2 == 0 else "filtered: odd"

    run = Run(Window(batch=2, ahead=0, staleness=0), Scripted(turns=lambda _: 1), 100, {"verdict": even, "most_rejected": 2})
    taken = asyncio.run(run.learn(2))
    assert [ids(groups) for groups in taken] == [["p0", "p2"], ["p4", "p6"]] and run.dropped["p1"] == "filtered: odd"
    assert run.producer.figures()["rollout/filtering_pass_rate"] == pytest.approx(4 / 7, abs=0.1)
    run = Run(
        Window(batch=2, ahead=0, staleness=0), Scripted(turns=lambda _: 1), 100, {"verdict": lambda _: "filtered", "most_rejected": 3}
    )
    with pytest.raises(RewardError, match="3 prompts in a row had no group worth training on"):
        asyncio.run(run.learn(2))


def test_the_engines_hold_no_more_prompts_than_they_may() -> None:
    executor = Scripted(turns=lambda _: 3)
    run = Run(Window(batch=6, ahead=0, staleness=0), executor, 100, {"prompts_in_flight": 2})
    most = 0

    async def whole() -> None:
        nonlocal most
        task = asyncio.ensure_future(run.learn(1))
        while not task.done():
            most = max(most, len(run.producer.buffer.in_flight))
            await asyncio.sleep(0)

    asyncio.run(whole())
    assert most == 2


def test_a_run_that_goes_on_has_what_was_open_and_no_pickle(tmp_path: Any) -> None:
    run = Run(Window(batch=2, ahead=1, staleness=2), Scripted(turns=lambda prompt_id: 500 if prompt_id == "p2" else 1), 6)

    async def first() -> bytes:
        await run.producer.serve(0)
        await run.producer.take()
        for _ in range(10):
            await asyncio.sleep(0)
        data = kept_file.to_bytes(run.producer.kept())
        await run.producer.end("")
        return data

    data = asyncio.run(first())
    assert b"pickle" not in data and run.dropped == {}
    kept = kept_file.from_bytes(data, lambda wanted: {one: prompt_of(int(one[1:])) for one in wanted})
    assert ids(kept.groups) == ["p3"] and [prompt.prompt_id for prompt in kept.prompts] == ["p2"]
    again = Run(Window(batch=2, ahead=1, staleness=2), Scripted(turns=lambda _: 1, version=1), 6)
    again.drawn.extend(f"p{number}" for number in range(4))
    again.producer.buffer = Buffer(again.window, version=1, taken=1)
    again.producer.put_back(kept)

    async def rest() -> list[list[str]]:
        await again.producer.serve(1)
        taken = [await again.producer.take()]
        await again.producer.serve(2)
        taken.append(await again.producer.take())
        return [ids(groups) for groups in taken]

    assert asyncio.run(rest()) == [["p3", "p2"], ["p4", "p5"]]


def test_the_file_gives_back_what_it_was_given() -> None:
    from dataclasses import replace

    import torch

    one, two = group_of(prompt_of(0), version=3, samples=2), group_of(prompt_of(1), version=4)
    picture = Attachment(start=0, count=2, data=b"picture")
    part = replace(two.samples[0].trajectory, attached=(picture,), segment=1, truncated=True)
    scored = replace(two.samples[0], trajectory=part, earlier=(two.samples[0].trajectory,), score=0.25)
    two = replace(two, samples=(scored,), greedy=replace(one.samples[0], label=two.prompt.label))
    prompts = {f"p{number}": prompt_of(number) for number in range(3)}
    found = kept_file.from_bytes(
        kept_file.to_bytes(Kept(groups=[one, two], prompts=[prompt_of(2)])), lambda wanted: {name: prompts[name] for name in wanted}
    )
    assert [prompt.prompt_id for prompt in found.prompts] == ["p2"]
    for known, back in zip([one, two], found.groups, strict=True):
        assert back.prompt == known.prompt and (back.greedy is None) == (known.greedy is None)
        pairs = [*zip(known.samples, back.samples, strict=True), *([(known.greedy, back.greedy)] if known.greedy else [])]
        for before, after in pairs:
            assert before is not None and after is not None
            for told in ("reward", "score", "extra_logs", "label", "prompt_text", "response_text", "cached_tokens"):
                assert getattr(before, told) == getattr(after, told), told
            for segment, other in zip(before.segments, after.segments, strict=True):
                for told in ("contract", "attached", "segment", "truncated", "score"):
                    assert getattr(segment, told) == getattr(other, told), told
                for name in kept_file.PER_TOKEN:
                    assert (
                        torch.equal(getattr(segment, name), getattr(other, name))
                        and getattr(other, name).dtype == getattr(segment, name).dtype
                    )
