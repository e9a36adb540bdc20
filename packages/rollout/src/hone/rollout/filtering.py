"""Dynamic sampling: groups that would teach nothing are dropped, and each is replaced at once by a fresh prompt.

DAPO (arXiv 2503.14476, equation 11) keeps a prompt of which some answers are right and some wrong. So many prompts are out at
any time as are still missing; those that were accepted are never given up, also when the data ends.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from hone.rollout.errors import RewardError
from hone.rollout.executor import Executor, Group
from hone.rollout.types import Prompt

Verdict = Callable[[Group], str | None]
"""Why a group is dropped, or None for one that is kept."""


@dataclass(frozen=True, kw_only=True)
class WithinRange:
    """Keeps a group whose mean score lies strictly between the bounds."""

    low: float
    high: float

    def __call__(self, group: Group) -> str | None:
        """The verdict."""
        mean = fmean(sample.score for sample in group.samples)
        return None if self.low < mean < self.high else f"filtered: mean score {mean:g} is not between {self.low:g} and {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Varied:
    """Keeps a group whose rewards are not all the same: with a group baseline the others' advantages are all zero."""

    def __call__(self, group: Group) -> str | None:
        """The verdict."""
        rewards = {sample.reward for sample in group.samples}
        return None if len(rewards) > 1 else f"filtered: all {len(group.samples)} rewards are {rewards.pop():g}"


@dataclass(kw_only=True)
class Filtering:
    """An executor that collects as many accepted groups as it is handed prompts.

    `more()` draws a fresh prompt (None: there are no more), `dropped(group, reason)` hears of every group that is not kept.
    After `most_batches` times the prompts of a step it draws no more of them, and the step is as large as it is.
    """

    executor: Executor
    verdict: Verdict
    more: Callable[[], Prompt | None]
    dropped: Callable[[Group, str], None]
    most_batches: int
    _seen: list[tuple[float, bool]] = field(default_factory=list)

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        """The accepted groups in the order drawn. Raises RewardError where not one was accepted and there was more data."""
        order = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
        accepted: list[Group] = []
        tasks: set[asyncio.Task[object]] = set()
        ended = asyncio.Event()
        left = self.most_batches * len(prompts) - len(prompts)
        last = ""

        def ask(asked: Sequence[Prompt]) -> None:
            task = asyncio.ensure_future(self.executor.collect(asked, step=step, on_group=judged))
            task.add_done_callback(lambda _: ended.set())
            tasks.add(task)

        def judged(group: Group) -> None:
            nonlocal left, last
            reason = self.verdict(group)
            self._seen.append((fmean(sample.reward for sample in group.samples), reason is None))
            if reason is None:
                accepted.append(group)
                if on_group is not None:
                    on_group(group)
                return
            last = reason
            self.dropped(group, reason)
            fresh = self.more() if left > 0 else None
            if fresh is not None:
                left -= 1
                order[fresh.prompt_id] = len(order)
                ask([fresh])

        ask(prompts)
        try:
            while tasks:
                await ended.wait()
                ended.clear()
                for task in [task for task in tasks if task.done()]:
                    tasks.discard(task)
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not accepted and left <= 0:
            raise RewardError(
                f"not one of {len(order)} prompts in step {step} had a group worth training on, the last {last!r}; the reward does not "
                "tell this policy's answers apart: look at rollouts/, change the task or the reward, or --rollout.dynamic-filtering off"
            )
        return sorted(accepted, key=lambda group: order[group.prompt.prompt_id])

    def figures(self) -> dict[str, float]:
        """Share of the groups since the last call that were accepted, and the mean reward of all of them."""
        seen, self._seen = self._seen, []
        return figures(seen)


def figures(seen: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Share of judged groups that were kept, and the mean reward of all: of each its mean reward, and whether it was kept."""
    if not seen:
        return {}
    rewards = [reward for reward, _ in seen]
    return {
        "rollout/filtering_pass_rate": sum(kept for _, kept in seen) / len(seen),
        "rollout/filtering_reward_mean": fmean(rewards) if all(map(math.isfinite, rewards)) else math.nan,
    }
