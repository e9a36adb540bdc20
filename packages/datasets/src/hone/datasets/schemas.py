"""Validation: rows of a source into prompts, all faults of all rows in one error, before any model is touched."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hone.datasets.config import DataConfig
from hone.datasets.errors import BadRow, bad_rows_error, did_you_mean, shown
from hone.datasets.images import BadImageError, Picture, picture
from hone.datasets.places import column_of, count_faults, part_faults, placed
from hone.datasets.records import FINGERPRINT_DIGITS, Message, PromptRow, PromptSet, Source
from hone.datasets.sources import read_json_lines

ROLES = ("system", "user", "assistant", "tool")
# Names prompts go by in published data sets: offered when a file has one of them and not the column asked for.
USUAL_INPUTS = ("prompt", "question", "input", "problem", "instruction", "query", "messages")
USUAL_LABELS = ("label", "answer", "solution", "ground_truth", "target", "output")


def load_prompts(config: DataConfig) -> PromptSet:
    """The validated prompts of `config.prompt_dataset`."""
    assert config.prompt_dataset is not None, "the caller takes the built-in task when no file is given"
    source = read_json_lines(config.prompt_dataset, max_samples=config.max_samples)
    keys = {"input_key": config.input_key, "label_key": config.label_key, "image_key": config.image_key}
    return prompt_rows(source, **keys, chat=config.apply_chat_template, folder=Path(config.prompt_dataset).expanduser().parent)


def prompt_rows(
    source: Source, *, input_key: str, label_key: str | None, chat: bool, image_key: str | None = None, folder: Path | None = None
) -> PromptSet:
    """Rows into prompts; `chat` says that a chat template will render them, which messages and images need.

    Paths of images begin at `folder`; without `image_key` no column is looked at for images.

    Raises DataError that lists the unreadable lines and every faulty row together.
    """
    columns = list(dict.fromkeys(name for row in source.rows for name in row.columns))
    bad = list(source.bad)
    prompts: list[PromptRow] = []
    for index, row in enumerate(source.rows):
        faults = list(_input_faults(row.columns, row.line, input_key, columns, chat=chat))
        if label_key is not None:
            faults += _label_faults(row.columns, row.line, label_key, columns)
        if not faults:
            column = column_of(row.columns.get(image_key)) if image_key is not None else []
            value = row.columns[input_key]
            prompt, values, places = placed(value if isinstance(value, str) else _messages(value), column)
            faults += count_faults(places, column, key=image_key, line=row.line)
            images = () if faults else tuple(_pictures(values, row.line, folder or Path(), faults, chat=chat))
            prompts.append(
                PromptRow(
                    uid=f"{source.fingerprint[:FINGERPRINT_DIGITS]}:{index}",
                    prompt=prompt,
                    label=None if label_key is None else row.columns[label_key],
                    line=row.line,
                    images=images,
                )
            )
        bad += faults
    if bad:
        raise bad_rows_error(source.name, bad, rows=len(source.rows) + len(source.bad))
    return PromptSet(name=source.name, fingerprint=source.fingerprint, rows=tuple(prompts))


def _messages(value: object) -> tuple[Message, ...]:
    assert isinstance(value, Sequence)
    return tuple(value)


def _pictures(values: Sequence[object], line: int, folder: Path, faults: list[BadRow], *, chat: bool) -> Iterator[Picture]:
    """The row's images; what is wrong with one goes to `faults`."""
    if values and not chat:
        remedy = "turn on --data.apply-chat-template, which says how the model is shown an image"
        faults.append(BadRow(what="images without a chat template", remedy=remedy, line=line))
        return
    for value in values:
        try:
            yield picture(value, folder=folder)
        except BadImageError as error:
            faults.append(BadRow(what=error.what, remedy=error.remedy, line=line, detail=error.detail))


def missing_column(key: str, line: int, columns: Sequence[str], found: Mapping[str, object], *, flag: str, usual: Sequence[str]) -> BadRow:
    """A row without the column `key`: either no row has it (then the flag is wrong) or only some have not (then the row is)."""
    if key in columns:
        own = ", ".join(repr(name) for name in found) or "none"
        return BadRow(what=f"no column {key!r}", remedy="add it to the rows, or delete them", line=line, detail=f"columns found: {own}")
    nearest = did_you_mean(key, columns) or next((f"; did you mean {name!r}?" for name in usual if name in columns), "")
    listed = ", ".join(repr(name) for name in columns) or "none"
    return BadRow(what=f"no column {key!r}", remedy=f"columns found: {listed}; name one with {flag}{nearest}", line=line)


def _label_faults(row: Mapping[str, object], line: int, key: str, columns: Sequence[str]) -> Iterator[BadRow]:
    if key not in row:
        yield missing_column(key, line, columns, row, flag="--data.label-key", usual=USUAL_LABELS)
    elif row[key] is None:
        yield BadRow(
            what=f"label {key!r} is null",
            remedy="give the rows a label, delete them, or drop --data.label-key if the reward function needs none",
            line=line,
        )


def _input_faults(row: Mapping[str, object], line: int, key: str, columns: Sequence[str], *, chat: bool) -> Iterator[BadRow]:
    remedy = "give the rows a prompt, or delete them"
    if key not in row:
        yield missing_column(key, line, columns, row, flag="--data.input-key", usual=USUAL_INPUTS)
        return
    value = row[key]
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        yield BadRow(what=f"prompt {key!r} is empty", remedy=remedy, line=line, detail=shown(value))
    elif isinstance(value, str):
        yield from surrogate_faults(value, line)
    elif not isinstance(value, list):
        wanted = "write a string or a list of chat messages"
        yield BadRow(what=f"prompt {key!r} is neither text nor messages", remedy=wanted, line=line, detail=shown(value))
    else:
        if not chat:
            yield BadRow(what="chat messages without a chat template", remedy="turn on --data.apply-chat-template", line=line)
        yield from message_faults(value, line)


def surrogate_faults(text: str, line: int) -> Iterator[BadRow]:
    """Whether a text holds half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"character {error.start + 1} is {text[error.start]!r}"
        yield BadRow(what="text with half a surrogate pair", remedy="mend the escape in the rows, or delete them", line=line, detail=detail)


def message_faults(messages: Sequence[object], line: int, *, may_end_with_assistant: bool = False) -> Iterator[BadRow]:
    """What is wrong with a list of messages; that of a prompt does not end with the assistant."""
    shape = 'write {"role": "user", "content": "..."}'
    roles: list[object] = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            yield BadRow(what="a message is not an object", remedy=shape, line=line, detail=f"{where} is {shown(message)}")
            continue
        missing = [name for name in ("role", "content") if name not in message]
        if missing:
            found = ", ".join(repr(name) for name in message) or "none"
            detail = f"{where} has no {' and no '.join(missing)}; keys found: {found}"
            yield BadRow(what="a message without role or content", remedy=shape, line=line, detail=detail)
        role, content = message.get("role"), message.get("content")
        roles.append(role)
        if "role" in message and role not in ROLES:
            nearest = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            yield BadRow(
                what="unknown role", remedy=f"use one of {', '.join(ROLES)}", line=line, detail=f"{where} has role {shown(role)}{nearest}"
            )
        if isinstance(content, list) and content:
            yield from part_faults(content, where, line)
        elif "content" in message and not isinstance(content, str):
            yield BadRow(what="content is not text", remedy=shape, line=line, detail=f"{where} has content {shown(content)}")
        elif isinstance(content, str):
            if role == "user" and not content.strip():
                yield BadRow(what="an empty user message", remedy="give it text, or delete the rows", line=line, detail=where)
            yield from surrogate_faults(content, line)
    if roles.count("system") > 1:
        places = ", ".join(str(index) for index, role in enumerate(roles) if role == "system")
        yield BadRow(what="more than one system message", remedy="merge them into the first", line=line, detail=f"messages {places}")
    if roles and roles[-1] == "assistant" and not may_end_with_assistant:
        remedy = "delete the last message: the policy writes it (a reference answer belongs in the label)"
        yield BadRow(what="the messages end with the assistant", remedy=remedy, line=line, detail=f"message {len(messages) - 1}")
