"""Reading: a JSON-lines file into rows, with a fingerprint of its bytes; what is no row is kept for the report.

UTF-8 with or without a byte-order mark; lines end in LF or CRLF; blank lines are skipped, but counted as lines.
"""

import hashlib
import json
from pathlib import Path
from typing import NoReturn

from hone.datasets.errors import BadRow, DataError, did_you_mean, shown
from hone.datasets.records import Row, Source

UTF8_MARK = b"\xef\xbb\xbf"
# The first bytes of files that are often passed by mistake, and what to do with them.
FOREIGN = {
    b"PAR1": "a Parquet file; export it as JSON lines (pandas: read_parquet(...).to_json(..., orient='records', lines=True))",
    b"\x1f\x8b": "a gzip file; unpack it first (gunzip)",
    b"PK\x03\x04": "a zip file; unpack it first (unzip)",
    b"\xff\xfe": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
}


def read_json_lines(path: str, *, max_samples: int, flag: str = "--data.prompt-dataset") -> Source:
    """The first `max_samples` rows of a file, which `flag` named, and the fingerprint (blake2b) of all its bytes.

    Raises DataError for a path that is no readable file, a file of another format, and a file without rows.
    """
    file = Path(path).expanduser()
    digest = hashlib.blake2b(digest_size=16)
    rows: list[Row] = []
    bad: list[BadRow] = []
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                digest.update(raw)
                if number == 1:
                    _refuse_foreign(path, raw, flag)
                    raw = raw.removeprefix(UTF8_MARK)
                content = raw.strip()
                if not content or len(rows) + len(bad) >= max_samples:
                    continue
                row = _parse(content, number)
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    bad.append(row)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(_missing(path, file, flag)) from error
    except IsADirectoryError as error:
        raise DataError(_directory(path, file, flag)) from error
    except OSError as error:
        raise DataError(f"{flag} {path!r} cannot be read: {error.strerror}; check the name and its permissions") from error
    if not rows and not bad:
        raise DataError(f"{path} has no rows (it is empty, or holds blank lines only); give it one JSON object per line")
    if bad and (not rows or bad[0].line < rows[0].line):
        _refuse_document(path, file)
    return Source(name=path, fingerprint=digest.hexdigest(), rows=tuple(rows), bad=tuple(bad))


def _parse(content: bytes, line: int) -> Row | BadRow:
    """The row of one line that is not blank, or what is wrong with it."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
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
    if not isinstance(value, dict):
        return BadRow(
            what="not a JSON object",
            remedy="write each row as {column: value, ...}",
            line=line,
            detail=f"{type(value).__name__}: {shown(content)}",
        )
    return Row(line=line, columns=value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _refuse_foreign(path: str, first: bytes, flag: str) -> None:
    for magic, advice in FOREIGN.items():
        if first.startswith(magic):
            raise DataError(f"{path} is {advice}; {flag} reads JSON lines in UTF-8")


def _refuse_document(path: str, file: Path) -> None:
    """A file whose first line is no row may be one JSON document over many lines; say so instead of listing its lines."""
    try:
        document = json.loads(file.read_bytes().removeprefix(UTF8_MARK))
    except (ValueError, RecursionError):
        return
    if isinstance(document, list) and document and all(isinstance(item, dict) for item in document):
        raise DataError(f"{path} is one JSON list of {len(document)} rows, not JSON lines; convert it: jq -c '.[]' {path!r} > rows.jsonl")
    if isinstance(document, dict):
        raise DataError(f"{path} is one JSON object over many lines, not JSON lines; convert it: jq -c . {path!r} > rows.jsonl")


def _directory(path: str, file: Path, flag: str) -> str:
    inside = sorted(child.name for child in file.iterdir() if child.suffix in (".jsonl", ".json"))
    found = f"it holds {', '.join(repr(name) for name in inside[:5])}" if inside else "it holds no .jsonl file"
    return f"{flag} {path!r} is a directory; {found}; name one JSON-lines file"


def _missing(path: str, file: Path, flag: str) -> str:
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    if folder == file.absolute().parent:
        where = f"there is no {file.name!r} in {str(folder)!r}{did_you_mean(file.name, (child.name for child in folder.iterdir()))}"
    else:
        where = f"the nearest folder that exists is {str(folder)!r}"
    return f"{flag} {path!r} does not exist: {where} (a file of JSON lines is wanted, not the name of a hub dataset)"
