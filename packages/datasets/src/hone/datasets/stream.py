"""Draws: which prompts each step gets, fixed by the seed, countable beforehand, and resumable from a few numbers.

Every epoch is a permutation of all records. Steps take `batch_size` prompts each from the epochs laid end to end, so a step
may span two epochs (its prompts then still have different ids), and only the last step of all may be smaller.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hone.datasets.errors import DataError
from hone.datasets.records import PromptRecord


class Draw(NamedTuple):
    """One prompt drawn for one step; `prompt_id` is "<fingerprint>:<epoch>:<index>", unique in a run."""

    prompt_id: str
    record: PromptRecord


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands: `drawn` prompts have been handed out since the start of the run."""

    fingerprint: str
    batch_size: int
    seed: int
    num_episodes: int
    drawn: int


class PromptStream:
    """An iterator over steps, each a list of draws."""

    def __init__(self, records: Sequence[PromptRecord], *, batch_size: int, seed: int, num_episodes: int, drawn: int = 0) -> None:
        for name, value in (("--rollout.batch-size", batch_size), ("--train.num-episodes", num_episodes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not records:
            raise DataError("there is no prompt to draw: the data has no usable row")
        self._records = tuple(records)
        self._fingerprint = _fingerprint(self._records)
        self._batch_size, self._seed, self._num_episodes, self._drawn = batch_size, seed, num_episodes, drawn
        self._epoch, self._order = -1, []

    @classmethod
    def from_state(cls, state: StreamState, records: Sequence[PromptRecord]) -> "PromptStream":
        """The stream that goes on where `state` was taken. Raises DataError when the records are not those it was drawn from."""
        stream = cls(records, batch_size=state.batch_size, seed=state.seed, num_episodes=state.num_episodes, drawn=state.drawn)
        if stream._fingerprint != state.fingerprint:
            raise DataError(
                f"the data has changed since the run was saved: fingerprint {stream._fingerprint} now, {state.fingerprint} then "
                f"({len(records)} prompts now); give back the same file, template, tokenizer and --data settings, or start a new run"
            )
        return stream

    @property
    def steps(self) -> int:
        """Steps of the whole run, those already taken included."""
        return math.ceil(self._total / self._batch_size)

    def state(self) -> StreamState:
        """Where the stream stands after the last step it handed out."""
        return StreamState(
            fingerprint=self._fingerprint,
            batch_size=self._batch_size,
            seed=self._seed,
            num_episodes=self._num_episodes,
            drawn=self._drawn,
        )

    def __iter__(self) -> Iterator[list[Draw]]:
        return self

    def __next__(self) -> list[Draw]:
        if not (draws := self.draw(self._batch_size)):
            raise StopIteration
        return draws

    def draw(self, count: int) -> list[Draw]:
        """The next `count` prompts, or as many as are left."""
        end = min(self._drawn + count, self._total)
        draws = [self._draw(position) for position in range(self._drawn, end)]
        self._drawn = end
        return draws

    @property
    def _total(self) -> int:
        return self._num_episodes * len(self._records)

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, len(self._records))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self._records), self._seed, epoch)
        record = self._records[self._order[place]]
        fingerprint, index = record.uid.split(":")
        return Draw(prompt_id=f"{fingerprint}:{epoch}:{index}", record=record)


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation that never changes: random() is the one generator whose sequence Python promises to keep between versions."""
    generator = random.Random(f"{seed}:{epoch}")
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _fingerprint(records: Sequence[PromptRecord]) -> str:
    """Of the rows in use and their ids: another file, template, tokenizer or length limit gives another."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        seen = " ".join(image.digest for image in record.images)
        digest.update(f"{record.uid} {record.tokens}{seen and ' '}{seen}\n".encode())
    return digest.hexdigest()
