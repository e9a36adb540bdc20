"""Validation: rows of a source into labelled rows, by the columns that OpenRLHF, TRL and verl use; all faults in one error."""

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from hone.datasets import alpaca, sampled
from hone.datasets.errors import BadRow, DataError, bad_rows_error, did_you_mean, shown
from hone.datasets.labelled import AnyRow, Exchange, ExchangeRow, JudgedRow, LabelledSet, PairRow, TextRow
from hone.datasets.lazy import Lazy
from hone.datasets.offline_config import DemonstrationData, JudgedData, LabelledData, MarginPairData, PairData
from hone.datasets.records import FINGERPRINT_DIGITS, Message, Row, Source
from hone.datasets.schemas import message_faults, missing_column, own_parts, surrogate_faults
from hone.datasets.turns import answered

AnyLabelled = TypeVar("AnyLabelled", bound=AnyRow)
Read = Callable[[Row, str], Iterator[BadRow | AnyLabelled]]
"""A row and its uid into what it is, or everything that is wrong with it."""

CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "input", "problem", "instruction", "query")
ANSWERS = ("completion", "response", "output", "answer", "solution", "chosen")
IMAGES = ("images", "image")
MARGIN = "margin"
LABELS = ("label", "labels", MARGIN)
WRITTEN = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
TEXTS = ("text", "content", "document")
FAULTY = "give the rows {}, or delete them"


def text_rows(source: Source, config: DemonstrationData) -> LabelledSet[TextRow]:
    """Documents, every token of which is trained on."""
    key = config.input_key or found_column(source, (*TEXTS, *PROMPTS), flag="--data.input-key", what="documents")

    def read(row: Row, uid: str) -> Iterator[BadRow | TextRow]:
        faults = list(text_faults(row, key, source, flag="--data.input-key", what="document"))
        yield from faults
        if not faults:
            yield TextRow(uid=uid, line=row.line, text=str(row.columns[key]))

    characters, quick = array("q"), plain(key)

    def sound(columns: Mapping[str, object]) -> bool:
        # Every row comes by here once, in order; a value that is no text is an error after that.
        characters.append(len(str(columns.get(key))))
        return quick(columns)

    return replace(validated(source, read, sound=sound), characters=characters)


def exchange_rows(source: Source, config: DemonstrationData) -> LabelledSet[ExchangeRow]:
    """Demonstrations: a column of the prompt and one of its answer, or one of a whole conversation; or ids as they were sampled."""
    if sampled.holds(source, sampled.ANSWERED):
        return validated(source, sampled.exchange_row)
    if config.input_key is None:
        source = alpaca.joined(source, (*CONVERSATIONS, *PROMPTS))
    prompt_key, answer_key = demonstration_columns(source, config)

    def read(row: Row, uid: str) -> Iterator[BadRow | ExchangeRow]:
        for found in exchange(row, prompt_key, answer_key, source, config):
            yield found if isinstance(found, BadRow) else ExchangeRow(uid=uid, line=row.line, exchange=found)

    return validated(source, read, sound=plain(prompt_key, answer_key) if answer_key else lambda columns: False)


def judged_rows(source: Source, config: JudgedData) -> LabelledSet[JudgedRow]:
    """Answers and whether each is good."""
    if config.input_key is None:
        source = alpaca.joined(source, (*CONVERSATIONS, *PROMPTS))
    prompt_key, answer_key = demonstration_columns(source, config)

    def read(row: Row, uid: str) -> Iterator[BadRow | JudgedRow]:
        label = verdict(row, config.label_key, source)
        if isinstance(label, BadRow):
            yield label
        for found in exchange(row, prompt_key, answer_key, source, config):
            if isinstance(found, BadRow):
                yield found
            elif not isinstance(label, BadRow):
                yield JudgedRow(uid=uid, line=row.line, exchange=found, desirable=label)

    texts = plain(prompt_key, answer_key) if answer_key else lambda columns: False
    return validated(source, read, sound=lambda columns: texts(columns) and isinstance(columns.get(config.label_key), bool))


def pair_rows(source: Source, config: PairData) -> LabelledSet[PairRow]:
    """A chosen and a rejected answer to each prompt; where no column has the prompt, it is what both begin with. Or ids."""
    if sampled.holds(source, sampled.COMPARED):
        return validated(source, sampled.pair_row)
    if config.prompt_key is None:
        source = alpaca.joined(source, PROMPTS)
    columns = source.columns
    prompt_key = config.prompt_key or next((name for name in PROMPTS if name in columns), None)
    margin_key = config.margin_key if isinstance(config, MarginPairData) else None
    if isinstance(config, MarginPairData) and margin_key is None and MARGIN in columns:
        margin_key = MARGIN

    def read(row: Row, uid: str) -> Iterator[BadRow | PairRow]:
        bad: list[BadRow] = []
        if prompt_key is not None:
            bad += side_faults(row, prompt_key, source, config, flag="--data.prompt-key", what="prompt")
        for key, flag in ((config.chosen_key, "--data.chosen-key"), (config.rejected_key, "--data.rejected-key")):
            bad += side_faults(row, key, source, config, flag=flag, what="answer")
        margin = 0.0
        if margin_key is not None:
            value = _number(row.columns.get(margin_key))
            if margin_key not in row.columns:
                bad.append(missing_column(margin_key, row.line, columns, row.columns, flag="--data.margin-key", usual=(MARGIN,)))
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                bad.append(
                    BadRow(what=f"margin {margin_key!r} is no number", remedy=FAULTY.format("one"), line=row.line, detail=shown(value))
                )
            else:
                margin = float(value)
        if not bad:
            sides = _sides(row, prompt_key, config)
            if isinstance(sides, BadRow):
                bad.append(sides)
            elif not sides[0].prompt:
                listed = ", ".join(map(repr, columns))
                near = next((found for name in PROMPTS if (found := did_you_mean(name, columns))), "")
                remedy = f"columns found: {listed}; name that of the prompt with --data.prompt-key{near}"
                bad.append(BadRow(what="the answers begin with no prompt that both share", remedy=remedy, line=row.line))
            else:
                yield PairRow(uid=uid, line=row.line, chosen=sides[0], rejected=sides[1], margin=margin)
        yield from bad

    texts = plain(prompt_key or config.chosen_key, config.chosen_key, config.rejected_key)
    quick = prompt_key is not None and margin_key is None
    return validated(
        source, read, sound=lambda columns: quick and texts(columns) and columns[config.chosen_key] != columns[config.rejected_key]
    )


def _sides(row: Row, prompt_key: str | None, config: PairData) -> tuple[Exchange, Exchange] | BadRow:
    chosen, rejected = side(row.columns[config.chosen_key]), side(row.columns[config.rejected_key])

    def refused(what: str) -> BadRow:
        return BadRow(what=what, remedy="delete the rows, or mend the answers", line=row.line)

    if chosen == rejected:
        return refused("chosen and rejected are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        return refused("chosen is text and rejected messages, or the other way round")
    if prompt_key is not None:
        good, other = (answered(side(row.columns[prompt_key]), answer, row.line) for answer in (chosen, rejected))
        if isinstance(good, BadRow):
            return good
        if isinstance(other, BadRow):
            return other
        return (good, other) if good.prompt == other.prompt else refused("chosen and rejected answer different prompts")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if isinstance(chosen, str):
        # Where both still say the same a word may be cut in two: back to the last white space.
        same = max((place + 1 for place in range(same) if chosen[place].isspace()), default=0)
    if same in (len(chosen), len(rejected)):
        return refused("one answer is the beginning of the other, and nothing says where the prompt ends")
    return Exchange(prompt=chosen[:same], answer=chosen[same:]), Exchange(prompt=rejected[:same], answer=rejected[same:])


def demonstration_columns(source: Source, config: DemonstrationData) -> tuple[str, str | None]:
    """(prompt, answer) columns, or (conversation, None), as named, else the usual ones."""
    columns = source.columns
    usual = (*CONVERSATIONS, *PROMPTS)
    prompt_key = config.input_key or found_column(source, usual, flag="--data.input-key", what="prompts or conversations")
    if config.output_key is not None:
        return prompt_key, config.output_key
    conversation = any(isinstance(row.columns.get(prompt_key), list) and _answered(row.columns[prompt_key]) for row in source.rows[:1])
    if prompt_key in CONVERSATIONS or conversation:
        return prompt_key, None
    own = [name for name in ANSWERS if name in columns and name != prompt_key]
    if not own:
        listed = ", ".join(repr(name) for name in columns) or "none"
        raise DataError(f"{source.name} has no column of answers; columns found: {listed}; name one with --data.output-key")
    return prompt_key, own[0]


def _answered(messages: object) -> bool:
    assert isinstance(messages, list)
    return (
        bool(messages) and isinstance(messages[-1], Mapping) and messages[-1].get("role", messages[-1].get("from")) in ("assistant", "gpt")
    )


def exchange(row: Row, prompt_key: str, answer_key: str | None, source: Source, config: LabelledData) -> Iterator[BadRow | Exchange]:
    """The exchange of a row, or everything wrong with it."""
    bad = side_faults(row, prompt_key, source, config, flag="--data.input-key", what="prompt" if answer_key else "conversation")
    if answer_key is not None:
        bad += side_faults(row, answer_key, source, config, flag="--data.output-key", what="answer")
    yield from bad
    if bad:
        return
    prompt = side(row.columns[prompt_key])
    if answer_key is not None:
        yield answered(prompt, side(row.columns[answer_key]), row.line)
    elif isinstance(prompt, str):
        yield BadRow(
            what=f"conversation {prompt_key!r} is not a list of messages",
            remedy="name the answer's column with --data.output-key",
            line=row.line,
            detail=shown(prompt),
        )
    elif not any(message["role"] == "assistant" for message in prompt):
        yield BadRow(what="the assistant says nothing", remedy="give the rows an answer, or delete them", line=row.line)
    else:
        yield Exchange(prompt=(), answer=prompt)


def side_faults(row: Row, key: str, source: Source, config: LabelledData, *, flag: str, what: str) -> list[BadRow]:
    """What is wrong with a column that holds a text or messages."""
    if key not in row.columns:
        return [missing_column(key, row.line, source.columns, row.columns, flag=flag, usual=(*PROMPTS, *ANSWERS, *CONVERSATIONS))]
    value = row.columns[key]
    if isinstance(value, list) and value:
        found = _named(value)
        bad = (
            []
            if config.apply_chat_template
            else [BadRow(what="chat messages without a chat template", remedy="turn on --data.apply-chat-template", line=row.line)]
        )
        bad += message_faults(found, row.line, may_end_with_assistant=True)
        return bad or [_no_images(row.line, f"message {place}") for place, one in enumerate(found) if _seen(one)]
    return list(text_faults(row, key, source, flag=flag, what=what))


def image_faults(source: Source) -> None:
    """Raises DataError for rows with a column of images, which no program over labelled rows learns from."""
    named = [name for name in IMAGES if name in source.columns]
    bad = [_no_images(row.line, f"column {name!r}") for row in source.rows if named for name in named if row.columns.get(name)]
    if bad:
        raise bad_rows_error(source.name, bad, rows=len(source.rows))


def _seen(message: Message) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(part["type"] != "text" for part in content)


def _no_images(line: int, where: str) -> BadRow:
    return BadRow(
        what="images, which sft, rm, prm, dpo, kto and kd do not learn from",
        remedy="take them out of the rows, or learn from them with rewards (launch grpo and its like)",
        line=line,
        detail=where,
    )


def text_faults(row: Row, key: str, source: Source, *, flag: str, what: str) -> Iterator[BadRow]:
    """What is wrong with a column that must hold a text."""
    if key not in row.columns:
        yield missing_column(key, row.line, source.columns, row.columns, flag=flag, usual=(*TEXTS, *PROMPTS))
        return
    value = row.columns[key]
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        yield BadRow(
            what=f"{what} {key!r} is empty",
            remedy=FAULTY.format(f"{'an' if what == 'answer' else 'a'} {what}"),
            line=row.line,
            detail=shown(value),
        )
    elif not isinstance(value, str):
        yield BadRow(
            what=f"{what} {key!r} is neither text nor messages",
            remedy="write a string or a list of messages",
            line=row.line,
            detail=shown(value),
        )
    else:
        yield from surrogate_faults(value, row.line)


def verdict(row: Row, key: str, source: Source) -> bool | BadRow:
    """Whether an answer is good, by its label."""
    if key not in row.columns:
        return missing_column(
            key, row.line, source.columns, row.columns, flag="--data.label-key", usual=("label", "desirable", "is_correct")
        )
    value = row.columns[key]
    if isinstance(value, str):  # as every value of a CSV file is
        value = WRITTEN.get(value.strip().lower(), value)
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    return BadRow(
        what=f"label {key!r} is neither true nor false", remedy="write true or false, or 1 or 0", line=row.line, detail=shown(value)
    )


def _number(value: object) -> object:
    """A number written as text, as every value of a CSV file is; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def side(value: object) -> str | tuple[Message, ...]:
    """A validated text or its messages."""
    return value if isinstance(value, str) else tuple(_named(value))  # pyright: ignore[reportArgumentType] - it was validated


def _named(messages: Sequence[object]) -> list[Message]:
    """Messages under the usual keys; ShareGPT's `from` and `value` are taken, too."""
    roles = {"human": "user", "gpt": "assistant"}
    own = [own_parts(one) if isinstance(one, Mapping) else one for one in messages]
    return [
        {"role": roles.get(str(one["from"]), str(one["from"])), "content": one["value"]}
        if isinstance(one, Mapping) and {"from", "value"} <= one.keys()
        else one
        for one in own
    ]  # pyright: ignore[reportReturnType] - what is no message is refused by `message_faults`


class Validated(Lazy[AnyLabelled]):
    """Rows that were found sound, each read again when it is asked for."""

    def __init__(self, source: Source, read: Read[AnyLabelled]) -> None:
        self._source, self._read = source, read

    def __len__(self) -> int:
        return len(self._source.rows)

    def _at(self, index: int) -> AnyLabelled:
        return self._labelled(index, self._source.rows[index])

    def __iter__(self) -> Iterator[AnyLabelled]:
        """Every row in order."""
        return (self._labelled(index, row) for index, row in enumerate(self._source.rows))

    def _labelled(self, index: int, row: Row) -> AnyLabelled:
        (found,) = self._read(row, f"{self._source.fingerprint[:FINGERPRINT_DIGITS]}:{self._source.first + index}")
        if isinstance(found, BadRow):
            raise DataError(
                f"{self._source.name}:{row.line} has changed while it was in use ({found.what}); leave the file alone during a run"
            )
        return found


def validated(
    source: Source, read: Read[AnyLabelled], *, sound: Callable[[Mapping[str, object]], bool] = lambda columns: False
) -> LabelledSet[AnyLabelled]:
    """The labelled rows of a source; DataError for the lines that cannot be read and every faulty row together.

    `sound` knows at a glance that nothing is wrong with a row, as with most; the others are looked at closely.
    """
    bad = list(source.bad)
    for row in source.rows:
        if not sound(row.columns):
            bad += [found for found in read(row, "") if isinstance(found, BadRow)]
    if bad:
        raise bad_rows_error(source.name, bad, rows=len(source.rows) + len(source.bad))
    return LabelledSet(name=source.name, fingerprint=source.fingerprint, rows=Validated(source, read), columns=source.columns)


def plain(*keys: str) -> Callable[[Mapping[str, object]], bool]:
    """Whether all of these columns are texts without anything that would have to be looked at."""

    def sound(columns: Mapping[str, object]) -> bool:
        for key in keys:
            value = columns.get(key)
            if type(value) is not str or not value.isascii() or not value or value.isspace():
                return False
        return True

    return sound


def found_column(source: Source, usual: Sequence[str], *, flag: str, what: str) -> str:
    """The first of the usual columns that the data has. Raises DataError naming those it has."""
    columns = source.columns
    found = next((name for name in usual if name in columns), None)
    if found is None and source.rows:
        others = [name for name in columns if name not in (*ANSWERS, *LABELS)]
        near = next((did_you_mean(name, others) for name in usual if did_you_mean(name, others)), "")
        listed = ", ".join(repr(name) for name in columns) or "none"
        raise DataError(
            f"{source.name} has no column that usually holds {what} ({', '.join(usual[:4])}, ...); columns found: {listed}; "
            f"name one with {flag}{near}"
        )
    return found or usual[0]
