"""Labelled rows into samples of token ids: tokenised once, and what cannot be used is an error or is counted.

Up to `UPFRONT_ROWS` rows are tokenised before the first is drawn, and kept in the cache; of more, only a sample of them is, and the rest
as they are drawn. A row that is not used is dropped with its reason; where more than 1 % are, a setting is wrong, and that is an error.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hone.datasets.chat import template_text
from hone.datasets.encoded_rows import RowEncoder
from hone.datasets.errors import BadRow, DataError, bad_rows_error
from hone.datasets.labelled import LabelledSet, Sample, Samples, TextRow
from hone.datasets.lazy import Lazy
from hone.datasets.offline_config import LabelledData
from hone.datasets.records import Dropped
from hone.datasets.sample_table import TabledSamples, dropped_of, table_of
from hone.datasets.token_table import CACHED_ROWS
from hone.datasets.tokenise import DROPPED_SHARE, SAMPLED_ROWS, UPFRONT_ROWS

if TYPE_CHECKING:
    import pyarrow as pa
    import transformers


def samples_of(
    rows: LabelledSet[Any],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: LabelledData,
    *,
    tokenizer_hash: str | None = None,
    upfront: bool = False,
) -> Samples:
    """Every row with its ids; with `tokenizer_hash` (of this tokenizer) from the cache, or put there.

    With `upfront`, and where documents fill samples together, all rows are tokenised now, however many there are. Raises DataError for
    rows a template fails on, and where more than 1 % cannot be used; where rows are tokenised as they are drawn, of a sample of them.
    """
    encoder, count = RowEncoder(tokenizer, config), len(rows.rows)
    documents = count > 0 and isinstance(rows.rows[0], TextRow)
    # Where the rows lie is no part of what is made of them.
    settings = dataclasses.replace(config, dataset=None, dataset_split="", dataset_probs=None, max_samples=1)
    made_from = [rows.fingerprint, count, rows.sizes, repr(settings), template_text(tokenizer, config=config), tokenizer_hash]
    made_from += [rows.rows[0].uid, rows.rows[-1].uid] if count else []
    if count > UPFRONT_ROWS and not documents and not upfront:
        looked_at = [rows.rows[place] for place in range(0, count, count // SAMPLED_ROWS)]
        table = table_of(lambda: encoder.parts(rows.name, looked_at), key=None)
        _refuse(rows.name, table)
        notes = tuple(f"of a sample of {len(looked_at)} rows, {note}" for note in _notes(table, config))
        drawn = DrawnSamples(rows, encoder, identity=repr(made_from))
        return Samples(name=rows.name, samples=drawn, notes=notes, sizes=rows.sizes, weights=rows.weights)
    parts = encoder.documents if documents else encoder.parts
    cached = tokenizer_hash is not None and count >= CACHED_ROWS
    table = table_of(lambda: parts(rows.name, rows.rows, rows.sizes), key=made_from if cached else None)
    _refuse(rows.name, table)
    samples = TabledSamples(table, data=rows.fingerprint)
    if not len(samples):
        raise DataError(f"{rows.name} has no row that can be learnt from")
    sizes = samples.sizes if rows.weights else ()
    return Samples(
        name=rows.name, samples=samples, dropped=dropped_of(table), notes=_notes(table, config), sizes=sizes, weights=rows.weights
    )


class DrawnSamples(Lazy[Sample]):
    """Samples that are tokenised when they are drawn."""

    def __init__(self, rows: LabelledSet[Any], encoder: RowEncoder, *, identity: str) -> None:
        self._rows, self._encoder = rows, encoder
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._ready: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __iter__(self) -> Iterator[Sample]:
        """Every sample that can be used, in order."""
        for part in self._encoder.parts(self._rows.name, self._rows.rows):
            yield from (one.made for one in part if isinstance(one.made, Sample))

    def unusable(self, places: Sequence[int]) -> dict[int, Dropped]:
        """Which of these rows cannot be used; the others are tokenised now. DataError for one that a template fails on."""
        rows = [self._rows.rows[place] for place in places]
        made = [one.made for part in self._encoder.parts(self._rows.name, rows) for one in part]
        found = dict(zip(places, made, strict=True))
        self._ready = {place: one for place, one in found.items() if isinstance(one, Sample)}
        return {place: one for place, one in found.items() if isinstance(one, Dropped)}

    def _at(self, index: int) -> Sample:
        if index not in self._ready and (dropped := self.unusable([index])):
            raise DataError(f"{self._rows.name}:{dropped[index].line} cannot be learnt from: {dropped[index].reason}")
        return self._ready[index]


def _refuse(name: str, table: "pa.Table") -> None:
    """DataError where more than 1 % of the rows cannot be used."""
    dropped = dropped_of(table)
    if len(dropped) > DROPPED_SHARE * table.num_rows:
        remedy = "raise --data.max-len, or shorten the prompts (up to 1 % of the rows are dropped and counted)"
        bad = [BadRow(what="no room for an answer", remedy=remedy, line=one.line, detail=one.reason) for one in dropped]
        raise bad_rows_error(name, bad, rows=table.num_rows)


def _notes(table: "pa.Table", config: LabelledData) -> tuple[str, ...]:
    """What the user should know of the rows that are used all the same."""
    cut, apart = (int(table[name].to_numpy().sum()) for name in ("cut", "apart"))
    told = {
        f"{cut} answers are cut at --data.max-len {config.max_len} and are taught without their end": cut,
        f"{apart} answers are tokenised apart from their prompts, for the tokenizer joins the two: end the prompts with white "
        "space no more, or begin the answers with it": apart,
    }
    return tuple(text for text, count in told.items() if count)
