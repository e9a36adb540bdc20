"""The loop over labelled rows: draw, label, learn, and measure what is held out.

Read it top to bottom; it is the whole of supervised fine-tuning, reward models, preference learning and distillation. What differs
between them is the algorithm (`hone.algos`) and what its rows need (`offline_parts.py`). It yields what happened at every step, so
display, logs, checkpoints and stopping early belong to the caller (`programs/offline.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from hone.algos.batch import Packed


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One optimiser step: its number from 1, what was measured, and whether the rows held out were."""

    number: int
    metrics: dict[str, float]
    evaluated: bool


@runtime_checkable
class OfflineParts(Protocol):
    """Everything `finetune` calls."""

    def draws(self) -> Iterator[Sequence[int]]:
        """The rows of one step after another, by their places."""
        ...

    def label(self, places: Sequence[int]) -> Packed:
        """The step's rows with their weights and all that the algorithm needs besides."""
        ...

    def learn(self, rows: Packed) -> dict[str, float]:
        """One optimiser step."""
        ...

    def due(self, number: int) -> bool:
        """Whether the rows held out are to be measured after a step."""
        ...

    def evaluate(self) -> dict[str, float]:
        """The figures of the rows held out, without a step."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what happens inside as `timing/<name>`."""
        ...

    def measured(self, rows: Packed) -> dict[str, float]:
        """Times and rates since the last call."""
        ...


def finetune(parts: OfflineParts, *, max_steps: int, start: int = 0) -> Iterator[Trained]:
    """Learning from labelled rows, an optimiser step at a time, from the one after `start` to `max_steps`.

    Raises what its parts raise; a step that was yielded is complete.
    """
    for number, places in enumerate(islice(parts.draws(), max_steps - start), start=start + 1):
        with parts.phase("label"):
            rows = parts.label(places)

        with parts.phase("train"):
            learned = parts.learn(rows)

        evaluated = {}
        if parts.due(number):
            with parts.phase("evaluate"):
                evaluated = parts.evaluate()

        metrics = {**_named("train", learned), **_named("eval", evaluated), **parts.measured(rows)}
        yield Trained(number=number, metrics=metrics, evaluated=bool(evaluated))


def _named(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures under the names of metrics; a pair's two rewards also as their difference."""
    own = dict(figures)
    if {"chosen_reward", "rejected_reward"} <= own.keys():
        own["reward_margin"] = own["chosen_reward"] - own["rejected_reward"]
    return {f"{prefix}/{name}": value for name, value in own.items()}
