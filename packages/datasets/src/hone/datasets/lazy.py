"""Sequences whose items are made when they are asked for, so that a million rows cost only their places."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """A sequence that makes its items; `_at` gets an index in [0, len)."""

    @abstractmethod
    def _at(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        """One item, or a list of them."""
        if isinstance(index, slice):
            return [self._at(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._at(place)

    def __iter__(self) -> Iterator[Item]:
        """Every item in order."""
        return (self._at(place) for place in range(len(self)))


class Joined(Lazy[Item]):
    """Several sequences end to end."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append(len(part) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> Item:
        number = bisect_right(self._ends, index)
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Item]:
        """Every item in order, each part in its own quickest way."""
        for part in self._parts:
            yield from part


class Span(Lazy[Item]):
    """The items [start, stop) of another sequence."""

    def __init__(self, items: Sequence[Item], start: int, stop: int) -> None:
        self._items, self._start, self._stop = items, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def _at(self, index: int) -> Item:
        return self._items[self._start + index]
