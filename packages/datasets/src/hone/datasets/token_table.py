"""Token ids of many rows in one Arrow table, kept in the cache under a hash of all that made them, and mapped from there.

Columns: `text` (rendered), `tokens`, `length` [tokens], `unknown` (tokens outside the vocabulary), `doubled` (begins with two BOS),
`places` (of every image its first placeholder, and how many).
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hone.datasets import cache
from hone.datasets.lazy import Lazy
from hone.datasets.records import Dropped, PromptRecord, PromptRow

if TYPE_CHECKING:
    import pyarrow as pa

CACHED_ROWS = 1000
"""Fewer rows are tokenised in less time than a file of them is looked for, and are not kept."""
VERSION = 1
"""Of the columns and how they are made; another one makes every cached table anew."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A row as text and ids."""

    text: str
    tokens: list[int]
    unknown: int
    doubled: bool
    places: tuple[tuple[int, int], ...] = ()


def table_of(rows: Callable[[], Iterator[list[Encoded]]], *, key: Sequence[object] | None) -> "pa.Table":
    """The table of all rows (made some at a time), from the cache where `key` is known there."""
    return cached_table(lambda: (_batch(part) for part in rows()), _schema(), key=None if key is None else [VERSION, *key])


def cached_table(batches: "Callable[[], Iterator[pa.RecordBatch]]", schema: "pa.Schema", *, key: Sequence[object] | None) -> "pa.Table":
    """The table of all batches: without a `key` in memory, else in the cache, where it is made once and mapped from.

    `key` is everything that decides the rows, but for the versions of the libraries that make ids of texts.
    """
    import pyarrow as pa

    if key is None:
        return pa.Table.from_batches(list(batches()), schema=schema)

    version, *rest = key
    made_from = json.dumps([version, *libraries(), *rest])
    name = hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()

    def write(target: Path) -> None:
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)

    with pa.memory_map(str(cache.made(f"tokens-{name}.arrow", write))) as source:
        return pa.ipc.open_file(source).read_all()


def libraries() -> tuple[str, str]:
    """The versions of what makes ids of texts."""
    import tokenizers
    import transformers

    return transformers.__version__, tokenizers.__version__


class TokenRecords(Lazy[PromptRecord]):
    """The prompts of a table's `kept` rows, put together when they are asked for."""

    def __init__(self, table: "pa.Table", rows: Sequence[PromptRow], kept: "array[int]", *, data: str, with_images: bool) -> None:
        self._texts, self._tokens, self._places = table["text"], table["tokens"], table["places"]
        self._rows, self._kept = rows, kept
        digest = hashlib.blake2b(f"{data} {rows[0].uid if len(rows) else ''}".encode(), digest_size=8)
        digest.update(kept.tobytes())
        for chunk in self._tokens.chunks:
            digest.update(chunk.offsets.to_numpy().tobytes())
            digest.update(chunk.values.to_numpy().tobytes())
        if with_images:
            digest.update(" ".join(image.digest for place in kept for image in rows[place].images).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, rows: Sequence[int]) -> list[PromptRecord | Dropped]:
        """The prompts of these rows."""
        return [self._at(row) for row in rows]

    def _at(self, index: int) -> PromptRecord:
        place = self._kept[index]
        tokens, text = self._tokens[place].values.to_numpy().tolist(), self._texts[place].as_py()
        flat = self._places[place].as_py()
        return record(self._rows[place], text, tokens, tuple(zip(flat[::2], flat[1::2], strict=True)))


def record(row: PromptRow, text: str, tokens: Sequence[int], places: tuple[tuple[int, int], ...]) -> PromptRecord:
    """A row with its text and ids, and the places of its images."""
    seen = {"images": row.images, "places": places, "given": row.prompt}
    return PromptRecord(uid=row.uid, tokens=tuple(tokens), text=text, label=row.label, line=row.line, columns=row.columns, **seen)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = {"text": pa.string(), "tokens": pa.list_(pa.int32()), "length": pa.int32(), "unknown": pa.int32(), "doubled": pa.bool_()}
    kinds["places"] = pa.list_(pa.int32())
    return pa.schema(list(kinds.items()))


def _batch(part: Sequence[Encoded]) -> "pa.RecordBatch":
    import pyarrow as pa

    columns = {
        "text": [one.text for one in part],
        "tokens": [one.tokens for one in part],
        "length": [len(one.tokens) for one in part],
        "unknown": [one.unknown for one in part],
        "doubled": [one.doubled for one in part],
        "places": [[number for place in one.places for number in place] for one in part],
    }
    return pa.RecordBatch.from_pydict(columns, schema=_schema())
