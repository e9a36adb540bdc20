"""What is wrong with the data, said once: what, where (file:line), how to mend; the first ten rows of every kind of fault.

Text that comes from a file is shown through `repr`, so that no control character of the data reaches a terminal.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROWS_SHOWN = 10
BYTES_SHOWN = 80


class DataError(Exception):
    """Data that cannot be trained on; `str()` is the whole message for the user."""


class TokenizerError(DataError):
    """A tokenizer, or its chat template, that cannot be loaded or used."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One fault of one row: rows with the same `what` and `remedy` are reported together, `detail` is this row's own part."""

    what: str
    remedy: str
    line: int
    detail: str = ""


def bad_rows_error(name: str, bad: Sequence[BadRow], *, rows: int) -> DataError:
    """One error for all faults found in the `rows` rows of `name`: every kind with its count, remedy and first ten places."""
    kinds: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        kinds.setdefault((row.what, row.remedy), []).append(row)
    lines = [f"{name}: {len({row.line for row in bad})} of {rows} rows cannot be used"]
    for (what, remedy), members in kinds.items():
        lines.append(f"  {what} ({len(members)} {'row' if len(members) == 1 else 'rows'}); {remedy}")
        lines += [f"    {name}:{row.line}{': ' if row.detail else ''}{row.detail}" for row in members[:ROWS_SHOWN]]
        if len(members) > ROWS_SHOWN:
            lines.append(f"    and {len(members) - ROWS_SHOWN} more")
    return DataError("\n".join(lines))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The clause "; did you mean 'x'?" for the option nearest to `word`, or nothing."""
    nearest = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def shown(value: object) -> str:
    """The first 80 characters (of raw bytes: the first 80 bytes) of a value of the data, escaped."""
    if isinstance(value, bytes):
        value = value[:BYTES_SHOWN].decode("utf-8", errors="backslashreplace")
    if isinstance(value, str):
        return repr(value[:BYTES_SHOWN]) + ("..." if len(value) > BYTES_SHOWN else "")
    escaped = "null" if value is None else repr(value)
    return escaped if len(escaped) <= BYTES_SHOWN else f"{escaped[:BYTES_SHOWN]}..."
