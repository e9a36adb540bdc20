"""Rows of CSV files (or with tabs): the first row names the columns, every value is text, quoted ones may hold line breaks."""

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hone.datasets.errors import BadRow, DataError, shown
from hone.datasets.json_rows import UTF8_MARK, FileRows
from hone.datasets.records import Row, Source

LONGEST_FIELD = 2**31 - 1
"""Python's own limit is 131,072 characters: a long worked answer has more."""


@dataclass(frozen=True, kw_only=True)
class Parser:
    """Turns the bytes of one record, or its fields, into a row."""

    header: tuple[str, ...]
    delimiter: str

    def __call__(self, content: bytes, line: int) -> Row | BadRow:
        """The row of a record's bytes."""
        text = io.StringIO(content.decode("utf-8", errors="surrogateescape"), newline="")
        return self.row(next(csv.reader(text, delimiter=self.delimiter, strict=True)), line)

    def row(self, fields: list[str], line: int) -> Row | BadRow:
        """The row of a record's fields."""
        if len(fields) != len(self.header):
            what, remedy = "not as many values as the header has columns", "quote values that hold the delimiter, or mend the row"
            return BadRow(what=what, remedy=remedy, line=line, detail=f"{len(fields)} values, {len(self.header)} columns: {shown(fields)}")
        if any("\udc80" <= char <= "\udcff" for field in fields if not field.isascii() for char in field):
            return BadRow(what="not UTF-8", remedy="convert the file to UTF-8", line=line, detail=shown(fields))
        return Row(line=line, columns=dict(zip(self.header, fields, strict=True)))


def read_csv(path: str, file: Path, *, max_samples: int, delimiter: str) -> Source:
    """The first `max_samples` rows, and the fingerprint (blake2b) of all bytes. Raises DataError for a file without header or rows."""
    csv.field_size_limit(LONGEST_FIELD)
    with file.open("rb") as handle:
        feed = _Feed(handle)
        reader = csv.reader(feed, delimiter=delimiter, strict=True)
        parser = Parser(header=_header(path, reader), delimiter=delimiter)
        rows, bad = FileRows(file, parser), []
        start, line = feed.end, reader.line_num + 1
        while len(rows) + len(bad) < max_samples:
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                remedy = "close every quote, and double the quotes within a quoted value"
                bad.append(BadRow(what="invalid CSV", remedy=remedy, line=line, detail=str(error)))
            else:
                row = parser.row(fields, line) if fields else None
                if isinstance(row, Row):
                    rows.add(start, feed.end - start, line)
                elif row is not None:
                    bad.append(row)
            start, line = feed.end, reader.line_num + 1
        for _ in feed:
            pass  # to the end of its bytes, for the fingerprint
    if not rows and not bad:
        raise DataError(f"{path} has no rows under its header ({', '.join(map(repr, parser.header))})")
    return Source(name=path, fingerprint=feed.digest.hexdigest(), rows=rows, bad=tuple(bad), seen=parser.header)


class _Feed(Iterator[str]):
    """The lines of a file as text, counting and hashing its bytes; those that are not UTF-8 come through as lone surrogates."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self.digest, self.end = handle, hashlib.blake2b(digest_size=16), 0

    def __next__(self) -> str:
        raw = self._handle.readline()
        if not raw:
            raise StopIteration
        self.digest.update(raw)
        content = raw if self.end else raw.removeprefix(UTF8_MARK)
        self.end += len(raw)
        return content.decode("utf-8", errors="surrogateescape")


def _header(path: str, reader: Iterator[list[str]]) -> tuple[str, ...]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}:1 is no CSV header: {error}; the first row names the columns") from error
    if any("\udc80" <= char <= "\udcff" for name in header for char in name):
        raise DataError(f"{path}:1 is not UTF-8: {shown(header)}; convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8)")
    if not header or any(not name.strip() for name in header) or len(set(header)) < len(header):
        raise DataError(f"{path}:1 is no CSV header: {shown(header)}; the first row names the columns, each with a name of its own")
    return tuple(header)
