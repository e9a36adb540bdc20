"""Labelled rows into samples of token ids: tokenised once, cut to length, and what cannot be used is an error or is counted.

A row that is not used is dropped with its reason; where more than 1 % are, a setting is wrong, and that is an error.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hone.datasets.errors import BadRow, DataError, bad_rows_error, shown
from hone.datasets.exchanges import Encoder, cut, filled
from hone.datasets.labelled import (
    AnyRow,
    Exchange,
    ExchangeRow,
    JudgedRow,
    LabelledSet,
    PairRow,
    Sample,
    Sampled,
    Samples,
    StepsRow,
    TextRow,
    TokenRow,
)
from hone.datasets.offline_config import LabelledData
from hone.datasets.records import Dropped
from hone.datasets.step_rows import encoded_steps
from hone.datasets.tokenise import DROPPED_SHARE

if TYPE_CHECKING:
    import transformers


def samples_of(rows: LabelledSet[Any], tokenizer: "transformers.PreTrainedTokenizerBase", config: LabelledData) -> Samples:
    """Every row with its ids. Raises DataError for rows a template fails on, and where more than 1 % cannot be used."""
    encoder = Encoder(tokenizer, config)
    if rows.rows and isinstance(rows.rows[0], TextRow):
        documents = ((row.uid, row.line, encoder.document(row.text)) for row in rows.rows)
        samples = tuple(Sample(uid=uid, line=line, rows=found) for uid, line, found in filled(documents, config.max_len))
        return Samples(name=rows.name, samples=samples)
    counts = _Counts()
    found: list[Sample] = []
    bad: list[BadRow] = []
    dropped: list[Dropped] = []
    for row in rows.rows:
        one = _sample(row, encoder, tokenizer, config, counts)
        if isinstance(one, Sample):
            found.append(one)
        elif isinstance(one, BadRow):
            bad.append(one)
        else:
            dropped.append(one)
    if len(dropped) > DROPPED_SHARE * len(rows.rows):
        remedy = "raise --data.max-len, or shorten the prompts (up to 1 % of the rows are dropped and counted)"
        bad += [BadRow(what="no room for an answer", remedy=remedy, line=one.line, detail=one.reason) for one in dropped]
    if bad:
        raise bad_rows_error(rows.name, bad, rows=len(rows.rows))
    if not found:
        raise DataError(f"{rows.name} has no row that can be learnt from")
    return Samples(name=rows.name, samples=tuple(found), dropped=tuple(dropped), notes=counts.notes(config))


class _Counts:
    """What happened to rows that are used all the same."""

    def __init__(self) -> None:
        self.cut = self.apart = 0

    def notes(self, config: LabelledData) -> tuple[str, ...]:
        """What the user should know of them."""
        told = {
            f"{self.cut} answers are cut at --data.max-len {config.max_len} and are taught without their end": self.cut,
            f"{self.apart} answers are tokenised apart from their prompts, for the tokenizer joins the two: end the prompts with white "
            "space no more, or begin the answers with it": self.apart,
        }
        return tuple(text for text, count in told.items() if count)


def _sample(
    row: AnyRow, encoder: Encoder, tokenizer: "transformers.PreTrainedTokenizerBase", config: LabelledData, counts: _Counts
) -> Sample | BadRow | Dropped:
    if isinstance(row, ExchangeRow):
        found = _rows([row.exchange], encoder, row, config, counts)
        return found if not isinstance(found, tuple) else Sample(uid=row.uid, line=row.line, rows=found)
    if isinstance(row, JudgedRow):
        found = _rows([row.exchange], encoder, row, config, counts, each=1)
        return found if not isinstance(found, tuple) else Sample(uid=row.uid, line=row.line, rows=found, desirable=row.desirable)
    if isinstance(row, PairRow):
        found = _rows([row.chosen, row.rejected], encoder, row, config, counts, each=1)
        return found if not isinstance(found, tuple) else Sample(uid=row.uid, line=row.line, rows=found, margin=row.margin)
    assert isinstance(row, StepsRow), f"a {type(row).__name__} has no answer"
    whole, ends = encoded_steps(row, tokenizer)
    kept = cut(whole, config.max_len)
    if kept is None:
        return _no_room(row, len(whole.tokens), config)
    counts.cut += len(kept.tokens) < len(whole.tokens)
    return Sample(uid=row.uid, line=row.line, rows=(kept,), shares=row.shares[: sum(end < len(kept.tokens) for end in ends)])


def _rows(
    exchanges: Sequence[Exchange | Sampled],
    encoder: Encoder,
    row: AnyRow,
    config: LabelledData,
    counts: _Counts,
    *,
    each: int | None = None,
) -> tuple[TokenRow, ...] | BadRow | Dropped:
    """The rows of one or two exchanges, cut to length; with `each`, so many of every one."""
    result: list[TokenRow] = []
    for exchange in exchanges:
        encoded = encoder.encode(exchange, line=row.line)
        if isinstance(encoded, BadRow):
            return encoded
        if each is not None and len(encoded.rows) != each:
            remedy = "let the answer be one message, or use a template that leaves earlier turns alone"
            detail = f"answer {shown(exchange.answer)}"
            return BadRow(
                what="the chat template rewrites an answer of several turns, so it is no single row",
                remedy=remedy,
                line=row.line,
                detail=detail,
            )
        kept = [cut(one, config.max_len) for one in encoded.rows]
        fitting = [one for one in kept if one is not None]
        if not fitting or (each is not None and len(fitting) < each):
            return _no_room(row, max(len(one.tokens) for one in encoded.rows), config)
        counts.cut += sum(len(after.tokens) < len(before.tokens) for before, after in zip(encoded.rows, kept, strict=True) if after)
        counts.apart += encoded.apart
        result += fitting
    return tuple(result)


def _no_room(row: AnyRow, length: int, config: LabelledData) -> Dropped:
    reason = f"the prompt leaves no room for an answer: {length} tokens > --data.max-len {config.max_len}"
    return Dropped(uid=row.uid, line=row.line, reason=reason)


def mismatched(samples: Sequence[Sample], prompts: Sequence[tuple[int, ...]], max_len: int) -> tuple[TokenRow, ...]:
    """For each sample its prompt with the answer of another: the next whose prompt differs, so that no batch is too small for it.

    `prompts[i]` are the tokens before sample i's answer. Raises DataError where all prompts are the same.
    """
    if len(set(prompts)) < 2:
        raise DataError("all prompts are the same, so no prompt can be joined with another one's answer, which KTO's anchor needs")
    rows: list[TokenRow] = []
    for index, prompt in enumerate(prompts):
        other = next(place % len(samples) for place in range(index + 1, index + len(samples)) if prompts[place % len(samples)] != prompt)
        answer = samples[other].rows[0].tokens[len(prompts[other]) :]
        tokens = (array("i", prompt) + answer)[:max_len]
        rows.append(TokenRow(tokens=tokens, trained=bytes(len(prompt)) + b"\1" * (len(tokens) - len(prompt))))
    return tuple(rows)


def prompt_of(row: TokenRow) -> tuple[int, ...]:
    """The tokens before the first that is trained on."""
    return tuple(row.tokens[: row.trained.index(b"\1")])
