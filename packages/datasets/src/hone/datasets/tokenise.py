"""Token ids: every prompt is rendered once and tokenised once, and what cannot be used is an error or is counted.

Flow: PromptSet -> render -> batched tokenizer -> a table of ids, kept in the cache -> PromptRecord, or Dropped with its reason.
Up to `UPFRONT_ROWS` rows are tokenised before the first is drawn; of more, only a sample is, and the rest as they are drawn.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from hone.datasets.chat import rendered, template_text
from hone.datasets.config import DataConfig
from hone.datasets.errors import BadRow, TokenizerError, bad_rows_error, shown
from hone.datasets.expand import Expander
from hone.datasets.lazy import Lazy
from hone.datasets.records import Dropped, PromptRecord, PromptRow, Prompts, PromptSet
from hone.datasets.together import ids_of
from hone.datasets.token_table import CACHED_ROWS, Encoded, TokenRecords, record, table_of
from hone.datasets.tokenizer import unknown_id

if TYPE_CHECKING:
    import pyarrow as pa
    import transformers

TEXTS_PER_CALL = 1024
# Up to this share of the rows, a row that cannot be used is dropped and counted; more of them mean a wrong setting.
DROPPED_SHARE = 0.01
UPFRONT_ROWS = 100_000
SAMPLED_ROWS = 2_000


def tokenise(
    prompts: PromptSet,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    config: DataConfig,
    max_new_tokens: int,
    tokenizer_hash: str | None = None,
    processor: "transformers.ProcessorMixin | None" = None,
) -> Prompts:
    """Every prompt with its ids, rows without room for `max_new_tokens` within `config.max_len` [tokens] left out.

    Rows with images need the model's `processor`. With `tokenizer_hash` (of this tokenizer) the ids of rows without are taken from
    the cache, or put there. Raises DataError when more than 1 % of the rows are too long or hold characters the tokenizer does
    not know, for any prompt that begins with two BOS, and for images that do not fit their prompt; TokenizerError when the
    tokenizer puts its EOS after a prompt.
    """
    encoder = Encoder(tokenizer, config, processor)
    judge = Judge(tokenizer, max_len=config.max_len, max_new_tokens=max_new_tokens)
    count = len(prompts.rows)
    if count > UPFRONT_ROWS:
        sample = [prompts.rows[place] for place in range(0, count, count // SAMPLED_ROWS)]
        judge.refuse(prompts.name, sample, table_of(lambda: encoder.parts(prompts.name, sample), key=None))
        identity = f"{prompts.fingerprint} {config} {tokenizer_hash} {template_text(tokenizer, config=config)} {max_new_tokens}"
        records = DrawnRecords(prompts, encoder, judge, identity=identity)
        return Prompts(name=prompts.name, records=records, sizes=prompts.sizes, weights=prompts.weights)
    key = None
    if tokenizer_hash is not None and count >= CACHED_ROWS and processor is None:
        rows = (prompts.fingerprint, prompts.rows[0].uid, prompts.rows[-1].uid, count, config.input_key)
        key = (*rows, config.apply_chat_template, template_text(tokenizer, config=config), tokenizer_hash)
    table = table_of(lambda: encoder.parts(prompts.name, prompts.rows), key=key)
    kept, dropped = judge.refuse(prompts.name, prompts.rows, table)
    return Prompts(
        name=prompts.name,
        records=TokenRecords(table, prompts.rows, kept, data=prompts.fingerprint, with_images=prompts.with_images),
        dropped=tuple(dropped),
        sizes=_sizes_of(kept, prompts.sizes),
        weights=prompts.weights,
    )


class Encoder:
    """Rows into texts and ids, many at a time."""

    def __init__(
        self,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        config: DataConfig,
        processor: "transformers.ProcessorMixin | None" = None,
    ) -> None:
        self._tokenizer, self._config, self._processor = tokenizer, config, processor
        self._expander = None if processor is None else Expander(processor, name=str(tokenizer.name_or_path))

    def parts(self, name: str, rows: Sequence[PromptRow]) -> Iterator[list[Encoded]]:
        """All rows, some at a time; DataError at the end for those that the template fails on."""
        bad: list[BadRow] = []
        remaining = iter(rows)
        while part := list(islice(remaining, TEXTS_PER_CALL)):
            found = list(rendered(part, self._tokenizer, config=self._config, processor=self._processor))
            bad += [one for one in found if isinstance(one, BadRow)]
            if not bad:
                encoded = [
                    one if self._expander is None else self._seen(one, row) for one, row in zip(self._encoded(found), part, strict=True)
                ]
                bad += [one for one in encoded if isinstance(one, BadRow)]
                yield [one for one in encoded if isinstance(one, Encoded)]
        if bad:
            raise bad_rows_error(name, bad, rows=len(rows))

    def _seen(self, one: Encoded, row: PromptRow) -> Encoded | BadRow:
        """A row's ids with as many placeholders of each image as the model has features of it."""
        assert self._expander is not None
        found = self._expander.expanded(one.tokens, row, one.text)
        return found if isinstance(found, BadRow) else replace(one, tokens=found[0], places=tuple(found[1]))

    def _encoded(self, found: "list[str | BadRow]") -> list[Encoded]:
        texts, tokenizer = [one for one in found if isinstance(one, str)], self._tokenizer
        # A chat template writes the special tokens itself: a second BOS would be one the model never saw.
        special = not self._config.apply_chat_template
        ids = ids_of(texts, tokenizer, special=special)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        unknown = unknown_id(tokenizer)
        encoded = [
            Encoded(
                text=text,
                tokens=tokens,
                unknown=0 if unknown is None else tokens.count(unknown),
                doubled=bos is not None and tokens[:2] == [bos, bos],
            )
            for text, tokens in zip(texts, ids, strict=True)
        ]
        if eos is not None and any(
            one.tokens and one.tokens[-1] == eos and not one.text.endswith(str(tokenizer.eos_token)) for one in encoded
        ):
            raise TokenizerError(
                f"the tokenizer of {tokenizer.name_or_path!r} puts its EOS {str(tokenizer.eos_token)!r} after a prompt, where the "
                "response should begin; set add_eos_token to false in tokenizer_config.json, or take the EOS out of the post-processor "
                "in tokenizer.json"
            )
        return encoded


class Judge:
    """Which rows can be drawn."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", *, max_len: int, max_new_tokens: int) -> None:
        self._tokenizer, self._max_len, self._max_new_tokens = tokenizer, max_len, max_new_tokens

    def dropped(self, row: PromptRow, length: int, unknown: int) -> Dropped | None:
        """Why a row cannot be drawn; None where it can."""
        if length > self._max_len - self._max_new_tokens:
            reason = f"{length} prompt tokens + {self._max_new_tokens} new tokens > --data.max-len {self._max_len}"
            return Dropped(uid=row.uid, line=row.line, reason=reason)
        if not length or unknown:
            return Dropped(uid=row.uid, line=row.line, reason="characters outside the tokenizer's vocabulary")
        return None

    def refuse(self, name: str, rows: Sequence[PromptRow], table: "pa.Table") -> "tuple[array[int], list[Dropped]]":
        """The places of the rows that can be drawn, and the others; DataError where they are too many, or begin with two BOS."""
        import numpy as np

        lengths, unknown, doubled = (table[column].to_numpy() for column in ("length", "unknown", "doubled"))
        long = ~doubled & (lengths > self._max_len - self._max_new_tokens)
        foreign = ~doubled & ~long & ((unknown > 0) | (lengths == 0))
        bad = [self._doubled(rows[place].line, table["text"][place].as_py()) for place in np.flatnonzero(doubled).tolist()]
        allowed = DROPPED_SHARE * len(rows)
        if long.sum() > allowed:
            bad += [self._over_long(rows[place].line, int(lengths[place])) for place in np.flatnonzero(long).tolist()]
        if foreign.sum() > allowed:
            bad += [self._unknown(rows[place].line, table, place) for place in np.flatnonzero(foreign).tolist()]
        if bad:
            raise bad_rows_error(name, bad, rows=len(rows))
        left_out = np.flatnonzero(long | foreign).tolist()
        found = [self.dropped(rows[place], int(lengths[place]), int(unknown[place])) for place in left_out]
        kept = np.flatnonzero(~(long | foreign)).astype(np.int64)
        return array("q", kept.tobytes()), [one for one in found if one is not None]

    def _doubled(self, line: int, text: str) -> BadRow:
        return BadRow(
            what=f"the prompt begins with two BOS {self._tokenizer.bos_token!r}",
            remedy="take it out of the rows, the input template or the chat template: it is put there twice",
            line=line,
            detail=f"rendered {shown(text)}",
        )

    def _over_long(self, line: int, length: int) -> BadRow:
        room = self._max_len - self._max_new_tokens
        return BadRow(
            what=f"longer than {room} tokens: --data.max-len {self._max_len} less --rollout.max-new-tokens {self._max_new_tokens}",
            remedy="raise --data.max-len, lower --rollout.max-new-tokens, or shorten the rows (up to 1 % of them are dropped and counted)",
            line=line,
            detail=f"{length} tokens",
        )

    def _unknown(self, line: int, table: "pa.Table", place: int) -> BadRow:
        unknown, length, text = (table[column][place].as_py() for column in ("unknown", "length", "text"))
        return BadRow(
            what=f"characters outside the vocabulary of {self._tokenizer.name_or_path!r}",
            remedy="use a model whose tokenizer knows them (--actor.model-name-or-path), or mend the rows",
            line=line,
            detail=f"{unknown} of {length} tokens unknown in {shown(text)}",
        )


class DrawnRecords(Lazy[PromptRecord | Dropped]):
    """Prompts that are tokenised when they are drawn."""

    def __init__(self, prompts: PromptSet, encoder: Encoder, judge: Judge, *, identity: str) -> None:
        self._prompts, self._encoder, self._judge = prompts, encoder, judge
        self.fingerprint = hashlib.blake2b(f"{len(prompts.rows)} {identity}".encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._prompts.rows)

    def take(self, rows: Sequence[int]) -> list[PromptRecord | Dropped]:
        """The prompts of these rows; DataError for one that the template fails on."""
        found = [self._prompts.rows[row] for row in rows]
        encoded = [one for part in self._encoder.parts(self._prompts.name, found) for one in part]
        return [
            self._judge.dropped(row, len(one.tokens), one.unknown) or record(row, one.text, one.tokens, one.places)
            for row, one in zip(found, encoded, strict=True)
        ]

    def _at(self, index: int) -> PromptRecord | Dropped:
        return self.take([index])[0]


def _sizes_of(kept: Iterable[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """How many of the places in `kept` fall to each of several datasets end to end."""
    counts, ends = [0] * len(sizes), []
    for size in sizes:
        ends.append(size + (ends[-1] if ends else 0))
    if sizes:
        number = 0
        for place in kept:
            while place >= ends[number]:
                number += 1
            counts[number] += 1
    return tuple(counts)
