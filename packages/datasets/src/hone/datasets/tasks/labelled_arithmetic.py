"""The built-in task as labelled rows: right sums to imitate, right beside wrong ones, judged ones, and sums in steps.

What the small model does (most of its answers have the wrong sign) is what these rows speak against.
"""

import hashlib
import random
from collections.abc import Callable, Mapping

from hone.datasets.records import Row, Source
from hone.datasets.tasks.arithmetic import problems

WRONG_SHARE = 0.5


def demonstrations(seed: int, count: int) -> Source:
    """Columns "prompt" and "completion": sums and their right answers."""
    return _source("right sums", seed, count, lambda prompt, label, draw: {"prompt": prompt, "completion": str(label)})


def pairs(seed: int, count: int) -> Source:
    """Columns "prompt", "chosen" and "rejected": the answer, and the answer with the wrong sign."""
    return _source(
        "pairs of sums", seed, count, lambda prompt, label, draw: {"prompt": prompt, "chosen": str(label), "rejected": str(-label)}
    )


def judged(seed: int, count: int) -> Source:
    """Columns "prompt", "completion" and "label": answers, half of them with the wrong sign."""

    def row(prompt: str, label: int, draw: random.Random) -> Mapping[str, object]:
        wrong = draw.random() < WRONG_SHARE
        return {"prompt": prompt, "completion": str(-label if wrong else label), "label": not wrong}

    return _source("judged sums", seed, count, row)


def steps(seed: int, count: int) -> Source:
    """Columns "prompt", "completions" and "labels": a sum asked for, and two sums in answer, each with or without the wrong sign."""

    def row(prompt: str, label: int, draw: random.Random) -> Mapping[str, object]:
        signs = [1 if draw.random() < WRONG_SHARE else -1 for _ in range(2)]
        left, right = prompt.rstrip("=").split("+")
        said = [f"{prompt}{signs[0] * label}", f"{right}+{left}={signs[1] * label}"]
        return {"prompt": f"{prompt} ", "completions": said, "labels": [sign > 0 for sign in signs]}

    return _source("sums in steps", seed, count, row)


def _source(name: str, seed: int, count: int, row: Callable[[str, int, random.Random], Mapping[str, object]]) -> Source:
    generator = random.Random(f"labelled arithmetic:{seed}")
    columns = [row(problem.prompt, problem.label, generator) for problem in problems(seed, count)]
    digest = hashlib.blake2b(repr([sorted(one.items()) for one in columns]).encode(), digest_size=16)
    rows = tuple(Row(line=line, columns=one) for line, one in enumerate(columns, 1))
    return Source(name=f"the built-in {name}", fingerprint=digest.hexdigest(), rows=rows)
