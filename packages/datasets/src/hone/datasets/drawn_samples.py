"""Samples that are tokenised when they are drawn, so that a million rows begin in the time it takes to read them.

Of rows each is a sample. Documents fill samples together, and how many tokens one has is known only when it is tokenised: they are laid
into samples by their characters, at the tokens a character that some of them were found to have.
"""

import hashlib
from abc import abstractmethod
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hone.datasets.encoded_rows import RowEncoder
from hone.datasets.errors import DataError
from hone.datasets.exchanges import Piece
from hone.datasets.labelled import LabelledSet, Sample, TextRow, TokenRow
from hone.datasets.lazy import Lazy
from hone.datasets.records import Dropped

KEPT = 1024
"""Samples that are held after they were made, besides those of the last call."""
AT_ONCE = 256


class Drawn(Lazy[Sample]):
    """What is made of rows when it is asked for, several at a time."""

    def __init__(self, name: str, *, identity: str) -> None:
        self._name = name
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._made: dict[int, Sample | Dropped] = {}

    @abstractmethod
    def _make(self, places: Sequence[int]) -> Sequence[Sample | Dropped]:
        """The samples of these places, or why they have none."""

    def __iter__(self) -> Iterator[Sample]:
        """Every sample that can be used, in order."""
        places = iter(range(len(self)))
        while part := list(islice(places, AT_ONCE)):
            unusable = self.unusable(part)
            yield from [self[place] for place in part if place not in unusable]

    def unusable(self, places: Sequence[int]) -> dict[int, Dropped]:
        """Which of these places cannot be used; the others are tokenised now. DataError for a row that a template fails on."""
        made = {place: self._made.pop(place) for place in dict.fromkeys(places) if place in self._made}
        missing = [place for place in dict.fromkeys(places) if place not in made]
        made |= zip(missing, self._make(missing), strict=True) if missing else ()
        for place in list(islice(self._made, max(0, len(self._made) - KEPT))):
            del self._made[place]
        self._made |= made
        return {place: one for place, one in made.items() if isinstance(one, Dropped)}

    def _at(self, index: int) -> Sample:
        if index not in self._made:
            self.unusable([index])
        found = self._made[index]
        if isinstance(found, Dropped):
            raise DataError(f"{self._name}:{found.line} cannot be learnt from: {found.reason}")
        return found


class DrawnSamples(Drawn):
    """A sample of every row."""

    def __init__(self, rows: LabelledSet[Any], encoder: RowEncoder, *, identity: str) -> None:
        super().__init__(rows.name, identity=identity)
        self._rows, self._encoder = rows.rows, encoder

    def __len__(self) -> int:
        return len(self._rows)

    def _make(self, places: Sequence[int]) -> Sequence[Sample | Dropped]:
        rows = [self._rows[place] for place in places]
        return [one.made for part in self._encoder.parts(self._name, rows) for one in part]


class DrawnDocuments(Drawn):
    """Documents in samples of about `max_len` tokens: several short ones that lie side by side, or a part of a long one.

    `rate` is how many tokens a character has. What is longer than it was taken to be makes its sample longer; no row of tokens is
    longer than `max_len`, and every character is in the samples once.
    """

    def __init__(self, rows: LabelledSet[TextRow], encoder: RowEncoder, *, max_len: int, rate: float, identity: str) -> None:
        super().__init__(rows.name, identity=identity)
        self._rows, self._encoder, self._max_len = rows.rows, encoder, max_len
        self._first, sizes = array("q"), list[int]()
        start = 0
        for size in rows.sizes or [len(rows.rows)]:
            before = len(self._first)
            self._lay(rows.characters, start, start + size, rate)
            sizes.append(len(self._first) - before)
            start += size
        self.sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._first)

    def _lay(self, characters: Sequence[int], start: int, stop: int, rate: float) -> None:
        """The first document of every sample; of one that fills several, it is the first of each."""
        room = 0.0
        for place, count in enumerate(characters[start:stop], start=start):
            length = 1 + rate * count
            if length > self._max_len:
                self._first.extend([place] * int(-(-length // self._max_len)))
                room = 0.0
                continue
            if length > room:
                self._first.append(place)
                room = self._max_len
            room -= length

    def _make(self, places: Sequence[int]) -> Sequence[Sample | Dropped]:
        found = [self._pieces(place) for place in places]
        ids = iter(self._encoder.piece_ids([piece for _, pieces in found for piece in pieces]))
        return [self._sample(row, [next(ids) for _ in pieces]) for row, pieces in found]

    def _pieces(self, place: int) -> tuple[TextRow, list[Piece]]:
        """The first document of a sample, and the texts it is made of."""
        first = self._first[place]
        low, high = bisect_left(self._first, first), bisect_right(self._first, first)
        if high - low > 1:
            row, part, parts = self._rows[first], place - low, high - low
            bounds = [_bound(row.text, part, parts), _bound(row.text, part + 1, parts)]
            return row, [Piece(row.text[slice(*bounds)], begins=part == 0, ends=part + 1 == parts)]
        stop = self._first[high] if high < len(self._first) else len(self._rows)
        rows = [self._rows[number] for number in range(first, stop)]
        return rows[0], [Piece(row.text, begins=True, ends=True) for row in rows]

    def _sample(self, row: TextRow, pieces: Sequence[Sequence[int]]) -> Sample | Dropped:
        found: list[TokenRow] = []
        for ids in pieces:
            count = -(-len(ids) // self._max_len)
            cuts = [(at * len(ids) // count, (at + 1) * len(ids) // count) for at in range(count)]
            # Of a single token nothing can be learnt, for nothing stands before it.
            found += [TokenRow(tokens=array("i", ids[start:end]), trained=b"\1" * (end - start)) for start, end in cuts if end - start > 1]
        if not found:
            return Dropped(uid=row.uid, line=row.line, reason="a part of the document has fewer than two tokens")
        return Sample(uid=row.uid, line=row.line, rows=tuple(found))


def _bound(text: str, part: int, parts: int) -> int:
    """Where a part of a text begins: before white space, where there is some in the last half of the part before."""
    even = part * len(text) // parts
    if part in (0, parts):
        return even
    half = len(text) // parts // 2
    return next((at for at in range(even, even - half, -1) if text[at].isspace()), even)
