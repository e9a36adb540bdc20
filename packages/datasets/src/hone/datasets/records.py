"""The stages of a prompt: Row (as read) -> PromptRow (validated) -> PromptRecord (token ids).

`uid` is "<first 12 digits of the source's fingerprint>:<index of the row>": the same row has the same uid in every run on
the same data, whatever was dropped around it. `line` is the line of the file, counted from 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    """What a file or a built-in task holds: `fingerprint` is a hash of its content, `bad` are the lines that are no rows."""

    name: str
    fingerprint: str
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A validated row: a text or chat messages, and what the reward function judges by.

    A row with `images` has messages, with a part {"type": "image"} in the place of each.
    """

    uid: str
    prompt: str | tuple[Message, ...]
    label: object
    line: int
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The validated rows of one source."""

    name: str
    fingerprint: str
    rows: tuple[PromptRow, ...]


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
    images: tuple[Picture, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    given: str | tuple[Message, ...] = ""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that will not be drawn, and why."""

    uid: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Everything that can be drawn from one source, and everything that was dropped on the way."""

    name: str
    records: tuple[PromptRecord, ...]
    dropped: tuple[Dropped, ...] = ()
