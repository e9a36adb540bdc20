"""Token ids: every prompt is rendered once and tokenised once, and what cannot be used is an error or is counted.

Flow: PromptSet -> render -> batched tokenizer -> PromptRecord, or Dropped with its reason.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hone.datasets.chat import render
from hone.datasets.config import DataConfig
from hone.datasets.errors import BadRow, TokenizerError, bad_rows_error, shown
from hone.datasets.expand import Expander
from hone.datasets.records import Dropped, PromptRecord, Prompts, PromptSet

if TYPE_CHECKING:
    import transformers

TEXTS_PER_CALL = 1024
# Up to this share of the rows, a row that cannot be used is dropped and counted; more of them mean a wrong setting.
DROPPED_SHARE = 0.01


def tokenise(
    prompts: PromptSet,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    config: DataConfig,
    max_new_tokens: int,
    processor: "transformers.ProcessorMixin | None" = None,
) -> Prompts:
    """Every prompt with its ids, rows without room for `max_new_tokens` within `config.max_len` [tokens] left out.

    Rows with images need the model's `processor`. Raises DataError when more than 1 % of the rows are too long or hold characters
    the tokenizer does not know, for any prompt that begins with two BOS, and for images that do not fit their prompt;
    TokenizerError when the tokenizer puts its EOS after a prompt.
    """
    texts = render(prompts, tokenizer, config=config, processor=processor)
    # A chat template writes the special tokens itself: a second BOS would be one the model never saw.
    ids = _encode(texts, tokenizer, add_special_tokens=not config.apply_chat_template)
    _refuse_final_eos(texts, ids, tokenizer)
    room = config.max_len - max_new_tokens
    expander = None if processor is None else Expander(processor, name=str(tokenizer.name_or_path))
    doubled, over_long, unknown, unplaced = [], [], [], []
    records: list[PromptRecord] = []
    dropped: list[Dropped] = []
    for row, text, short in zip(prompts.rows, texts, ids, strict=True):
        seen = ([*short], []) if expander is None else expander.expanded(short, row, text)
        if isinstance(seen, BadRow):
            unplaced.append(seen)
            continue
        tokens, places = seen
        if tokenizer.bos_token_id is not None and tokens[:2] == [tokenizer.bos_token_id] * 2:
            doubled.append(_doubled(row.line, text, tokenizer))
        elif len(tokens) > room:
            over_long.append(_over_long(row.line, len(tokens), config.max_len, max_new_tokens))
            reason = f"{len(tokens)} prompt tokens + {max_new_tokens} new tokens > --data.max-len {config.max_len}"
            dropped.append(Dropped(uid=row.uid, line=row.line, reason=reason))
        elif not tokens or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens):
            unknown.append(_unknown(row.line, text, tokens, tokenizer))
            dropped.append(Dropped(uid=row.uid, line=row.line, reason="characters outside the tokenizer's vocabulary"))
        else:
            seen = {"images": row.images, "places": tuple(places), "given": row.prompt}
            records.append(PromptRecord(uid=row.uid, tokens=tuple(tokens), text=text, label=row.label, line=row.line, **seen))
    allowed = DROPPED_SHARE * len(texts)
    bad = [*unplaced, *doubled, *(over_long if len(over_long) > allowed else ()), *(unknown if len(unknown) > allowed else ())]
    if bad:
        raise bad_rows_error(prompts.name, bad, rows=len(texts))
    return Prompts(name=prompts.name, records=tuple(records), dropped=tuple(dropped))


def _encode(texts: Sequence[str], tokenizer: "transformers.PreTrainedTokenizerBase", *, add_special_tokens: bool) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = list(texts[start : start + TEXTS_PER_CALL])
        encoding = tokenizer(part, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
        ids += encoding["input_ids"]
    return ids


def _refuse_final_eos(texts: Sequence[str], ids: Sequence[list[int]], tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
    """A tokenizer saved with add_eos_token ends every prompt where the policy should begin."""
    eos, text_of_eos = tokenizer.eos_token_id, str(tokenizer.eos_token)
    if eos is None:
        return
    if any(row and row[-1] == eos and not text.endswith(text_of_eos) for text, row in zip(texts, ids, strict=True)):
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path!r} puts its EOS {text_of_eos!r} after a prompt, where the response should begin; "
            "set add_eos_token to false in tokenizer_config.json, or take the EOS out of the post-processor in tokenizer.json"
        )


def _doubled(line: int, text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> BadRow:
    return BadRow(
        what=f"the prompt begins with two BOS {tokenizer.bos_token!r}",
        remedy="take it out of the rows, the input template or the chat template: it is put there twice",
        line=line,
        detail=f"rendered {shown(text)}",
    )


def _over_long(line: int, length: int, max_len: int, max_new_tokens: int) -> BadRow:
    return BadRow(
        what=f"longer than {max_len - max_new_tokens} tokens: --data.max-len {max_len} less --rollout.max-new-tokens {max_new_tokens}",
        remedy="raise --data.max-len, lower --rollout.max-new-tokens, or shorten the rows (up to 1 % of them are dropped and counted)",
        line=line,
        detail=f"{length} tokens",
    )


def _unknown(line: int, text: str, tokens: Sequence[int], tokenizer: "transformers.PreTrainedTokenizerBase") -> BadRow:
    return BadRow(
        what=f"characters outside the vocabulary of {tokenizer.name_or_path!r}",
        remedy="use a model whose tokenizer knows them (--actor.model-name-or-path), or mend the rows",
        line=line,
        detail=f"{tokens.count(tokenizer.unk_token_id)} of {len(tokens)} tokens unknown in {shown(text)}",
    )
