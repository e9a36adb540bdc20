"""What a reward function is asked and what it may answer: RewardItem -> the function's result -> Judgement, or a RewardError.

A result that is not a reward is an error with the function's name, the prompt and the value; it never becomes a zero.
Nothing here imports torch or numpy: their scalars and one-element arrays are recognised by `tolist`.
"""

import difflib
import math
import numbers
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hone.rollout.errors import RewardError

KEYS = ("rewards", "scores", "extra_logs")
EXPECTED_RESULT = 'a dict {"rewards": one finite number, "scores": one finite number (optional), "extra_logs": {name: number} (optional)}'

# Rewards become fp32 tensors; a larger one would turn into infinity there.
_LARGEST = 3.4028234663852886e38
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


NOT_APPLICABLE = object()
"""In place of a result: the function has nothing to say about this response."""


@dataclass(frozen=True, kw_only=True)
class RewardItem:
    """One response to judge: `query` is the prompt's text with the response's, `label` as it stood in the data.

    `response` is the response without special tokens; None: what `query` has behind `prompt`. `columns` are the row's
    other columns by name, as far as they were kept.
    """

    prompt_id: str
    query: str
    prompt: str
    label: object
    response: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The response's text, without special tokens where that is known."""
        return self.query.removeprefix(self.prompt) if self.response is None else self.response


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`reward` is what the policy is trained on, `score` the ungraded quality for metrics and filters, `extra_logs` figures to log.

    Where a function of several says None for a response (TRL), it does not apply: its numbers are NaN, and count for nothing.
    """

    reward: float
    score: float
    extra_logs: dict[str, float]
    applies: bool = True


@runtime_checkable
class Array(Protocol):
    """A torch tensor, a NumPy array or a NumPy scalar."""

    def tolist(self) -> Any:
        """The same values as Python numbers in nested lists."""
        ...


def refused(function: str, what: str, *, prompt_id: str, expected: str) -> RewardError:
    """The error for a `function` ("name (file:line)") that returned `what`, which is no reward."""
    return RewardError(
        f"reward function {function} returned {what} for prompt {prompt_id!r}; expected {expected}. "
        "Mend the function: a reward that fails stops the run, it is never counted as zero."
    )


def checked(result: object, *, function: str, prompt_id: str) -> Judgement:
    """The judgement in what `function` ("name (file:line)") returned for one response; RewardError if it is none.

    A number may come bare, as a one-element list, tensor or array; booleans count as 0 and 1. Missing scores are the
    rewards. None, text, NaN, infinities, several values, nested lists, missing and unknown keys are errors.
    """

    def refuse(what: str, expected: str) -> RewardError:
        return refused(function, what, prompt_id=prompt_id, expected=expected)

    def number(value: object, name: str) -> float:
        found = _plain(value)
        if isinstance(found, list | tuple):
            if len(found) != 1:
                raise refuse(f"{len(found)} values in {name} ({_SHORT.repr(found)})", "one, for the one query it was given")
            found = _plain(found[0])
        if not isinstance(found, numbers.Real):
            raise refuse(f"{_SHORT.repr(value)} ({type(value).__name__}) in {name}", "one finite number")
        converted = _as_float(found)
        if not abs(converted) <= _LARGEST:
            raise refuse(f"{_SHORT.repr(value)} in {name}", "one finite number that fp32 can hold")
        return converted

    if result is NOT_APPLICABLE:
        return Judgement(reward=math.nan, score=math.nan, extra_logs={}, applies=False)
    if not isinstance(result, Mapping):
        raise refuse(f"{_SHORT.repr(result)} ({type(result).__name__})", EXPECTED_RESULT)
    for key in result:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            raise refuse(f"the unknown key {key!r}", f'"{near[0]}"' if near else EXPECTED_RESULT)
    if "rewards" not in result:
        raise refuse(f'{_SHORT.repr(dict(result))} without "rewards"', EXPECTED_RESULT)
    reward = number(result["rewards"], '"rewards"')
    score = reward if result.get("scores") is None else number(result["scores"], '"scores"')
    extra_logs = {} if result.get("extra_logs") is None else result["extra_logs"]
    if not isinstance(extra_logs, Mapping):
        raise refuse(f'{_SHORT.repr(extra_logs)} ({type(extra_logs).__name__}) in "extra_logs"', "a dict of numbers by name")
    figures = {str(name): number(value, f'"extra_logs" under {name!r}') for name, value in extra_logs.items()}
    return Judgement(reward=reward, score=score, extra_logs=figures)


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Array) else value


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
