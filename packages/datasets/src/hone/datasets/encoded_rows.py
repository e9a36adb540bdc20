"""Labelled rows into token ids, some thousand at a time: what each becomes, cut to length, or why it cannot be used."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, TypeVar

from hone.datasets.errors import BadRow, bad_rows_error, shown
from hone.datasets.exchanges import Encoder, Piece, cut, filled
from hone.datasets.labelled import AnyRow, Exchange, ExchangeRow, JudgedRow, PairRow, Sample, Sampled, StepsRow, TextRow, TokenRow
from hone.datasets.lazy import Span
from hone.datasets.offline_config import LabelledData
from hone.datasets.records import Dropped
from hone.datasets.sample_table import Made
from hone.datasets.step_rows import encoded_steps
from hone.datasets.together import Work, together

if TYPE_CHECKING:
    import transformers

Item = TypeVar("Item")

ROWS_AT_ONCE = 1024


class RowEncoder:
    """Turns rows into samples with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", config: LabelledData) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._encoder = Encoder(tokenizer, config)

    def parts(self, name: str, rows: Sequence[AnyRow], sizes: Sequence[int] = ()) -> Iterator[list[Made]]:
        """All rows, some at a time; DataError at the end for those that a template fails on. `sizes` are those of several datasets."""
        bad: list[BadRow] = []
        for number, own in enumerate(_datasets(rows, sizes)):
            for part in _parted(own):
                made = together((self._made(row, number) for row in part), self._tokenizer)
                bad += [one for one in made if isinstance(one, BadRow)]
                if not bad:
                    yield [one for one in made if isinstance(one, Made)]
        if bad:
            raise bad_rows_error(name, bad, rows=len(rows))

    def documents(self, name: str, rows: Sequence[TextRow], sizes: Sequence[int] = ()) -> Iterator[list[Made]]:
        """Documents that fill samples together, those of each dataset among themselves."""
        for number, own in enumerate(_datasets(rows, sizes)):
            samples = (
                Made(made=Sample(uid=uid, line=line, rows=found), dataset=number)
                for uid, line, found in filled(self._texts(own), self._config.max_len)
            )
            yield from _parted(samples)

    def piece_ids(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The tokens of each document, or piece of one."""
        return together((self._encoder.document(piece) for piece in pieces), self._tokenizer)

    def _texts(self, rows: Sequence[TextRow]) -> Iterator[tuple[str, int, list[int]]]:
        for part in _parted(rows):
            yield from ((row.uid, row.line, own) for row, own in zip(part, self.piece_ids([Piece(row.text) for row in part]), strict=True))

    def _made(self, row: AnyRow, dataset: int) -> Work[Made | BadRow]:
        if isinstance(row, StepsRow):
            return (yield from self._steps(row, dataset))
        assert not isinstance(row, TextRow), "a document has no answer"
        exchanges = [row.chosen, row.rejected] if isinstance(row, PairRow) else [row.exchange]
        return (yield from self._answers(row, exchanges, dataset))

    def _steps(self, row: StepsRow, dataset: int) -> Work[Made | BadRow]:
        whole, ends = yield from encoded_steps(row, self._tokenizer)
        kept = cut(whole, self._config.max_len)
        if kept is None:
            return Made(made=self._no_room(row, len(whole.tokens)), dataset=dataset)
        shares = row.shares[: sum(end < len(kept.tokens) for end in ends)]
        sample = Sample(uid=row.uid, line=row.line, rows=(kept,), shares=shares)
        return Made(made=sample, dataset=dataset, cut=int(len(kept.tokens) < len(whole.tokens)))

    def _answers(
        self, row: ExchangeRow | JudgedRow | PairRow, exchanges: Sequence[Exchange | Sampled], dataset: int
    ) -> Work[Made | BadRow]:
        """The rows of one or two exchanges, cut to length; of a judged answer or a pair, one row for each."""
        result: list[TokenRow] = []
        cuts = apart = 0
        for exchange in exchanges:
            encoded = yield from self._encoder.work(exchange, line=row.line)
            if isinstance(encoded, BadRow):
                return encoded
            each = not isinstance(row, ExchangeRow)
            if each and len(encoded.rows) != 1:
                return BadRow(
                    what="the chat template rewrites an answer of several turns, so it is no single row",
                    remedy="let the answer be one message, or use a template that leaves earlier turns alone",
                    line=row.line,
                    detail=f"answer {shown(exchange.answer)}",
                )
            kept = [cut(one, self._config.max_len) for one in encoded.rows]
            fitting = [one for one in kept if one is not None]
            if not fitting:
                return Made(made=self._no_room(row, max(len(one.tokens) for one in encoded.rows)), dataset=dataset)
            cuts += sum(len(after.tokens) < len(before.tokens) for before, after in zip(encoded.rows, kept, strict=True) if after)
            apart += encoded.apart
            result += fitting
        own: dict[str, Any] = (
            {"margin": row.margin} if isinstance(row, PairRow) else {"desirable": row.desirable} if isinstance(row, JudgedRow) else {}
        )
        return Made(made=Sample(uid=row.uid, line=row.line, rows=tuple(result), **own), dataset=dataset, cut=cuts, apart=apart)

    def _no_room(self, row: AnyRow, length: int) -> Dropped:
        reason = f"the prompt leaves no room for an answer: {length} tokens > --data.max-len {self._config.max_len}"
        return Dropped(uid=row.uid, line=row.line, reason=reason)


def _datasets(rows: Sequence[Item], sizes: Sequence[int]) -> Iterator[Sequence[Item]]:
    """The rows of each of several datasets that lie end to end."""
    ends = list(accumulate(sizes or [len(rows)]))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield rows if (start, end) == (0, len(rows)) else Span(rows, start, end)


def _parted(items: Iterable[Item]) -> Iterator[list[Item]]:
    remaining = iter(items)
    while part := list(islice(remaining, ROWS_AT_ONCE)):
        yield part
