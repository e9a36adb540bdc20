"""Labelled rows into samples of token ids: tokenised once, and what cannot be used is an error or is counted.

Up to `UPFRONT_ROWS` rows are tokenised before the first is drawn, and kept in the cache; of more, only a sample of them is, and the rest
as they are drawn. A row that is not used is dropped with its reason; where more than 1 % are, a setting is wrong, and that is an error.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from hone.datasets.chat import template_text
from hone.datasets.drawn_samples import DrawnDocuments, DrawnSamples
from hone.datasets.encoded_rows import RowEncoder
from hone.datasets.errors import BadRow, DataError, bad_rows_error
from hone.datasets.exchanges import Piece
from hone.datasets.labelled import LabelledSet, Samples, TextRow
from hone.datasets.offline_config import JudgedData, LabelledData
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

    With `upfront` all rows are tokenised now, however many there are. Raises DataError for rows a template fails on, and where more
    than 1 % cannot be used; where rows are tokenised as they are drawn, of a sample of them.
    """
    encoder, count = RowEncoder(tokenizer, config), len(rows.rows)
    documents = count > 0 and isinstance(rows.rows[0], TextRow)
    # Where the rows lie is no part of what is made of them.
    settings = dataclasses.replace(config, dataset=None, dataset_split="", dataset_probs=None, max_samples=1)
    made_from = [rows.fingerprint, count, rows.sizes, repr(settings), template_text(tokenizer, config=config), tokenizer_hash]
    made_from += [rows.rows[0].uid, rows.rows[-1].uid] if count else []
    if count > UPFRONT_ROWS and not upfront:
        looked_at = [rows.rows[place] for place in range(0, count, count // SAMPLED_ROWS)]
        if documents:
            rate = sum(map(len, encoder.piece_ids([Piece(row.text) for row in looked_at]))) / sum(len(row.text) for row in looked_at)
            laid = DrawnDocuments(rows, encoder, max_len=config.max_len, rate=rate, identity=repr(made_from))
            return Samples(name=rows.name, samples=laid, sizes=laid.sizes if rows.weights else (), weights=rows.weights)
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
    good = table["desirable"].filter(table["dropped"].is_null()).unique().to_pylist() if isinstance(config, JudgedData) else []
    told = {
        f"every answer is judged {'good' if True in good else 'bad'}, so there are none to tell apart; "
        "--data.label-key names another column": len(good) == 1,
        f"{cut} answers are cut at --data.max-len {config.max_len} and are taught without their end": cut,
        f"{apart} answers are tokenised apart from their prompts, for the tokenizer joins the two: end the prompts with white "
        "space no more, or begin the answers with it": apart,
    }
    return tuple(text for text, count in told.items() if count)
