"""What a message of a request says: its text, and the images among it, in every shape client libraries send them."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hone.rollout.endpoint.errors import Refused

_SEEN = ("user", "tool")
"""Roles whose messages may have images: a policy writes none, and templates show none of a system's."""
_MEND = "send a PNG or JPEG as data:image/png;base64,..."


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image of a message: the file's bytes, behind so many characters of the text; `where` is its name in what is refused."""

    behind: int
    data: bytes = field(repr=False)
    where: str = field(compare=False)


def text_of(content: object, where: str) -> str:
    """The text of content that has no images. Raises Refused."""
    return content_of(content, where, role="system")[0]


def content_of(content: object, where: str, *, role: str) -> tuple[str, tuple[Shown, ...]]:
    """Text and images of a message's content: a string, nothing, or a list of parts. Raises Refused for anything else."""
    if content is None or isinstance(content, str):
        return content or "", ()
    if not isinstance(content, Sequence):
        raise Refused(f"{where}.content must be text or a list of parts, not {type(content).__name__}", param=where)
    text = ""
    images: list[Shown] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            text += part["refusal"]
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image_url" and role in _SEEN:
            name = f"image {len(images) + 1} of {where}.content"
            images.append(Shown(behind=len(text), data=_data(part.get("image_url"), name), where=name))
        else:
            served = "text and images (image_url) are" if role in _SEEN else "text is"
            raise Refused(f"{where}.content has a part of type {kind!r}; only {served} served", code="unsupported_content", param=where)
    return text, tuple(images)


def image_part(block: Mapping[str, object], where: str) -> dict[str, object]:
    """Anthropic's image block as a part of a chat message. Raises Refused for a source of another kind than base64 (or url, later)."""
    source = block.get("source")
    match source.get("type") if isinstance(source, Mapping) else None:
        case "base64":
            assert isinstance(source, Mapping)
            return {"type": "image_url", "image_url": f"data:{source.get('media_type')};base64,{source.get('data')}"}
        case "url":
            assert isinstance(source, Mapping)
            return {"type": "image_url", "image_url": source.get("url")}
        case kind:
            raise Refused(f"{where} has an image with a source of type {kind!r}; send base64", code="unsupported_content", param=where)


def _data(given: object, name: str) -> bytes:
    """The file's bytes of an image_url: {"url": ...}, or the URL. Whether they are an image is seen later. Raises Refused."""
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str):
        raise Refused(f"{name} has no url; {_MEND}", code="unsupported_content", param=name)
    head, comma, body = url.partition(",")
    if url.startswith(("http://", "https://")):
        raise Refused(f"{name} is a link ({url[:80]}), and none is fetched; {_MEND}", code="unsupported_content", param=name)
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Refused(f"{name} has the url {url[:40]!r}; {_MEND}", code="unsupported_content", param=name)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name} is no base64: {error}; {_MEND}", code="unsupported_content", param=name) from error
