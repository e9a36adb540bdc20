"""The unit of a checkpoint: a range of one flattened tensor of a role. Any cut of the state into such ranges can be read as any other.

section    what it is of a parameter: "master" (fp32), the optimiser's own names ("exp_avg", "step"), or an extra one ("ema")
name       the parameter, as the model's checkpoint names it
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor

MASTER = "master"
Columns = tuple[int, int]
"""The first column of a matrix, and the first after the last."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements start .. start + n of a tensor of `shape`, flattened; `values` may be a view of live memory.

    With `columns` (low, high), of the matrix's columns low .. high alone, flattened by themselves.
    """

    section: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Shaped[Tensor, " n"]
    columns: Columns | None = None

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.section}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Where a range of a parameter lies in this rank's memory: `numel` elements from `offset` of flat tensor number `flat`.

    `columns` as in `Piece`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    flat: int
    offset: int
    numel: int
    columns: Columns | None = None


@runtime_checkable
class Source(Protocol):
    """A role's state as it was saved."""

    counters: dict[str, int]

    def sections(self, name: str) -> frozenset[str]:
        """What there is of a parameter."""
        ...

    def read(self, section: str, name: str, *, start: int, numel: int, columns: Columns | None = None) -> Shaped[Tensor, " numel"]:
        """Elements start .. start + numel of the flattened tensor, or of its `columns`. Raises CheckpointError for what is not there."""
        ...


def share(fragments: Sequence[Fragment], *, rank: int, world_size: int) -> list[Fragment]:
    """A rank's equal part of what every rank holds in full, so that each element is written by one of them."""
    total = sum(fragment.numel for fragment in fragments)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    parts, begin = [], 0
    for fragment in fragments:
        first, last = max(low - begin, 0), min(high - begin, fragment.numel)
        begin += fragment.numel
        if first < last:
            parts.append(replace(fragment, start=fragment.start + first, offset=fragment.offset + first, numel=last - first))
    return parts
