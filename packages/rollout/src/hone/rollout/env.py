"""What the policy acts in: an `Env` answers each of its turns with text, a reward and whether the episode is over.

Flow of an episode (`multi_turn.py`): `reset` gives the text to begin with; then the policy writes an Action, `step` answers
with a Turn, and so on. One object serves one episode, and is closed after it.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hone.rollout.errors import EnvironmentFailure


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the policy wrote in one turn: `text` without special tokens, `raw` with them, `cut` if it ran into its limit."""

    text: str
    raw: str
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An environment's answer to one action.

    `terminated`: the task has ended; `truncated`: it was given up, and what follows is unknown. `feedback` is what the policy
    reads next, tokenised as it stands: whoever writes it also writes the template's markup. `reward` stands on the last token
    of the action; None is "not judged", which is not zero. `score` [0 to 1] is for filters and metrics, `extra_logs` for logs.
    `images` are files' bytes, PIL images, arrays or paths, one for each image that the markup in `feedback` has.
    """

    terminated: bool
    feedback: str = ""
    reward: float | None = None
    truncated: bool = False
    score: float | None = None
    extra_logs: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[object] = ()


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an episode begins with where that is more than text: `images` as in `Turn`, those of the prompt included."""

    text: str
    images: Sequence[object] = ()


@runtime_checkable
class Scalar(Protocol):
    """A tensor or an array of one element, or a NumPy scalar."""

    def item(self) -> Any:
        """The element as a Python number."""
        ...


@runtime_checkable
class Env(Protocol):
    """One episode. Coroutines run beside those of other episodes, so what blocks belongs in a thread (see `agents.blocking`)."""

    async def reset(self, prompt: str, label: object, *, seed: int) -> str | Observation:
        """What the policy begins with: `prompt`, or more. `seed` is the episode's own, the same whenever the run is repeated.

        A text's images are the prompt's; an Observation says its own.
        """
        ...

    async def step(self, action: Action) -> Turn:
        """The answer to the policy's turn."""
        ...

    async def close(self) -> None:
        """Give up what the episode holds; called once, whatever happened."""
        ...


def checked_turn(turn: object, *, where: str, prompt_id: str) -> Turn:
    """The turn, if it is one; EnvironmentFailure for another type, or a number that is not finite."""

    def refuse(what: str) -> EnvironmentFailure:
        return EnvironmentFailure(
            f"environment {where} {what} for prompt {prompt_id!r}; mend its step: nothing was trained on this episode"
        )

    if not isinstance(turn, Turn):
        raise refuse(f"returned {turn!r:.200} ({type(turn).__name__}) from step, not a Turn")
    if not isinstance(turn.feedback, str):
        raise refuse(f"gave the feedback {turn.feedback!r:.200} ({type(turn.feedback).__name__}), not text")
    if not isinstance(turn.images, list | tuple):
        raise refuse(f"gave the images {turn.images!r:.200} ({type(turn.images).__name__}), not a list of them")
    for name, number in {"reward": turn.reward, "score": turn.score, **turn.extra_logs}.items():
        if number is not None and not (isinstance(number, numbers.Real) and math.isfinite(number)):
            raise refuse(f"gave the {name} {number!r:.200}, not a finite number")
    return turn
