"""Rows that hold the ids a policy sampled: learnt from as they were sampled, so no text is tokenised twice.

`prompt_ids` + `completion_ids`, or `prompt_ids` + `chosen_ids` + `rejected_ids`. The ids are those of the tokenizer that the model
comes with; texts beside them are for a reader. What `launch generate` and the loops over generations write.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence

from hone.datasets.errors import BadRow, shown
from hone.datasets.labelled import ExchangeRow, PairRow, Sampled
from hone.datasets.records import Row, Source

ANSWERED = ("prompt_ids", "completion_ids")
COMPARED = ("prompt_ids", "chosen_ids", "rejected_ids")
LARGEST_ID = 2**31 - 1


def holds(source: Source, columns: Sequence[str]) -> bool:
    """Whether a source is of such rows, told by its first."""
    return bool(source.rows) and all(name in source.rows[0].columns for name in columns)


def exchange_row(row: Row, uid: str) -> Iterator[BadRow | ExchangeRow]:
    """A demonstration of ids, or what is wrong with it."""
    bad = [*_faults(row, "prompt_ids"), *_faults(row, "completion_ids")]
    yield from bad
    if not bad:
        yield ExchangeRow(uid=uid, line=row.line, exchange=_exchange(row.columns, "completion_ids"))


def pair_row(row: Row, uid: str) -> Iterator[BadRow | PairRow]:
    """A pair of ids, or what is wrong with it."""
    bad = [fault for name in COMPARED for fault in _faults(row, name)]
    if not bad and row.columns["chosen_ids"] == row.columns["rejected_ids"]:
        bad.append(BadRow(what="chosen and rejected are the same", remedy="delete the rows, or mend the answers", line=row.line))
    yield from bad
    if not bad:
        chosen, rejected = (_exchange(row.columns, name) for name in COMPARED[1:])
        yield PairRow(uid=uid, line=row.line, chosen=chosen, rejected=rejected)


def _faults(row: Row, name: str) -> Iterator[BadRow]:
    value = row.columns.get(name)
    if not isinstance(value, list) or not value or any(type(one) is not int or not 0 <= one <= LARGEST_ID for one in value):
        remedy = "write the ids as a list of whole numbers, or take the columns of ids out to have texts tokenised"
        yield BadRow(what=f"{name} are no token ids", remedy=remedy, line=row.line, detail=shown(value))


def _exchange(columns: Mapping[str, object], answer: str) -> Sampled:
    ids = [columns["prompt_ids"], columns[answer]]
    prompt, said = (array("i", one) for one in ids if isinstance(one, list))
    return Sampled(prompt=prompt, answer=said)
