"""Keeps the engines busy while the learner learns: prompts are begun as the buffer has room, groups judged as they come back.

Every prompt runs by itself, so that one that is passed by can be given up alone. All coroutines belong to one event loop; between
two awaits nothing changes, so what `kept` returns is of one moment.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from hone.rollout.buffer import Buffer, Open, Taken
from hone.rollout.errors import RewardError
from hone.rollout.executor import Executor, Group
from hone.rollout.filtering import Verdict, figures
from hone.rollout.types import Prompt

StragglerPolicy = Literal["abort", "reissue", "keep"]
STRAGGLER = "straggler: in flight when its step had a full batch"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is open at one moment: finished groups, and the prompts under way or to be begun again, each oldest first."""

    groups: list[Group]
    prompts: list[Prompt]


@dataclass(kw_only=True)
class Producer:
    """`draw(step)` gives a fresh prompt, begun for a step, or None for ever; `dropped(prompt_id, step, reason)` hears of each that ends
    untrained.

    `stragglers` says what becomes of prompts in flight whose step has its batch (over-sampling alone): abort drops them, reissue begins
    them anew for a later step under its weights, keep leaves them be. Without `overlaps` nothing is begun between a take and the next
    `serve`. `verdict` drops groups that teach nothing; after `most_rejected` in a row RewardError. `prompts_in_flight` bounds what the
    engines hold.
    """

    executor: Executor
    buffer: Buffer
    draw: Callable[[int], Prompt | None]
    dropped: Callable[[str, int, str], None]
    stragglers: StragglerPolicy = "abort"
    overlaps: bool = True
    verdict: Verdict | None = None
    most_rejected: int = 1
    prompts_in_flight: int = 1024
    _again: deque[Prompt] = field(default_factory=deque)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _given_up: set[asyncio.Task[None]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _filling: bool = False
    _ended: bool = False
    _failure: BaseException | None = None
    _rejected: int = 0
    _seen: list[tuple[float, bool]] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)

    def put_back(self, kept: Kept) -> None:
        """What an earlier run left open; its prompts are begun before any fresh one."""
        self.buffer.put_back(kept.groups)
        self._again.extend(kept.prompts)

    async def serve(self, version: int) -> None:
        """The engines serve `version` from now on."""
        self.buffer.version = version
        self._filling = True
        self._fill()

    async def take(self) -> list[Group]:
        """The groups of the next step, oldest first, as soon as there are enough; none where the data has ended.

        Raises what a prompt failed with, and RewardError where group after group teaches nothing.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            drained = self._ended and not self._again and not self.buffer.in_flight
            if (taken := self.buffer.take(drained=drained)) is not None:
                break
            self._changed.clear()
            await self._changed.wait()
        self._filling = self.overlaps
        self._pass_by(taken)
        self._fill()
        return taken.groups

    def kept(self) -> Kept:
        """What is open now; the producer goes on."""
        return Kept(
            groups=[group for _, group in self.buffer.finished],
            prompts=[*(entry.prompt for entry in self.buffer.in_flight), *self._again],
        )

    async def end(self, reason: str) -> None:
        """Give everything up; what is open is dropped for `reason`, unless that is empty (the run has failed, and says so)."""
        self._filling = False
        kept = self.kept()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._given_up, return_exceptions=True)
        if reason:
            for prompt in [*(group.prompt for group in kept.groups), *kept.prompts]:
                self.dropped(prompt.prompt_id, self.buffer.taken + 1, reason)

    def figures(self) -> dict[str, float]:
        """Counts since the last call: groups too old, prompts passed by, and what the verdict kept; and what is open now."""
        counts, self._counts = self._counts, {}
        seen, self._seen = self._seen, []
        return {
            "staleness/dropped": float(counts.get("stale", 0)),
            "rollout/stragglers": float(counts.get("straggler", 0)),
            "rollout/open": float(self.buffer.open),
            **(figures(seen) if self.verdict is not None else {}),
        }

    def _fill(self) -> None:
        while self._filling and len(self._tasks) < self.prompts_in_flight and self.buffer.room():
            prompt = self._next()
            if prompt is None:
                break
            entry = self.buffer.begin(prompt)
            task = asyncio.ensure_future(self._produce(entry))
            self._tasks[prompt.prompt_id] = task
            task.add_done_callback(lambda task, prompt_id=prompt.prompt_id: self._over(prompt_id, task))
        self._changed.set()

    def _next(self) -> Prompt | None:
        if self._again:
            return self._again.popleft()
        if self._ended:
            return None
        try:
            prompt = self.draw(self.buffer.beginning_for)
        except Exception as error:  # handed to whoever takes next: nobody awaits what fills the engines
            self._failure, self._filling = self._failure or error, False
            return None
        self._ended = prompt is None
        return prompt

    async def _produce(self, entry: Open) -> None:
        groups = await self.executor.collect([entry.prompt], step=entry.step)
        if not groups:  # it failed, and its executor has told why
            self.buffer.give_up(entry.prompt.prompt_id)
            return
        (group,) = groups
        reason = None if self.verdict is None else self.verdict(group)
        self._seen.append((fmean(sample.reward for sample in group.samples), reason is None))
        if reason is None:
            self._rejected = 0
            self.buffer.finish(group)
            return
        self.buffer.give_up(entry.prompt.prompt_id)
        self.dropped(entry.prompt.prompt_id, entry.step, reason)
        self._rejected += 1
        if self._rejected >= self.most_rejected:
            raise RewardError(
                f"{self._rejected} prompts in a row had no group worth training on, the last {reason!r}; the reward does not tell this "
                "policy's answers apart: look at rollouts/, change the task or the reward, or --rollout.dynamic-filtering off"
            )

    def _over(self, prompt_id: str, task: asyncio.Task[None]) -> None:
        self._given_up.discard(task)
        if self._tasks.get(prompt_id) is task:
            del self._tasks[prompt_id]
            if task.cancelled():
                self._filling = False  # from outside: the loop is being ended
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure, self._filling = self._failure or error, False
        self._fill()

    def _pass_by(self, taken: Taken) -> None:
        self._counts["stale"] = self._counts.get("stale", 0) + len(taken.stale)
        for entry in taken.stale:
            self._untrained(entry, self._stale)
        given_up = [entry for entry in taken.overtaken if self.stragglers != "keep"] + taken.expired
        self._counts["straggler"] = self._counts.get("straggler", 0) + len(given_up)
        for entry in given_up:
            task = self._tasks.pop(entry.prompt.prompt_id)
            task.cancel()
            self._given_up.add(task)
            self.buffer.give_up(entry.prompt.prompt_id)
        if self.stragglers == "reissue":
            self._again.extend(entry.prompt for entry in sorted(given_up, key=lambda entry: entry.place))
            return
        for entry in given_up:
            self._untrained(entry, self._stale if self.stragglers == "keep" else STRAGGLER)

    @property
    def _stale(self) -> str:
        return f"stale: not used by a step whose policy was at most {self.buffer.window.staleness} versions newer"

    def _untrained(self, entry: Open, reason: str) -> None:
        self.dropped(entry.prompt.prompt_id, self.buffer.taken, reason)
