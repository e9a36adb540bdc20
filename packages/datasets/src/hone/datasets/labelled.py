"""What offline learning learns from: rows as validated, and samples as token ids, of which only the marked tokens are trained on.

Flow: Row -> TextRow, ExchangeRow, PairRow, JudgedRow or StepsRow (`layouts.py`) -> Sample (`exchanges.py`).
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from hone.datasets.records import Dropped, Message

Labelled = TypeVar("Labelled", bound="AnyRow")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A prompt and what answers it: two texts, or messages on both sides. Of the answer, what the assistant says is trained on."""

    prompt: str | tuple[Message, ...]
    answer: str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A prompt and its answer as the ids that were sampled; every id of the answer is trained on."""

    prompt: "array[int]"
    answer: "array[int]"


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A document, every token of which is trained on."""

    uid: str
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ExchangeRow:
    """A demonstration."""

    uid: str
    line: int
    exchange: Exchange | Sampled


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Two answers to one prompt; `margin` [reward] says by how much the chosen one is better, 0 where the data does not."""

    uid: str
    line: int
    chosen: Exchange | Sampled
    rejected: Exchange | Sampled
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    """An answer that was found good, or bad."""

    uid: str
    line: int
    exchange: Exchange
    desirable: bool


@dataclass(frozen=True, kw_only=True)
class StepsRow:
    """A solution in steps; `shares[i]` is the share of good in step i, in [0, 1]. `pieces` of one text, the prompt being the first."""

    uid: str
    line: int
    prompt: str
    steps: tuple[str, ...]
    shares: tuple[float, ...]


AnyRow = TextRow | ExchangeRow | PairRow | JudgedRow | StepsRow


@dataclass(frozen=True, kw_only=True)
class LabelledSet(Generic[Labelled]):
    """The validated rows of one source, or of several datasets end to end: `sizes` are those of each, `weights` its share of the draws.

    `columns` are those of the data; `characters` are those of every document, where the rows are documents.
    """

    name: str
    fingerprint: str
    rows: Sequence[Labelled]
    columns: tuple[str, ...] = ()
    characters: Sequence[int] = ()
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Token ids, and for each whether it is trained on (a byte, 0 or 1)."""

    tokens: "array[int]"
    trained: bytes

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.trained), f"{len(self.tokens)} tokens with {len(self.trained)} marks"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the data, ready to be learnt from: one row of tokens or several, which nothing but the row they came from joins.

    A pair has two, the chosen and the rejected answer. `margin` [reward] is a pair's, `desirable` a judged answer's, `shares` are
    those of the steps whose last tokens are marked, in order.
    """

    uid: str
    line: int
    rows: tuple[TokenRow, ...]
    margin: float = 0.0
    desirable: bool = True
    shares: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row.tokens) for row in self.rows)


@runtime_checkable
class Drawable(Protocol):
    """Samples that are made, or looked up, when they are asked for; `fingerprint` is of those in use and of all that makes them."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample of a place that can be used."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """Every sample that can be used, in order."""
        ...

    def unusable(self, places: Sequence[int]) -> dict[int, Dropped]:
        """Which of these places cannot be used, and why; the others are ready then."""
        ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Everything that can be learnt from in one source, what was dropped on the way, and what the user should know of the rest.

    `sizes` and `weights` as in a LabelledSet.
    """

    name: str
    samples: Drawable
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
