"""Draws of labelled rows: which samples each optimiser step gets, fixed by the seed, and resumable from a few numbers.

As prompts are drawn (`stream.py`): in the epochs of an `Order`, end to end, and only the last step may be smaller. Where rows are
tokenised as they are drawn, one that cannot be used is passed over, and the next takes its place.
"""

import math
from collections.abc import Iterator

from hone.datasets.errors import DataError
from hone.datasets.labelled import Samples
from hone.datasets.order import Order
from hone.datasets.records import Dropped
from hone.datasets.stream import StreamState, mixture


class SampleStream:
    """An iterator over steps, each a list of places in the samples."""

    def __init__(self, samples: Samples, *, batch_size: int, seed: int, epochs: int, state: StreamState | None = None) -> None:
        """With `state`, goes on where it was taken; DataError where these are not the samples it was drawn from."""
        self._samples = samples.samples
        self._fingerprint = mixture(self._samples.fingerprint, samples.sizes, samples.weights)
        self._batch_size, self._seed, self._epochs = batch_size, seed, epochs
        self._drawn = 0 if state is None else state.drawn
        self._passed_over: dict[str, Dropped] = {}
        if state is not None and state.fingerprint != self._fingerprint:
            raise DataError(
                f"the data has changed since the run was saved: fingerprint {self._fingerprint} now, {state.fingerprint} then "
                f"({len(self._samples)} rows now); give back the same file, template, tokenizer and --data settings, or start a new run"
            )
        sizes = samples.sizes if samples.weights else (len(self._samples),)
        self._order = Order(sizes, samples.weights, seed=seed, episodes=epochs)

    @property
    def steps(self) -> int:
        """Steps of the whole run, those already taken included; fewer where rows are passed over."""
        return math.ceil(len(self._order) / self._batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which all samples are gone through once."""
        return math.ceil(len(self._order) / self._epochs / self._batch_size)

    @property
    def epoch(self) -> float:
        """How often all samples have been gone through so far."""
        return self._drawn * self._epochs / len(self._order)

    @property
    def passed_over(self) -> tuple[Dropped, ...]:
        """The rows that this stream came upon and could not use, in the order it did."""
        return tuple(self._passed_over.values())

    def state(self) -> StreamState:
        """Where the stream stands after the last step it handed out."""
        return StreamState(
            fingerprint=self._fingerprint, batch_size=self._batch_size, seed=self._seed, num_episodes=self._epochs, drawn=self._drawn
        )

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        places: list[int] = []
        while len(places) < self._batch_size and self._drawn < len(self._order):
            end = min(self._drawn + self._batch_size - len(places), len(self._order))
            drawn = [self._order[position].row for position in range(self._drawn, end)]
            self._drawn = end
            unusable = self._samples.unusable([*places, *drawn])
            self._passed_over |= {row.uid: row for row in unusable.values()}
            places += [place for place in drawn if place not in unusable]
        if not places:
            raise StopIteration
        return places
