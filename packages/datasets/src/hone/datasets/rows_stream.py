"""Draws of labelled rows: which samples each optimiser step gets, fixed by the seed, and resumable from a few numbers.

As prompts are drawn (`stream.py`): every epoch is a permutation of all samples, epochs lie end to end, and only the last step may
be smaller.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

from hone.datasets.errors import DataError
from hone.datasets.labelled import Sample
from hone.datasets.order import permutation
from hone.datasets.stream import StreamState


class SampleStream:
    """An iterator over steps, each a list of places in the samples."""

    def __init__(self, samples: Sequence[Sample], *, batch_size: int, seed: int, epochs: int, state: StreamState | None = None) -> None:
        """With `state`, goes on where it was taken; DataError where these are not the samples it was drawn from."""
        self._count, self._fingerprint = len(samples), fingerprint(samples)
        self._batch_size, self._seed, self._epochs = batch_size, seed, epochs
        self._drawn = 0 if state is None else state.drawn
        self._epoch, self._order = -1, []
        if state is not None and state.fingerprint != self._fingerprint:
            raise DataError(
                f"the data has changed since the run was saved: fingerprint {self._fingerprint} now, {state.fingerprint} then "
                f"({self._count} rows now); give back the same file, template, tokenizer and --data settings, or start a new run"
            )

    @property
    def steps(self) -> int:
        """Steps of the whole run, those already taken included."""
        return math.ceil(self._total / self._batch_size)

    @property
    def epoch(self) -> float:
        """How often all samples have been gone through so far."""
        return self._drawn / self._count

    def state(self) -> StreamState:
        """Where the stream stands after the last step it handed out."""
        return StreamState(
            fingerprint=self._fingerprint, batch_size=self._batch_size, seed=self._seed, num_episodes=self._epochs, drawn=self._drawn
        )

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self._drawn >= self._total:
            raise StopIteration
        end = min(self._drawn + self._batch_size, self._total)
        places = [self._place(position) for position in range(self._drawn, end)]
        self._drawn = end
        return places

    @property
    def _total(self) -> int:
        return self._epochs * self._count

    def _place(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._count, self._seed, epoch)
        return self._order[place]


def fingerprint(samples: Sequence[Sample]) -> str:
    """Of the samples in use, their ids and their marks: another file, template, tokenizer or length limit gives another."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        digest.update(f"{sample.uid} {sample.margin} {sample.desirable} {sample.shares}\n".encode())
        for row in sample.rows:
            digest.update(row.tokens.tobytes())
            digest.update(row.trained)
    return digest.hexdigest()
