"""Where the images of a prompt stand: parts of messages, or "<image>" in their text, matched with the row's column of images.

Layouts: OpenRLHF's, verl's and TRL's `images` beside a prompt, chat messages with {"type": "image"} parts that take from that
column in order, and parts that carry their image themselves ({"type": "image_url", ...}, {"type": "image", "image": ...}).
"""

from collections.abc import Iterator, Mapping, Sequence

from hone.datasets.errors import BadRow, shown
from hone.datasets.records import Message

MARK = "<image>"
IMAGE = {"type": "image"}
CARRIED_AS = ("image", "image_url", "path", "url", "bytes", "base64")
PART_SHAPE = 'write {"type": "text", "text": "..."} or {"type": "image"}'


def part_faults(parts: Sequence[object], where: str, line: int) -> Iterator[BadRow]:
    """What is wrong with a message's content that is a list."""
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image", "image_url"):
            detail = f"{where}, part {index} is {shown(part)}"
            yield BadRow(what="a part of a message that is neither text nor image", remedy=PART_SHAPE, line=line, detail=detail)
        elif part["type"] == "text" and not isinstance(part.get("text"), str):
            yield BadRow(what="a text part without text", remedy=PART_SHAPE, line=line, detail=f"{where}, part {index} is {shown(part)}")


def column_of(value: object) -> list[object]:
    """The images a row's column holds: none, one by itself, or a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def placed(prompt: str | Sequence[Message], column: Sequence[object]) -> tuple[str | tuple[Message, ...], list[object], int]:
    """The prompt with an image part in the place of every image, their values in that order, and how many places the column had.

    A text without any mark shows its images first. A prompt without images stays as it is.
    """
    if isinstance(prompt, str):
        if not column:
            return prompt, [], 0
        text = prompt if MARK in prompt else MARK * len(column) + prompt
        prompt = [{"role": "user", "content": text}]
    values: list[object] = []
    left = iter(column)
    places = 0
    messages: list[Message] = []
    for message in prompt:
        content = message["content"]
        if isinstance(content, str) and not (column and MARK in content):
            messages.append(message)
            continue
        parts: list[Mapping[str, object]] = []
        for part in _marked(content) if isinstance(content, str) else content:  # pyright: ignore[reportGeneralTypeIssues] - a list, as was seen
            if part["type"] == "text":
                parts.append(part)
                continue
            carried = next((part[name] for name in CARRIED_AS if part.get(name) is not None), None)
            if carried is None:
                places += 1
                carried = next(left, None)
            values.append(carried)
            parts.append(IMAGE)
        messages.append({**message, "content": parts})
    return tuple(messages), values, places


def count_faults(places: int, column: Sequence[object], *, key: str | None, line: int) -> Iterator[BadRow]:
    """A column with more or fewer images than the prompt has places for."""
    if places == len(column):
        return
    remedy = f'give {key!r} one image for every {MARK} or {{"type": "image"}} of the prompt, in order'
    yield BadRow(
        what="images and their places differ in number", remedy=remedy, line=line, detail=f"{len(column)} images for {places} places"
    )


def _marked(text: str) -> list[Mapping[str, object]]:
    """A text with marks as parts."""
    parts: list[Mapping[str, object]] = []
    for index, piece in enumerate(text.split(MARK)):
        if index:
            parts.append(IMAGE)
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
