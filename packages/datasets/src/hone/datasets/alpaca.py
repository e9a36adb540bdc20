"""Alpaca's layout: an `instruction`, and perhaps an `input` that it speaks of; the prompt is both, with a blank line between."""

from dataclasses import replace

from hone.datasets.lazy import Lazy
from hone.datasets.records import Row, Source

INSTRUCTION, INPUT = "instruction", "input"


def joined(source: Source, usual: tuple[str, ...]) -> Source:
    """The source with its instructions and inputs as one `input`, where that is the first of the `usual` columns it has."""
    columns = source.columns
    first = next((name for name in usual if name in columns), None)
    return replace(source, rows=_Prompts(source), seen=columns) if first == INPUT and INSTRUCTION in columns else source


class _Prompts(Lazy[Row]):
    """Rows whose `input` is the whole prompt; one with a value that is no text is left as it is, for the report."""

    def __init__(self, source: Source) -> None:
        self._rows = source.rows

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, index: int) -> Row:
        row = self._rows[index]
        texts = [row.columns.get(name) or "" for name in (INSTRUCTION, INPUT)]
        if not all(isinstance(text, str) for text in texts):
            return row
        return replace(row, columns={**row.columns, INPUT: "\n\n".join(str(text) for text in texts if str(text).strip())})
