"""What becomes of a group when its environment, its agent or its judge fails: the run ends, unless it was said that it may go on.

A failure is never a reward: an episode is begun once more, or its whole group is dropped and told with the reason. An engine's
failure is not among them. As many groups in a row as a step has prompts end the run all the same: then nothing is learnt from.
"""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hone.rollout.config import RewardConfig, RolloutConfig
from hone.rollout.errors import EnvironmentFailure, RewardError
from hone.rollout.types import Prompt

Result = TypeVar("Result")
_LONGEST_REASON = 500


@dataclass(kw_only=True)
class Tolerance:
    """`drops` are the failures that cost a group and not the run, `retries` how often an episode may be begun anew, `in_a_row` the
    groups that may fail one after another. `dropped(prompt, reason)` and `retried(prompt, reason)` hear of each.
    """

    drops: tuple[type[Exception], ...] = ()
    retries: int = 0
    in_a_row: int = 1
    dropped: Callable[[Prompt, str], None] = lambda prompt, reason: None
    retried: Callable[[Prompt, str], None] = lambda prompt, reason: None
    _failed: int = 0

    async def episode(self, prompt: Prompt, play: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What `play` gives, begun anew as often as may be where the environment or the agent fails."""
        for _ in range(self.retries):
            try:
                return await play()
            except EnvironmentFailure as error:
                self.retried(prompt, _reason(error, prompt))
        return await play()

    async def group(self, prompt: Prompt, play: Callable[[], Coroutine[Any, Any, Result]]) -> Result | None:
        """What `play` gives, or None where it was dropped. Raises what is not tolerated, and the last of too many in a row."""
        try:
            group = await play()
        except self.drops as error:
            self._failed += 1
            self.dropped(prompt, _reason(error, prompt))
            if self._failed < self.in_a_row:
                return None
            raise type(error)(f"{error}; {self._failed} groups failed one after another, which no policy of dropping mends") from error
        self._failed = 0
        return group


def tolerance(
    rollout: RolloutConfig,
    reward: RewardConfig,
    *,
    dropped: Callable[[Prompt, str], None],
    retried: Callable[[Prompt, str], None],
) -> Tolerance:
    """As the settings have it."""
    environments = (EnvironmentFailure,) if rollout.env_failure != "stop" else ()
    rewards = (RewardError,) if reward.on_error == "drop" else ()
    return Tolerance(
        drops=(*environments, *rewards),
        retries=rollout.env_retries if rollout.env_failure == "retry" else 0,
        in_a_row=rollout.batch_size,
        dropped=dropped,
        retried=retried,
    )


def kept(groups: Sequence[Result | None]) -> list[Result]:
    """The groups that were not dropped, in order."""
    return [group for group in groups if group is not None]


def _reason(error: Exception, prompt: Prompt) -> str:
    """The failure in words that are the same for every prompt, so that a ledger can count them."""
    told = " ".join(str(error).split())
    for joined in (", on", " on", " for"):
        told = told.replace(f"{joined} prompt {prompt.prompt_id!r}", "")
    return f"failed: {told[:_LONGEST_REASON]}"
