"""Labelled rows as token ids in one Arrow table, kept in the cache under a hash of all that made them, and mapped from there.

Columns: `uid`, `line`, `dataset` (its number among several), `tokens` and `trained` (of all the sample's rows of tokens end to end),
`ends` (of each of these rows), `length` [tokens], `margin`, `desirable`, `shares`; `dropped` (why the row cannot be used, null where it
can), `cut` and `apart` (its answers that were cut, and that were tokenised apart from their prompts).
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.datasets.labelled import Sample, TokenRow
from hone.datasets.lazy import Lazy
from hone.datasets.records import Dropped
from hone.datasets.token_table import cached_table

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = "samples 2"
"""Of the columns and how they are made; another one makes every cached table anew."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a row: its sample, or why it has none; how many of its answers were cut, and tokenised apart."""

    made: Sample | Dropped
    dataset: int = 0
    cut: int = 0
    apart: int = 0


def table_of(parts: Callable[[], Iterator[Sequence[Made]]], *, key: Sequence[object] | None) -> "pa.Table":
    """The table of all rows (made some at a time), from the cache where `key` is known there."""
    return cached_table(lambda: (_batch(part) for part in parts()), _schema(), key=None if key is None else [VERSION, *key])


class TabledSamples(Lazy[Sample]):
    """The samples of a table's rows that can be used, each put together when it is asked for."""

    def __init__(self, table: "pa.Table", *, data: str) -> None:
        import numpy as np

        self.table = table
        kept = np.flatnonzero(table["dropped"].is_null().to_numpy(zero_copy_only=False)).astype(np.int64)
        self._kept = array("q", kept.tobytes())
        digest = hashlib.blake2b(data.encode(), digest_size=8)
        digest.update(kept.tobytes())
        for name in ("length", "margin", "desirable"):
            digest.update(table[name].to_numpy().tobytes())
        for name in ("ends", "shares", "tokens"):
            for chunk in table[name].chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
        for chunk in table["trained"].chunks:
            digest.update(b"".join(chunk.to_pylist()))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of them come from each dataset."""
        import numpy as np

        numbers = self.table["dataset"].to_numpy()
        kept = np.frombuffer(self._kept, dtype=np.int64)
        return tuple(np.bincount(numbers[kept], minlength=int(numbers.max(initial=-1)) + 1).tolist())

    def unusable(self, places: Sequence[int]) -> dict[int, Dropped]:
        """None: what cannot be used was left out from the start."""
        return {}

    def _at(self, index: int) -> Sample:
        return _sample(self.table, self._kept[index])


def dropped_of(table: "pa.Table") -> tuple[Dropped, ...]:
    """The rows that cannot be used."""
    left = table.select(["uid", "line", "dropped"]).filter(table["dropped"].is_valid()).to_pylist()
    return tuple(Dropped(uid=row["uid"], line=row["line"], reason=row["dropped"]) for row in left)


def _sample(table: "pa.Table", place: int) -> Sample:
    own = {name: table[name][place] for name in ("tokens", "trained", "ends")}
    tokens, trained = own["tokens"].values.to_numpy(), own["trained"].as_py()
    ends = own["ends"].as_py()
    rows = tuple(
        TokenRow(tokens=array("i", tokens[start:end].tobytes()), trained=trained[start:end])
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )
    uid, line, margin, desirable, shares = (table[name][place].as_py() for name in ("uid", "line", "margin", "desirable", "shares"))
    return Sample(uid=uid, line=line, rows=rows, margin=margin, desirable=desirable, shares=tuple(shares))


def _schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = {"uid": pa.string(), "line": pa.int64(), "dataset": pa.int32(), "tokens": pa.list_(pa.int32()), "trained": pa.binary()}
    kinds |= {"ends": pa.list_(pa.int32()), "length": pa.int32(), "margin": pa.float64(), "desirable": pa.bool_()}
    kinds |= {"shares": pa.list_(pa.float64()), "dropped": pa.string(), "cut": pa.int32(), "apart": pa.int32()}
    return pa.schema(list(kinds.items()))


def _batch(part: Sequence[Made]) -> "pa.RecordBatch":
    import numpy as np
    import pyarrow as pa

    samples = [one.made if isinstance(one.made, Sample) else None for one in part]
    rows = [() if one is None else one.rows for one in samples]
    # The ids as one buffer: turned into Python's integers they would be the dearest thing here.
    ids = np.frombuffer(b"".join(row.tokens.tobytes() for own in rows for row in own), dtype=np.int32)
    lengths = [sum(len(row.tokens) for row in own) for own in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = {
        "uid": [one.made.uid for one in part],
        "line": [one.made.line for one in part],
        "dataset": [one.dataset for one in part],
        "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "trained": [b"".join(row.trained for row in own) for own in rows],
        "ends": [np.cumsum([len(row.tokens) for row in own]).astype(np.int32).tolist() for own in rows],
        "length": lengths,
        "margin": [0.0 if one is None else one.margin for one in samples],
        "desirable": [one is None or one.desirable for one in samples],
        "shares": [[] if one is None else list(one.shares) for one in samples],
        "dropped": [one.made.reason if isinstance(one.made, Dropped) else None for one in part],
        "cut": [one.cut for one in part],
        "apart": [one.apart for one in part],
    }
    return pa.RecordBatch.from_pydict(columns, schema=_schema())
