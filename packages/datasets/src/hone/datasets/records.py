"""The stages of a prompt: Row (as read) -> PromptRow (validated) -> PromptRecord (token ids).

`uid` is "<first 12 digits of the source's fingerprint>:<index of the row>": the same row has the same uid in every run on
the same data, whatever was dropped around it. `line` is the line of the file, counted from 1 (of a Parquet or Arrow file:
the row). Sequences of rows may be lazy: an item is read when it is asked for.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from hone.datasets.errors import BadRow
from hone.datasets.images import Picture

FINGERPRINT_DIGITS = 12

Message = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it was read: its columns."""

    line: int
    columns: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a file or a built-in task holds: `fingerprint` is a hash of its content, `bad` are the lines that are no rows.

    Where only a part of it was asked for, `first` is the index of the part's first row. `seen` are the columns of all rows, where
    reading has come upon them anyway.
    """

    name: str
    fingerprint: str
    rows: Sequence[Row]
    bad: tuple[BadRow, ...] = ()
    first: int = 0
    seen: tuple[str, ...] = ()

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that some row has, in the order they come up."""
        return self.seen or tuple(dict.fromkeys(name for row in self.rows for name in row.columns))


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A validated row: a text or chat messages, what the reward function judges by, and the row's other columns.

    A row with `images` has messages, with a part {"type": "image"} in the place of each.
    """

    uid: str
    prompt: str | tuple[Message, ...]
    label: object
    line: int
    columns: Mapping[str, object] = field(default_factory=dict)
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The validated rows of one source, or of several end to end: `sizes` are the rows of each, `weights` its share of the draws.

    `with_images` says that some row has images.
    """

    name: str
    fingerprint: str
    rows: Sequence[PromptRow]
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    with_images: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """A prompt ready to be drawn: `tokens` are the ids of `text`, which is the rendered prompt; `given` is what was rendered.

    Of every image `tokens` have as many placeholders as the model has features of it; `places` has the first one, and how many.
    """

    uid: str
    tokens: tuple[int, ...]
    text: str
    label: object
    line: int
    columns: Mapping[str, object] = field(default_factory=dict)
    images: tuple[Picture, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    given: str | tuple[Message, ...] = ""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that will not be drawn, and why."""

    uid: str
    line: int
    reason: str


@runtime_checkable
class Records(Protocol):
    """Prompts that are made, or looked up, some at a time; `fingerprint` is of the rows in use and of what makes their ids."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PromptRecord | Dropped]: ...

    def take(self, rows: Sequence[int]) -> Sequence[PromptRecord | Dropped]:
        """The prompts of these rows, in this order; Dropped for one that cannot be used."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Everything that can be drawn, and everything that was dropped on the way; `sizes` and `weights` as in a PromptSet."""

    name: str
    records: Records
    dropped: tuple[Dropped, ...] = ()
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
