"""Rows of JSON files: lines, of which only the places are kept (24 bytes a row) and which are read when asked for, or one list.

UTF-8 with or without a byte-order mark; lines end in LF or CRLF; blank lines are skipped, but counted as lines.
"""

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from hone.datasets.errors import BadRow, DataError, shown
from hone.datasets.lazy import Lazy
from hone.datasets.records import Row, Source

UTF8_MARK = b"\xef\xbb\xbf"
Parse = Callable[[bytes, int], Row | BadRow]


class FileRows(Lazy[Row]):
    """Rows that lie in known places of a file, each turned from bytes into columns whenever it is asked for."""

    def __init__(self, file: Path, parse: Parse) -> None:
        self._file, self._parse = file, parse
        self._starts, self._lengths, self._lines = array("Q"), array("Q"), array("Q")
        self._handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def add(self, start: int, length: int, line: int) -> None:
        """One more row: `length` bytes from byte `start`."""
        self._starts.append(start)
        self._lengths.append(length)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Row]:
        """Every row in order."""
        places = zip(self._starts, self._lengths, self._lines, strict=True)
        return (self._row(start, length, line) for start, length, line in places)

    def _at(self, index: int) -> Row:
        return self._row(self._starts[index], self._lengths[index], self._lines[index])

    def _row(self, start: int, length: int, line: int) -> Row:
        row = self._parse(os.pread(self._handle, length, start), line)
        if isinstance(row, BadRow):
            raise DataError(f"{self._file}:{row.line} has changed while it was in use ({row.what}); leave the file alone during a run")
        return row


def read_lines(path: str, file: Path, *, max_samples: int) -> Source:
    """JSON lines: the first `max_samples` rows, and the fingerprint (blake2b) of all bytes. Raises DataError for a file without rows."""
    digest = hashlib.blake2b(digest_size=16)
    rows, bad = FileRows(file, parse_line), []
    # Bound once: this loop sees every line of the file, and a million of them are to cost seconds.
    update, decode, add = digest.update, _DECODER.decode, rows.add
    end, taken = 0, 0
    columns: dict[str, object] = {}
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            update(raw)
            start, end = end, end + len(raw)
            if taken >= max_samples:
                continue
            try:
                value = decode(raw.decode())
            except (ValueError, RecursionError):
                value = None
            if type(value) is dict:
                columns.update(value)
            else:
                content = raw.removeprefix(UTF8_MARK) if number == 1 else raw
                start, raw = start + len(raw) - len(content), content
                if not content.strip():
                    continue
                row = parse_line(content.strip(), number)
                if isinstance(row, BadRow):
                    bad.append(row)
                    taken += 1
                    continue
                columns.update(row.columns)
            add(start, len(raw), number)
            taken += 1
    if not rows and not bad:
        raise DataError(f"{path} has no rows (it is empty, or holds blank lines only); give it one JSON object per line")
    return Source(name=path, fingerprint=digest.hexdigest(), rows=rows, bad=tuple(bad), seen=tuple(columns))


def read_list(path: str, file: Path, *, max_samples: int) -> Source:
    """One JSON list of objects, held in memory; a row's line is where its object begins."""
    content = file.read_bytes()
    fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        text = content.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line} is not UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8") from error
    rows: list[Row] = []
    bad: list[BadRow] = []
    for item in _items(text):
        if len(rows) + len(bad) >= max_samples:
            break
        (rows if isinstance(item, Row) else bad).append(item)  # pyright: ignore[reportArgumentType] - each goes to its own list
    if not rows and not bad:
        raise DataError(f"{path} has no rows (an empty list); give it one JSON object per row")
    return Source(name=path, fingerprint=fingerprint, rows=tuple(rows), bad=tuple(bad))


def parse_line(content: bytes, line: int) -> Row | BadRow:
    """The row of one line that is not blank, or what is wrong with it."""
    try:
        value = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            what="not UTF-8",
            remedy="convert the file to UTF-8",
            line=line,
            detail=f"byte {error.start + 1} of the line is 0x{content[error.start]:02x}: {shown(content)}",
        )
    except json.JSONDecodeError as error:
        return BadRow(
            what="invalid JSON", remedy="mend or delete the lines", line=line, detail=f"column {error.colno}, {error.msg}: {shown(content)}"
        )
    except (ValueError, RecursionError) as error:
        return BadRow(what="invalid JSON", remedy="mend or delete the lines", line=line, detail=f"{error}: {shown(content)}")
    return _object(value, line, content)


def _object(value: object, line: int, content: bytes | str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(line=line, columns=value)
    return BadRow(
        what="not a JSON object",
        remedy="write each row as {column: value, ...}",
        line=line,
        detail=f"{type(value).__name__}: {shown(content)}",
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _items(text: str) -> Iterator[Row | BadRow]:
    """The objects of a JSON list, each with its line; after invalid JSON nothing more can be told apart."""
    place, line, counted = text.index("[") + 1, 1, 0
    first = True
    while True:
        place = _past_blanks(text, place)
        if first and text[place : place + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield BadRow(what="invalid JSON", remedy="mend the list", line=line, detail=f"{error}: {shown(text[place : place + 80])}")
            return
        yield _object(value, line, text[place:end])
        first, place = False, _past_blanks(text, end)
        if text[place : place + 1] == "]":
            if rest := text[place + 1 :].strip():
                line += text.count("\n", counted, place)
                yield BadRow(what="invalid JSON", remedy="mend the list", line=line, detail=f"text after its end: {shown(rest)}")
            return
        if text[place : place + 1] != ",":
            line += text.count("\n", counted, place)
            what = "the list is cut off" if place >= len(text) else f"a comma or ] expected: {shown(text[place : place + 80])}"
            yield BadRow(what="invalid JSON", remedy="mend the list", line=line, detail=what)
            return
        place += 1


def _past_blanks(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place
