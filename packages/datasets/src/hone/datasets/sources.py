"""Opening one file, of whichever format: JSON lines, a JSON list, CSV, Parquet, Arrow. What is no row is kept for the report."""

import json
from pathlib import Path

from hone.datasets.arrow_rows import read_arrow, read_parquet
from hone.datasets.csv_rows import read_csv
from hone.datasets.errors import DataError, did_you_mean
from hone.datasets.json_rows import UTF8_MARK, read_lines, read_list
from hone.datasets.records import Source

FLAG = "--data.prompt-dataset"
# The first bytes of files that are often passed by mistake, and what to do with them.
FOREIGN = {
    b"\x1f\x8b": "a gzip file; unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (unzstd)",
    b"PK\x03\x04": "a zip file; unpack it first (unzip)",
    b"\xff\xfe": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; convert it first (iconv -f UTF-16 -t UTF-8)",
}
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".parquet", ".arrow")
"""How the names of data files end."""


def read_file(path: str, *, max_samples: int, flag: str = FLAG) -> Source:
    """The first `max_samples` rows of a file, recognised by its first bytes, then by its name; `flag` is where its name was given.

    Raises DataError for a path that is no readable file, a file of another format or damaged, and a file without rows.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as handle:
            first = handle.read(2**12)
        for magic, advice in FOREIGN.items():
            if first.startswith(magic):
                raise DataError(f"{path} is {advice}; {flag} reads {', '.join(SUFFIXES)}")
        suffix = file.suffix.lower()
        if first.startswith(PARQUET) or suffix == ".parquet":
            return read_parquet(path, file, max_samples=max_samples)
        if first.startswith((ARROW_FILE, ARROW_STREAM)) or suffix == ".arrow":
            return read_arrow(path, file, max_samples=max_samples)
        if suffix in DELIMITERS:
            return read_csv(path, file, max_samples=max_samples, delimiter=DELIMITERS[suffix])
        if first.removeprefix(UTF8_MARK).lstrip().startswith(b"[") and not _nested(first):
            return read_list(path, file, max_samples=max_samples)
        source = read_lines(path, file, max_samples=max_samples)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(missing(path, file, flag=flag)) from error
    except IsADirectoryError as error:
        raise DataError(_directory(path, file, flag=flag)) from error
    except OSError as error:
        raise DataError(f"{flag} {path!r} cannot be read: {error.strerror}; check the name and its permissions") from error
    if source.bad and (not source.rows or source.bad[0].line < source.rows[0].line):
        _refuse_document(path, file)
    return source


def _nested(first: bytes) -> bool:
    """Lines that are lists each, rather than one list over the file: they are faulty rows, and told one by one."""
    return first.removeprefix(UTF8_MARK).lstrip().startswith(b"[[")


def _refuse_document(path: str, file: Path) -> None:
    """A file whose first line is no row may be one JSON object over many lines; say so instead of listing its lines."""
    content = file.read_bytes().removeprefix(UTF8_MARK).strip()
    if b"\n" not in content:
        return
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        raise DataError(
            f"{path} is one JSON object over many lines; write one object per line, or a list of them: jq -c . {path!r} > rows.jsonl"
        )


def _directory(path: str, file: Path, *, flag: str) -> str:
    inside = sorted(child.name for child in file.iterdir())
    found = f"it holds {', '.join(repr(name) for name in inside[:5])}" if inside else "it is empty"
    return f"{flag} {path!r} is a directory without data files ({', '.join(SUFFIXES)}, or a saved dataset); {found}; name a data file"


def missing(path: str, file: Path, *, flag: str) -> str:
    """What to say of a path that leads nowhere: the nearest name, or the nearest folder."""
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    if folder == file.absolute().parent:
        where = f"there is no {file.name!r} in {str(folder)!r}{did_you_mean(file.name, (child.name for child in folder.iterdir()))}"
    else:
        where = f"the nearest folder that exists is {str(folder)!r}"
    return f"{flag} {path!r} does not exist: {where} (a hub dataset is named 'owner/name' or 'owner/name@revision')"
