"""The order of draws: of every epoch a permutation of all rows or, with weights, of several datasets taking turns at random.

A function of the seed and the epoch alone: no worker, no batch size and no call before has a part in it.
"""

import random
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Place(NamedTuple):
    """A row drawn in an epoch, by its place among all rows; `again` counts how often that epoch has drawn it before."""

    epoch: int
    row: int
    again: int


class Order:
    """`episodes` epochs end to end over rows of which `sizes` belong to one dataset each.

    Without weights an epoch is every row once. With weights each draw chooses its dataset by them, independently; every dataset
    goes through permutations of its rows, and the epoch ends with the draw that has gone through the last of them whole, as
    the field's `all_exhausted` does. So every row comes at least once, and those of a dataset small for its weight more often.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, episodes: int) -> None:
        self._sizes, self._seed = tuple(sizes), seed
        self._bounds = list(accumulate(weights))
        self._starts = [0, *accumulate(sizes)]
        lengths = (len(self._turns(epoch)) for epoch in range(episodes)) if weights else [self._starts[-1]] * episodes
        self._ends = [0, *accumulate(lengths)]
        self._epoch, self._rows, self._again = -1, array("q"), None

    def __len__(self) -> int:
        """Draws of all epochs."""
        return self._ends[-1]

    def __getitem__(self, position: int) -> Place:
        """What the draw at a position, counted over all epochs, draws."""
        epoch = bisect_right(self._ends, position) - 1
        if epoch != self._epoch:
            self._epoch = epoch
            self._rows, self._again = self._mixed(epoch) if self._bounds else (permutation(self._starts[-1], self._seed, epoch), None)
        place = position - self._ends[epoch]
        return Place(epoch=epoch, row=self._rows[place], again=0 if self._again is None else self._again[place])

    def _turns(self, epoch: int) -> "np.ndarray":
        """The dataset of every draw of an epoch."""
        import numpy as np

        generator = random.Random(f"{self._seed}:{epoch}:turns")
        turns = np.empty(0, dtype=np.int64)
        while True:
            more = max(1024, len(turns), sum(self._sizes))
            keys = np.fromiter((generator.random() for _ in range(more)), dtype=np.float64, count=more)
            turns = np.concatenate([turns, np.searchsorted(self._bounds[:-1], keys, side="right")])
            if np.all(np.bincount(turns, minlength=len(self._sizes)) >= self._sizes):
                last = [np.flatnonzero(turns == number)[size - 1] for number, size in enumerate(self._sizes) if size]
                return turns[: int(max(last)) + 1]

    def _mixed(self, epoch: int) -> "tuple[array[int], array[int]]":
        import numpy as np

        turns = self._turns(epoch)
        rows, again = np.empty(len(turns), dtype=np.int64), np.empty(len(turns), dtype=np.int64)
        for number, size in enumerate(self._sizes):
            own = turns == number
            count = int(own.sum())
            passes = [_permuted(size, f"{self._seed}:{epoch}:{number}:{again}") for again in range(-(-count // size) if size else 0)]
            if passes:
                rows[own] = np.concatenate(passes)[:count] + self._starts[number]
                again[own] = np.arange(count) // size
        return array("q", rows.tobytes()), array("q", again.tobytes())


def permutation(count: int, seed: int, epoch: int) -> "array[int]":
    """A permutation that never changes: random() is the one generator whose sequence Python promises to keep between versions."""
    return array("q", _permuted(count, f"{seed}:{epoch}").tobytes())


def _permuted(count: int, seed: str) -> "np.ndarray":
    import numpy as np

    generator = random.Random(seed)
    keys = np.fromiter((generator.random() for _ in range(count)), dtype=np.float64, count=count)
    return np.argsort(keys, kind="stable").astype(np.int64)
