"""Validation: rows of a source into prompts, all faults of all rows in one error, before any model is touched."""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hone.datasets.config import DataConfig
from hone.datasets.errors import BadRow, DataError, bad_rows_error, did_you_mean, shown
from hone.datasets.images import BadImageError, Picture, picture
from hone.datasets.lazy import Joined, Lazy
from hone.datasets.places import column_of, count_faults, part_faults, placed
from hone.datasets.prompt_layouts import MISSING, recognise, value_at
from hone.datasets.reading import dataset_names, open_datasets, probabilities
from hone.datasets.records import FINGERPRINT_DIGITS, Message, PromptRow, PromptSet, Row, Source

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names prompts go by in published data sets: offered when a file has one of them and not the column asked for.
USUAL_INPUTS = ("prompt", "question", "input", "problem", "instruction", "query", "messages")
USUAL_LABELS = ("label", "answer", "solution", "ground_truth", "target", "output")


def load_prompts(config: DataConfig) -> PromptSet:
    """The validated prompts of `config.prompt_dataset`: of one dataset, or of several end to end.

    Raises DataError. Asked again for the same settings and unchanged files, it gives the same answer without reading.
    """
    assert config.prompt_dataset is not None, "the caller takes the built-in task when no file is given"
    found = _load_prompts(config, stamps(config.prompt_dataset))
    if found.with_images:
        _load_prompts.cache_clear()  # whether their files have changed, only reading them tells
    return found


@functools.lru_cache(maxsize=1)
def _load_prompts(config: DataConfig, stamped: tuple[object, ...]) -> PromptSet:
    assert config.prompt_dataset is not None
    names = dataset_names(config.prompt_dataset)
    weights = probabilities(config.prompt_probs, len(names))
    datasets = open_datasets(config.prompt_dataset, split=config.prompt_split, max_samples=config.max_samples)
    sets: list[list[PromptSet]] = []
    errors: list[DataError] = []
    for dataset in datasets:
        sets.append([])
        for source in dataset.sources:
            try:
                keys = {"input_key": config.input_key, "label_key": config.label_key, "image_key": config.image_key}
                rows = prompt_rows(source, **keys, chat=config.apply_chat_template, folder=dataset.folder)
            except DataError as error:
                errors.append(error)
            else:
                sets[-1].append(rows)
    if errors:
        raise DataError("\n".join(map(str, errors)))
    whole = [one for inside in sets for one in inside]
    if len(whole) == 1:
        return whole[0]
    return PromptSet(
        name=", ".join(dataset.name for dataset in datasets),
        fingerprint=hashlib.blake2b(" ".join(one.fingerprint for one in whole).encode(), digest_size=16).hexdigest(),
        rows=Joined([one.rows for one in whole]),
        sizes=tuple(sum(len(one.rows) for one in inside) for inside in sets),
        weights=weights,
        with_images=any(one.with_images for one in whole),
    )


def prompt_rows(
    source: Source, *, input_key: str, label_key: str | None, chat: bool, image_key: str | None = None, folder: Path | None = None
) -> PromptSet:
    """Rows into prompts; `chat` says that a chat template will render them, which messages and images need.

    Paths of images begin at `folder`; without `image_key` no column is looked at for images.

    Where the rows have no column `input_key`, and it is the usual "input", their layout may name another one, and the label's.
    Raises DataError that lists the unreadable lines and every faulty row together.
    """
    if input_key == "input" and len(source.rows) and (layout := recognise(source.rows[0].columns)):
        input_key, label_key = layout.prompt, label_key or layout.label
    judge = _Judge(source=source, input_key=input_key, label_key=label_key, chat=chat)
    bad = list(source.bad)
    pictures: dict[int, tuple[Picture, ...]] = {}
    for index, row in enumerate(source.rows):
        faults = judge.faults(row)
        value = None if faults else row.columns[input_key]
        shown_images = None if image_key is None or faults else row.columns.get(image_key)
        column = [] if shown_images is None else column_of(shown_images)
        # A text without a column of images, which most are, has none.
        if value is not None and (column or not isinstance(value, str)):
            _, values, places = placed(value if isinstance(value, str) else _messages(value), column)
            faults += count_faults(places, column, key=image_key, line=row.line)
            images = () if faults else tuple(_pictures(values, row.line, folder or Path(), faults, chat=chat))
            if images:
                pictures[index] = images
        bad += faults
    if bad:
        raise bad_rows_error(source.name, bad, rows=len(source.rows) + len(source.bad))
    rows = _PromptRows(source, pictures, input_key=input_key, label_key=label_key, image_key=image_key)
    return PromptSet(name=source.name, fingerprint=source.fingerprint, rows=rows, with_images=bool(pictures))


class _PromptRows(Lazy[PromptRow]):
    """Validated rows, each made a prompt when it is asked for."""

    def __init__(
        self,
        source: Source,
        pictures: Mapping[int, tuple[Picture, ...]],
        *,
        input_key: str,
        label_key: str | None,
        image_key: str | None,
    ) -> None:
        self._pictures, self._image_key = pictures, image_key
        self._rows, self._first, self._uid = source.rows, source.first, source.fingerprint[:FINGERPRINT_DIGITS]
        self._input_key, self._label_key = input_key, label_key

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, index: int) -> PromptRow:
        return self._prompt(index, self._rows[index])

    def __iter__(self) -> Iterator[PromptRow]:
        """Every prompt in order."""
        return (self._prompt(index, row) for index, row in enumerate(self._rows))

    def _prompt(self, index: int, row: Row) -> PromptRow:
        value, images = row.columns[self._input_key], self._pictures.get(index, ())
        prompt = value if isinstance(value, str) else _messages(value)
        taken = {self._input_key, *([self._image_key] * bool(images))}
        return PromptRow(
            uid=f"{self._uid}:{self._first + index}",
            prompt=placed(prompt, column_of(row.columns.get(str(self._image_key))))[0] if images else prompt,
            label=None if self._label_key is None else value_at(row.columns, self._label_key),
            line=row.line,
            columns={name: column for name, column in row.columns.items() if name not in taken},
            images=images,
        )


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """What is wrong with the rows of a source."""

    source: Source
    input_key: str
    label_key: str | None
    chat: bool

    def faults(self, row: Row) -> list[BadRow]:
        """Everything wrong with one row."""
        value = row.columns.get(self.input_key)
        sound = type(value) is str and value.isascii() and not (value.isspace() or not value)
        faults = [] if sound else list(self._input_faults(row))
        if self.label_key is not None and (label := value_at(row.columns, self.label_key)) in (None, MISSING):
            faults.append(self._label_fault(row, label))
        return faults

    def _label_fault(self, row: Row, label: object) -> BadRow:
        if label is MISSING:
            key = str(self.label_key)
            columns = self.source.columns
            known = columns if key.partition(".")[0] not in columns else [*columns, key]
            return missing_column(key, row.line, known, row.columns, flag="--data.label-key", usual=USUAL_LABELS)
        return BadRow(
            what=f"label {self.label_key!r} is null",
            remedy="give the rows a label, delete them, or drop --data.label-key if the reward function needs none",
            line=row.line,
        )

    def _input_faults(self, row: Row) -> Iterator[BadRow]:
        key, line = self.input_key, row.line
        remedy = "give the rows a prompt, or delete them"
        if key not in row.columns:
            yield missing_column(key, line, self.source.columns, row.columns, flag="--data.input-key", usual=USUAL_INPUTS)
            return
        value = row.columns[key]
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            yield BadRow(what=f"prompt {key!r} is empty", remedy=remedy, line=line, detail=shown(value))
        elif isinstance(value, str):
            yield from surrogate_faults(value, line)
        elif not isinstance(value, list):
            wanted = "write a string or a list of chat messages"
            yield BadRow(what=f"prompt {key!r} is neither text nor messages", remedy=wanted, line=line, detail=shown(value))
        else:
            if not self.chat:
                yield BadRow(what="chat messages without a chat template", remedy="turn on --data.apply-chat-template", line=line)
            yield from message_faults(value, line)


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
    nearest = nearest or next((near for name in usual if (near := did_you_mean(name, columns))), "")
    listed = ", ".join(repr(name) for name in columns) or "none"
    return BadRow(what=f"no column {key!r}", remedy=f"columns found: {listed}; name one with {flag}{nearest}", line=line)


def _messages(value: object) -> tuple[Message, ...]:
    assert isinstance(value, Sequence)
    return tuple(own_parts(message) for message in value)


def own_parts(message: Mapping[str, object]) -> Message:
    """A message without what is null, at any depth: a table gives every message, part and call the keys of all.

    Where the assistant calls a tool and says nothing, its content is an empty text.
    """
    own = {name: _own(part) for name, part in message.items() if part is not None}
    return {"content": "", **own} if own.get("tool_calls") and "role" in own else own


def _own(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _own(part) for name, part in value.items() if part is not None}
    return [_own(part) for part in value] if isinstance(value, list) else value


def stamps(text: str) -> tuple[object, ...]:
    """What changes when a file of a list of datasets, or one within a folder, is written again."""
    found: list[object] = []
    for path in (Path(name).expanduser() for name in dataset_names(text)):
        for file in [path, *(sorted(path.rglob("*")) if path.is_dir() else ())]:
            if file.exists():
                status = os.stat(file)
                found += [str(file), status.st_mtime_ns, status.st_size, status.st_ino]
    return tuple(found)


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
        missing = [name for name in ("role", "content") if name not in message and not (name == "content" and message.get("tool_calls"))]
        if missing:
            found = ", ".join(repr(name) for name in message) or "none"
            detail = f"{where} has no {' and no '.join(missing)}; keys found: {found}"
            yield BadRow(what="a message without role or content", remedy=shape, line=line, detail=detail)
        role, content = message.get("role"), message.get("content")
        content = "" if content is None and message.get("tool_calls") else content
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
            # The assistant may think, or call a tool, and say nothing.
            if not content.strip() and (role == "user" or (role == "assistant" and message.keys() <= {"role", "content"})):
                yield BadRow(what=f"an empty {role} message", remedy="give it text, or delete the rows", line=line, detail=where)
            yield from surrogate_faults(content, line)
    if roles.count("system") > 1:
        places = ", ".join(str(index) for index, role in enumerate(roles) if role == "system")
        yield BadRow(what="more than one system message", remedy="merge them into the first", line=line, detail=f"messages {places}")
    if roles and roles[-1] == "assistant" and not may_end_with_assistant:
        remedy = "delete the last message: the policy writes it (a reference answer belongs in the label)"
        yield BadRow(what="the messages end with the assistant", remedy=remedy, line=line, detail=f"message {len(messages) - 1}")
