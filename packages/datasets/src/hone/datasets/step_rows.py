"""Solutions whose steps are judged: TRL's lists of steps, and OpenRLHF's texts with a placeholder where a step ends."""

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hone.datasets.errors import BadRow, TokenizerError, shown
from hone.datasets.labelled import LabelledSet, StepsRow, TokenRow
from hone.datasets.layouts import FAULTY, PROMPTS, found_column, text_faults, validated
from hone.datasets.offline_config import StepData
from hone.datasets.records import Row, Source
from hone.datasets.schemas import missing_column
from hone.datasets.together import Text, Work, ids_of

if TYPE_CHECKING:
    import transformers

STEPS, LABELS = ("completions", "steps"), ("labels", "label")


def steps_rows(source: Source, config: StepData) -> LabelledSet[StepsRow]:
    """Solutions and the labels of their steps. Raises DataError with every faulty row."""
    usual = PROMPTS if config.placeholder_token is None else ("input", "text", *PROMPTS)
    prompt_key = config.input_key or found_column(source, usual, flag="--data.input-key", what="prompts")
    label_key = config.label_key or found_column(source, LABELS, flag="--data.label-key", what="labels of steps")
    steps_key = None
    if config.placeholder_token is None:
        steps_key = config.steps_key or found_column(source, STEPS, flag="--data.steps-key", what="lists of steps")

    def read(row: Row, uid: str) -> Iterator[BadRow | StepsRow]:
        bad = list(text_faults(row, prompt_key, source, flag="--data.input-key", what="prompt"))
        prompt, steps = "", ()
        if not bad and steps_key is None:
            assert config.placeholder_token is not None
            *pieces, rest = str(row.columns[prompt_key]).split(config.placeholder_token)
            steps = tuple(f"{piece}{config.placeholder_token}" for piece in pieces)
            if not steps:
                bad.append(
                    BadRow(
                        what=f"no {config.placeholder_token!r} in the text",
                        remedy="name what ends a step with --data.placeholder-token",
                        line=row.line,
                        detail=shown(rest),
                    )
                )
        elif not bad and steps_key is not None:
            found = row.columns.get(steps_key)
            if steps_key not in row.columns:
                bad.append(missing_column(steps_key, row.line, source.columns, row.columns, flag="--data.steps-key", usual=STEPS))
            elif not isinstance(found, list) or not found or not all(isinstance(step, str) and step.strip() for step in found):
                bad.append(
                    BadRow(
                        what=f"steps {steps_key!r} are no list of texts", remedy=FAULTY.format("steps"), line=row.line, detail=shown(found)
                    )
                )
            else:
                prompt, steps = str(row.columns[prompt_key]), tuple(f"{step}{config.step_separator}" for step in found)
        shares = _shares(row, label_key, source, config)
        if isinstance(shares, BadRow):
            bad.append(shares)
        elif not bad and len(shares) != len(steps):
            bad.append(
                BadRow(
                    what="another number of labels than steps",
                    remedy="give each step one label",
                    line=row.line,
                    detail=f"{len(steps)} steps, {len(shares)} labels",
                )
            )
        yield from bad
        if not bad and not isinstance(shares, BadRow):
            yield StepsRow(uid=uid, line=row.line, prompt=prompt, steps=steps, shares=shares)

    return validated(source, read)


def _shares(row: Row, key: str, source: Source, config: StepData) -> tuple[float, ...] | BadRow:
    """The share of good in each step: a bool, a number in [0, 1], or one of the two reward tokens, the good one first."""
    if key not in row.columns:
        return missing_column(key, row.line, source.columns, row.columns, flag="--data.label-key", usual=LABELS)
    found = row.columns[key]
    tokens = dict(zip((config.reward_tokens or "").split(","), (1.0, 0.0), strict=False)) if config.reward_tokens else {}
    shares = [_share(label, tokens) for label in found] if isinstance(found, list) else [None]
    if None in shares:
        wanted = "true or false, the share of good in [0, 1], or one of --data.reward-tokens"
        return BadRow(
            what=f"labels {key!r} are no list of labels", remedy=f"write a list, each label {wanted}", line=row.line, detail=shown(found)
        )
    return tuple(share for share in shares if share is not None)


def _share(label: object, tokens: dict[str, float]) -> float | None:
    if isinstance(label, str):
        return tokens.get(label)
    return float(label) if isinstance(label, bool | int | float) and 0 <= label <= 1 else None


def encoded_steps(row: StepsRow, tokenizer: "transformers.PreTrainedTokenizerBase") -> Work[tuple[TokenRow, tuple[int, ...]]]:
    """The solution's tokens, marked where a step ends, and those places; every piece is tokenised on its own, as steps are sampled."""
    pieces = [row.prompt, *row.steps] if row.prompt else list(row.steps)
    found = yield [Text(piece, special=not number) for number, piece in enumerate(pieces)]
    ids: list[int] = []
    ends: list[int] = []
    for number, own in enumerate(found):
        ids += own if number else _without_end(own, tokenizer)
        ends.append(len(ids) - 1)
    ends = ends[1:] if row.prompt else ends
    trained = bytearray(len(ids))
    for end in ends:
        trained[end] = 1
    return TokenRow(tokens=array("i", ids), trained=bytes(trained)), tuple(ends)


def _without_end(ids: list[int], tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """What a tokenizer that is saved with add_eos_token puts behind a text is no part of it."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def reward_token_ids(config: StepData, tokenizer: "transformers.PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids of the two reward tokens, good before bad; none where a classifier judges.

    Raises TokenizerError for a reward token or placeholder that is not one token.
    """
    for name in (config.placeholder_token,):
        if name is not None:
            _one(name, tokenizer, "--data.placeholder-token")
    if config.reward_tokens is None:
        return ()
    names = config.reward_tokens.split(",")
    found = tuple(_one(name, tokenizer, "--data.reward-tokens") for name in names)
    if len(set(found)) != 2:
        raise TokenizerError(f"--data.reward-tokens {config.reward_tokens!r} are {len(set(found))} different tokens; name two: good,bad")
    return found


def _one(text: str, tokenizer: "transformers.PreTrainedTokenizerBase", flag: str) -> int:
    (ids,) = ids_of([text], tokenizer, special=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise TokenizerError(
            f"{flag} {text!r} is {len(ids)} tokens of {tokenizer.name_or_path!r}; name a text that is exactly one it knows"
        )
    return ids[0]
