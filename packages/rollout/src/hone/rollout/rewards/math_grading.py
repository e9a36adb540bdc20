"""The built-in reward `builtin:math`: 1 where the final answer equals the label, exactly as numbers or symbolically, else 0.

Numbers are compared as fractions (`answers`); everything else by math-verify, which the extra `hone-rollout[math]` installs.
An answer that costs too much to read or compare is unreadable, and counted as that: what is known to be expensive is not
tried at all, the rest has math-verify's alarm; what no alarm can stop, the pool kills, and then the run ends with its name.
"""

import logging
import re
import threading
from functools import lru_cache
from typing import Any

from hone.rollout.errors import RewardError
from hone.rollout.rewards.answers import LONGEST, final_answer, number, same

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports] - an extra
    from math_verify.errors import TimeoutException  # pyright: ignore[reportMissingImports] - an extra
except ImportError as missing:
    raise RewardError(
        f"builtin:math needs math-verify, which is not installed ({missing}); install hone-rollout[math], "
        "or use builtin:gsm8k where every answer is a number"
    ) from missing

DEEPEST = 24
"""Nested brackets; sympy's parser needs exponential time for them."""

# A power is written out when it is compared: 9^9^9^9 never ends, and neither does (2^100000000)!.
_LARGE = re.compile(r"\d{31}|\d{7}\s*!|\)\s*!|\}\s*!|!\s*!")
_POWER = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*[+-]?\s*(\d+)")
_TOWER = re.compile(r"(?:\^|\*\*)\s*(?:\{[^{}]*|\([^()]*|[^\s{}()^*]*)(?:\^|\*\*)")
_LARGEST_POWER = 1000
_PATIENCE_S = 5
_CONFIGS = (LatexExtractionConfig(), ExprExtractionConfig())

# It says with every call outside the main thread that there is no alarm, and why an expression could not be read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def reward_func(queries: list[str], prompts: list[str], labels: list[object]) -> dict[str, object]:
    """OpenRLHF's form."""
    return grade(queries[0].removeprefix(prompts[0]), labels[0])


def grade(answer: str, label: object) -> dict[str, object]:
    """Reward and figures for the text of one response; RewardError where the label holds no answer that can be read."""
    if label is None or isinstance(label, bool):
        raise RewardError(f"the label {label!r} is no answer; give the answer's column with --data.label-key")
    gold = final_answer(str(label)) or str(label).strip()
    found = final_answer(answer)
    gold_number = number(gold)
    expressions = () if gold_number is not None else _read(gold)
    if gold_number is None and not expressions:
        raise RewardError(f"the label {gold[:200]!r} cannot be read as a mathematical answer; mend the row, or write a reward for it")
    figures = {"answered": float(found is not None), "readable": 0.0}
    if found is None:
        return {"rewards": 0.0, "extra_logs": figures}
    value = number(found)
    if gold_number is not None and value is not None:
        return {"rewards": float(same(value, gold_number)), "extra_logs": {**figures, "readable": 1.0}}
    told = _read(found)
    right = _equal(expressions or _read(gold), told) if told else None
    return {"rewards": float(right or False), "extra_logs": {**figures, "readable": float(right is not None)}}


def _equal(gold: tuple[Any, ...], told: tuple[Any, ...]) -> bool | None:
    """Whether two answers are the same; None where that cannot be found out in time, or at all."""
    try:
        return verify(list(gold), list(told), strict=True, timeout_seconds=_patience_s(), raise_on_error=True)
    # Whatever sympy makes of an answer nobody has seen before (also its alarm, which is no Exception there).
    except (Exception, TimeoutException):
        return None


def _patience_s() -> int | None:
    # An alarm is a signal, which only the main thread gets; a worker of the pool judges there.
    return _PATIENCE_S if threading.current_thread() is threading.main_thread() else None


def excessive(text: str) -> bool:
    """Whether an answer is too long, too deep or too large to be worth reading; no label of a real data set is."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    large = any(int(power) > _LARGEST_POWER for power in _POWER.findall(text))
    return len(text) > LONGEST or deepest > DEEPEST or large or bool(_LARGE.search(text) or _TOWER.search(text))


@lru_cache(maxsize=1024)
def _read(text: str) -> tuple[Any, ...]:
    """The expressions an answer holds, as math-verify reads them; none where it holds none, or where reading is too expensive."""
    if excessive(text):
        return ()
    try:
        limits: dict[str, Any] = {"parsing_timeout": _patience_s()}  # None is no limit, whatever its annotation says
        return tuple(parse(f"\\boxed{{{text}}}", extraction_config=_CONFIGS, raise_on_error=True, **limits))
    except (Exception, TimeoutException):
        return ()
