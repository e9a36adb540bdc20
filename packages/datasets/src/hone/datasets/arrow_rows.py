"""Rows of Arrow tables: Arrow files and saved Hugging Face datasets are mapped into memory as they lie, Parquet is read or converted once.

A row's line is its number, counted from 1. pyarrow is imported here and when a file needs it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hone.datasets import cache
from hone.datasets.errors import DataError, did_you_mean, shown
from hone.datasets.lazy import Lazy
from hone.datasets.records import Row, Source

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

HELD_BYTES = 256 * 2**20
"""A Parquet file is held in memory up to this size, unpacked; a larger one is converted to Arrow in the cache and mapped."""
ROWS_AT_ONCE = 4096


class TableRows(Lazy[Row]):
    """The rows of a table, made into Python's own values when they are asked for."""

    def __init__(self, table: "pa.Table") -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def _at(self, index: int) -> Row:
        return Row(line=index + 1, columns=self._table.slice(index, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        """Every row, some thousands turned at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            for index, columns in enumerate(self._table.slice(start, ROWS_AT_ONCE).to_pylist(), start):
                yield Row(line=index + 1, columns=columns)


def read_parquet(path: str, file: Path, *, max_samples: int) -> Source:
    """The first `max_samples` rows of a Parquet file. Raises DataError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fingerprint = _fingerprint([file])
    try:
        with pq.ParquetFile(file) as parquet:
            size = sum(parquet.metadata.row_group(group).total_byte_size for group in range(parquet.metadata.num_row_groups))
            if size <= HELD_BYTES:
                return _source(path, parquet.read(), fingerprint, max_samples)
            _room(path, size)
            converted = cache.made(f"{fingerprint}.arrow", lambda target: _convert(parquet, target))
            return _source(path, _mapped(converted), fingerprint, max_samples)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is a damaged Parquet file: {_first_line(error)}; copy or download it again") from error


def read_arrow(path: str, file: Path, *, max_samples: int) -> Source:
    """The first `max_samples` rows of an Arrow file or stream. Raises DataError for a damaged one."""
    return _arrow(path, [file], max_samples)


def read_saved(path: str, folder: Path, *, max_samples: int) -> Source:
    """A dataset that `save_to_disk` has written into this folder. Raises DataError for one that is damaged."""
    try:
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: state.json is not one of a saved dataset ({type(error).__name__}: {error}); save it again") from error
    return _arrow(path, [folder / name for name in names], max_samples)


def saved_splits(folder: Path) -> dict[str, Path]:
    """The splits of a saved dataset, each with its folder; nothing where the folder is no saved dataset. Raises DataError."""
    if (folder / "dataset_dict.json").is_file():
        names = _noted(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names:
            raise _damaged(folder / "dataset_dict.json", f"its splits are {shown(names)}, no list of names")
        return {str(name): folder / str(name) for name in names}
    if (folder / "state.json").is_file():
        return {str(_noted(folder / "state.json").get("_split") or "train"): folder}
    return {}


def _noted(file: Path) -> dict[str, object]:
    """What `save_to_disk` has written beside the rows."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(file, f"it holds {shown(found)}, no object")
    return found


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(f"{file} is damaged ({reason}); copy the whole folder again, or save the dataset again")


def _arrow(path: str, files: Sequence[Path], max_samples: int) -> Source:
    import pyarrow as pa

    if missing := [file.name for file in files if not file.is_file()]:
        near = did_you_mean(missing[0], (child.name for child in files[0].parent.iterdir()))
        raise DataError(f"{path} lacks {len(missing)} of its {len(files)} data files: {missing[0]!r}{near}; copy the whole folder again")
    try:
        return _source(path, pa.concat_tables([_mapped(file) for file in files]), _fingerprint(files), max_samples)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is a damaged Arrow file: {_first_line(error)}; copy or save it again") from error


def _source(path: str, table: "pa.Table", fingerprint: str, max_samples: int) -> Source:
    if not table.num_rows:
        raise DataError(f"{path} has no rows (its columns: {', '.join(map(repr, table.column_names)) or 'none'})")
    used = table.slice(0, max_samples)
    # Arrow takes a file at its word: an offset that leads nowhere would end the process, and half a character fail far from here.
    used.validate(full=True)
    used.slice(0, 1).to_pylist()  # which names of columns may hinder
    return Source(name=path, fingerprint=fingerprint, rows=TableRows(used), seen=tuple(table.column_names))


def _mapped(file: Path) -> "pa.Table":
    """A table that stays on disk until it is looked at."""
    import pyarrow as pa

    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:  # the other of the two forms, which has no footer
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _convert(parquet: "ParquetFile", target: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE):
            writer.write_batch(batch)


def _room(path: str, size: int) -> None:
    if (free := cache.free_bytes()) < 2 * size:
        raise DataError(
            f"{path} unpacks to about {size / 2**30:.1f} GiB, and {cache.directory()} has {free / 2**30:.1f} GiB free; "
            "free some, or set HONE_CACHE to another disk"
        )


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
