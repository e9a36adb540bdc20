"""Chat messages in one form, whatever wire they came by, and when two of them are the same message.

Only equality is decided here. What the policy reads is never rebuilt from an assistant message that was sampled: its ids are kept.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hone.rollout.endpoint.content import Shown, content_of
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.json_text import read_json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
Likeness = Literal["exact", "respelled"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool; `arguments` is JSON text as it was written."""

    id: str | None
    name: str
    arguments: str

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: arguments as an object where they are one."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": _parsed(self.arguments)}}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message: `reasoning` only where it was given, `tool_call_id` of a tool's answer; `images` stand in `content`."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    images: tuple[Shown, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The content before, between and behind its images."""
        cuts = [0, *(one.behind for one in self.images), len(self.content)]
        return [self.content[start:end] for start, end in itertools.pairwise(cuts)]

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        message: dict[str, Any] = {"role": self.role, "content": self._parts() if self.images else self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message

    def _parts(self) -> list[dict[str, str]]:
        first, *rest = self.texts
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts if part != {"type": "text", "text": ""}]


def read_messages(given: object, *, wheres: Sequence[str] | None = None) -> tuple[Message, ...]:
    """The messages of a chat request, in every shape client libraries send them; `wheres` are their names, if not by number.

    Raises Refused.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise Refused("messages must be a list with at least one message", param="messages")
    names = [f"messages[{index}]" for index in range(len(given))] if wheres is None else wheres
    return tuple(_message(one, where) for one, where in zip(given, names, strict=True))


def likeness(ours: Message, theirs: Message) -> Likeness | None:
    """Whether a message that came back is the one that was sent: to the letter, or (an assistant's) but for spaces and JSON spelling.

    Reasoning counts only where the client sends it, and ids of calls only where both have them.
    """
    if ours == theirs:
        return "exact"
    if ours.role != theirs.role or ours.role != "assistant" or len(ours.tool_calls) != len(theirs.tool_calls):
        return None
    if theirs.reasoning is not None and theirs.reasoning.strip() != (ours.reasoning or "").strip():
        return None
    if ours.content.strip() != theirs.content.strip():
        return None
    for mine, other in zip(ours.tool_calls, theirs.tool_calls, strict=True):
        known = mine.id is None or other.id is None or mine.id == other.id
        if not known or mine.name != other.name or _canonical(mine.arguments) != _canonical(other.arguments):
            return None
    letter = ours.content == theirs.content and [c.arguments for c in ours.tool_calls] == [c.arguments for c in theirs.tool_calls]
    return "exact" if letter else "respelled"


def _message(given: object, where: str) -> Message:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or given["role"] not in ROLES:
        role = given.get("role") if isinstance(given, Mapping) else given
        raise Refused(f"{where} has the role {role!r:.80}; known are {', '.join(ROLES)}", param=where)
    role = ROLES[str(given["role"])]
    reasoning = given.get("reasoning_content") or given.get("reasoning")
    calls = given.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or (calls and role != "assistant"):
        raise Refused(f"{where}.tool_calls belongs to assistant messages and is a list", param=where)
    identity = given.get("tool_call_id")
    name = given.get("name") if role == "tool" else None  # of other roles templates know none
    content, images = content_of(given.get("content"), where, role=role)
    return Message(
        role=role,
        content=content,
        reasoning=reasoning if role == "assistant" and isinstance(reasoning, str) else None,
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)),
        tool_call_id=str(identity) if role == "tool" and identity is not None else None,
        name=str(name) if name is not None else None,
        images=images,
    )


def _call(given: object, where: str) -> ToolCall:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refused(f"{where} is no function call with a name", param=where)
    arguments = function.get("arguments")
    identity = given.get("id")
    return ToolCall(
        id=None if identity is None else str(identity),
        name=function["name"],
        arguments=arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments, ensure_ascii=False),
    )


def _parsed(arguments: str) -> object:
    """The object that JSON text spells, or the text where it spells none."""
    try:
        return read_json(arguments)
    except ValueError:
        return arguments


def _canonical(arguments: str) -> tuple[bool, str]:
    """(whether it is JSON, the one spelling of what it says): numbers as any language writes them, so that 1.0 is 1, and true is not."""
    try:
        return True, json.dumps(_plain_numbers(read_json(arguments)), sort_keys=True)
    except ValueError:
        return False, arguments


def _plain_numbers(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain_numbers(inner) for key, inner in value.items()}
        case list():
            return [_plain_numbers(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
