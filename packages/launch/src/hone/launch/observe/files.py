"""The only ways a run writes: a line appended, or a whole file replaced; private to its owner and never half there.

Files are opened 0600 whatever the umask. A line goes out in one write to a file opened for appending; a whole file is
written beside its place under an unpredictable name, flushed to the disk and renamed.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as one line. Raises ValueError for a NaN or infinity, which JSON cannot hold, and TypeError for an object."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(line)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every complete line of a JSON-lines file, and how many were torn (0 or 1: a killed process may leave its last line unfinished)."""
    *complete, tail = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in complete], int(bool(tail))


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and disappears when it does not."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a whole text file, UTF-8; a lone surrogate is written as its escape."""
    with replaced(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def unused(path: Path, make: Callable[[Path], None]) -> Path:
    """`make(path)`, or the first of path-2, path-3, ... that does not exist yet; returns the one made."""
    number, candidate = 1, path
    while True:
        try:
            make(candidate)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
