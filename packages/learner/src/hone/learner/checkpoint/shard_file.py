"""One rank's share of one role as a safetensors file: written from a snapshot without another copy, read a range at a time.

The body of the file is the snapshot itself. Writing needs an 8-byte length and a JSON header before it (the format's own
description: huggingface.co/docs/safetensors), which the library cannot do from memory laid out beforehand; reading is the library's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hone.learner.checkpoint.pieces import Columns, Piece
from hone.learner.checkpoint.rectangles import rectangles
from hone.learner.errors import CheckpointError

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
ABOUT = "hone"
"""The one key of our text in a file's header."""


def file_name(role: str, *, rank: int, world_size: int) -> str:
    """Name of a rank's file of a role."""
    return f"{role}-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The bytes before the tensors, and where each piece lies behind them: `places[i]` .. of `pieces[i]` [bytes]."""

    header: bytes
    pieces: tuple[Piece, ...]
    places: tuple[int, ...]
    size: int


def lay_out(pieces: Sequence[Piece], about: Mapping[str, Any]) -> Layout:
    """The file that will hold the pieces, widest number format first so that every tensor is aligned; `about` is kept beside them."""
    ordered = sorted(pieces, key=lambda piece: -piece.values.element_size())
    assert len({piece.key for piece in ordered}) == len(ordered), "two pieces of one tensor on one rank"
    entries: dict[str, Any] = {}
    ranges, places, end = {}, [], 0
    for piece in ordered:
        begin, end = end, end + piece.values.nbytes
        places.append(begin)
        entries[piece.key] = {"dtype": DTYPES[piece.values.dtype], "shape": [piece.values.numel()], "data_offsets": [begin, end]}
        ranges[piece.key] = [piece.start, list(piece.shape), *([] if piece.columns is None else [list(piece.columns)])]
    # Only text may stand there, by the format.
    entries["__metadata__"] = {ABOUT: json.dumps({**about, "ranges": ranges})}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout(header=len(text).to_bytes(8, "little") + text, pieces=tuple(ordered), places=tuple(places), size=end)


def read_about(path: Path) -> dict[str, Any]:
    """What was kept beside the tensors. Raises CheckpointError for a file of another kind."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return json.loads((tensors.metadata() or {})[ABOUT])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of a checkpoint ({type(error).__name__}: {error}); restore it from a copy") from error


class RoleReader:
    """See `Source`: a role's files of every rank that wrote it, put together by range; nothing but what is asked for is read."""

    def __init__(self, directory: Path, role: str) -> None:
        self.directory, self.role = directory, role
        self.abouts = {path: read_about(path) for path in sorted(directory.glob(f"{role}-*-of-*.safetensors"))}
        worlds = {about["world_size"] for about in self.abouts.values()}
        if len(worlds) != 1 or worlds != {len(self.abouts)}:
            raise CheckpointError(
                f"{directory} holds {len(self.abouts)} files of role {role!r}, of runs of {sorted(worlds) or 'no'} ranks; name the "
                "checkpoint of a run with the same roles, or start without one"
            )
        first = next(iter(self.abouts.values()))
        self.counters: dict[str, int] = first["counters"]
        self.layout: list[tuple[str, list[int]]] = [(name, shape) for name, shape in first["layout"]]
        self.identity: dict[str, Any] = first.get("identity", {})
        self._parts: dict[str, list[tuple[int, Path]]] = {}
        self._columns: dict[tuple[str, Path], Columns] = {}
        for path, about in self.abouts.items():
            for key, (start, _, *columns) in about["ranges"].items():
                self._parts.setdefault(key, []).append((start, path))
                if columns:
                    self._columns[key, path] = (columns[0][0], columns[0][1])
        self._sections: dict[str, set[str]] = {}
        for key in self._parts:
            section, _, name = key.partition("/")
            self._sections.setdefault(name, set()).add(section)
        self._open: dict[Path, Any] = {}

    def of_rank(self, rank: int) -> dict[str, Any] | None:
        """What a rank kept beside its tensors; None where the checkpoint's run had no such rank."""
        return next((about for about in self.abouts.values() if about["rank"] == rank), None)

    def sections(self, name: str) -> frozenset[str]:
        """What there is of a parameter."""
        return frozenset(self._sections.get(name, ()))

    def read(self, section: str, name: str, *, start: int, numel: int, columns: Columns | None = None) -> Shaped[Tensor, " numel"]:
        """Elements start .. start + numel; see `Source`."""
        if columns is not None or any((f"{section}/{name}", path) in self._columns for _, path in self._parts.get(f"{section}/{name}", ())):
            return self._read_columns(section, name, start=start, numel=numel, columns=columns)
        found, at = [], start
        for begin, path in sorted(self._parts.get(f"{section}/{name}", ()), key=lambda part: part[0]):
            part = self._file(path).get_slice(f"{section}/{name}")
            end = begin + part.get_shape()[0]
            if begin <= at < end and at < start + numel:
                stop = min(end, start + numel)
                found.append(part[at - begin : stop - begin])
                at = stop
        if at != start + numel:
            raise CheckpointError(
                f"{self.directory}: {self.role} has {section} of {name} up to element {at}, not {start + numel}; restore it from a copy"
            )
        return torch.cat(found) if len(found) != 1 else found[0]

    def _read_columns(self, section: str, name: str, *, start: int, numel: int, columns: Columns | None) -> Shaped[Tensor, " numel"]:
        """As `read`, where the elements or what there is of them are columns of a matrix: rectangle by rectangle."""
        key, width, result, filled = f"{section}/{name}", dict(self.layout)[name][-1], None, 0
        wanted = list(rectangles(start, numel, columns or (0, width)))
        for begin, path in self._parts.get(key, ()):
            part = self._file(path).get_slice(key)
            for stored in rectangles(begin, part.get_shape()[0], self._columns.get((key, path), (0, width))):
                for own in wanted:
                    if (common := stored.meets(own)) is None:
                        continue
                    rows, first = common.bottom - common.top, stored.offset + (common.top - stored.top) * stored.width
                    values = part[first : first + rows * stored.width].view(rows, stored.width)
                    result = values.new_empty(numel) if result is None else result
                    place = result[own.offset : own.offset + own.numel].view(-1, own.width)
                    place[common.top - own.top : common.bottom - own.top, common.left - own.left : common.right - own.left] = values[
                        :, common.left - stored.left : common.right - stored.left
                    ]
                    filled += common.numel
        if result is None or filled != numel:
            raise CheckpointError(
                f"{self.directory}: {self.role} has {filled} of {numel} elements of {key} asked for; restore it from a copy"
            )
        return result

    def whole(self, section: str, name: str) -> Tensor:
        """A tensor in full, in its own shape."""
        shape = dict(self.layout)[name]
        return self.read(section, name, start=0, numel=torch.Size(shape).numel()).view(shape)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path]
