"""What a chat template can do, tried out before anything is sampled: conversations whose rendering is known are compared.

`survey` renders a handful of them as a whole and by the sentinel cut (`rendering.py`). Where the two disagree, replies are not
appended to: the conversation is rendered anew and becomes a further segment. A template that cannot be served at all is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import Message
from hone.rollout.endpoint.rendering import CannotAppend, ChatTokenizer, Renderer, reply_with
from hone.rollout.endpoint.tool_calls import PARSERS
from hone.rollout.errors import EnvironmentFailure

_MARK = "QZMARKZQ"
_ARGUMENT = "QZARGUMENTZQ"
_ANSWER = "QZANSWERZQ"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "QZDESCRIPTIONZQ",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}, "count": {"type": "integer"}}, "required": ["key"]},
    },
}
_CALL = ("look_up", f'{{"key": "{_ARGUMENT}", "count": 3}}')


@dataclass(frozen=True, kw_only=True)
class Served:
    """A template that can be served, and what of it cannot: reasons, empty where there is nothing to say.

    `append_users` and `append_tools` say why messages of users or tools are not appended, `tools` why requests with tools are
    refused; `dialect` is the name of the parser that reads its tool calls.
    """

    renderer: Renderer
    append_users: str = ""
    append_tools: str = ""
    tools: str = ""
    dialect: str | None = None

    @property
    def reservations(self) -> tuple[str, ...]:
        """What a person should know before the run, a sentence each."""
        anew = "replies are not appended to where {} speak: each call renders the conversation anew ({})"
        told = (
            self.append_users and anew.format("users", self.append_users),
            self.append_tools and anew.format("tools", self.append_tools),
            self.tools and f"requests with tools are refused: {self.tools}",
        )
        return tuple(filter(None, told))


def survey(tokenizer: ChatTokenizer, *, stop_ids: Sequence[int]) -> Served:
    """What the tokenizer's template can do. Raises EnvironmentFailure where no conversation can be served."""
    if tokenizer.chat_template is None:
        raise _refusal(tokenizer, "there is none; use an instruction-tuned model, or put a chat_template.jinja beside the tokenizer")
    stops = [Renderer(tokenizer, closers=()).decoded([stop]) for stop in stop_ids]
    renderer = Renderer(tokenizer, closers=[*stops, *_own_closer(tokenizer)])
    conversation = [_user("one"), reply_with(_MARK), _user("two")]
    try:
        text = renderer.whole(conversation, (), {})[1]
        tail = renderer.behind(text, _MARK)
    except (Refused, CannotAppend) as error:
        raise _refusal(tokenizer, str(error)) from error
    if "two" not in tail:
        raise _refusal(tokenizer, "what a user says after a reply does not stand behind it")
    shown = _tools_shown(renderer)
    dialect = None if shown else _dialect(renderer)
    if not shown and dialect is None:
        shown = f"its calls of tools are written in a dialect that is not read here (read are {', '.join(PARSERS)})"
    return Served(
        renderer=renderer,
        append_users=_first_difference(renderer, _USERS, ()),
        append_tools="" if shown else _first_difference(renderer, _tool_conversations(renderer), (_TOOL,)),
        tools=shown,
        dialect=dialect,
    )


def served_template(tokenizer: ChatTokenizer, *, stop_ids: Sequence[int]) -> Served | None:
    """The tokenizer's chat template, tried out; None where it has none, and only plain text can be completed."""
    return None if tokenizer.chat_template is None else survey(tokenizer, stop_ids=stop_ids)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _result(index: int) -> Message:
    return Message(role="tool", content=f"{_ANSWER} {index}", tool_call_id=f"call{index:05}", name="look_up")


_USERS = (
    ([_user("one"), reply_with(_MARK)], [_user("two")]),
    ([_user("one"), reply_with(f"A longer answer.\n\nIn two parts, {_MARK}")], [_user("And then?\n")]),
    ([_user("one"), reply_with("first"), _user("two"), reply_with(_MARK)], [_user("three")]),
)


def _tool_conversations(renderer: Renderer) -> list[tuple[list[Message], list[Message]]]:
    one, said = reply_with("", _CALL), reply_with("Let me see.", _CALL)
    conversations = [
        ([_user("one"), one], [_result(0)]),
        ([_user("one"), one, _result(0), one], [_result(0)]),
        ([_user("one"), reply_with("first"), _user("two"), one], [_result(0)]),
        ([_user("one"), said], [_result(0)]),
        ([_user("one"), one, _result(0), reply_with(f"So it is {_ARGUMENT}")], [_user("two")]),
    ]
    both = ([_user("one"), reply_with("", _CALL, _CALL)], [_result(0), _result(1)])
    try:
        renderer.text([*both[0], *both[1]], (_TOOL,), {})
    except Refused:
        return conversations  # a template for one call at a time says so itself, at the request
    return [*conversations, both]


def _first_difference(renderer: Renderer, conversations: Sequence[tuple[list[Message], list[Message]]], tools: Sequence[Any]) -> str:
    """Why what follows a reply cannot be cut out, or nothing where it can in every conversation."""
    for before, new in conversations:
        reply = before[-1]
        try:
            mark = _ARGUMENT if reply.tool_calls or _ARGUMENT in reply.content else _MARK
            true = renderer.behind(renderer.text([*before, *new], tools, {}), mark)
            cut = renderer.tail(reply, new, tools, {})
        except (Refused, CannotAppend) as error:
            return str(error)
        if cut.text != true:
            return f"what follows a reply depends on what stands before it: {cut.text[:80]!r} by itself, {true[:80]!r} in a conversation"
        if any(message.content.strip() not in cut.text for message in new):
            return "what is said after a reply does not all stand behind it"
        if renderer.decoded(cut.ids) != cut.text:
            return f"the tokenizer does not give back what the template writes: {cut.text[:80]!r}"
    return ""


def _tools_shown(renderer: Renderer) -> str:
    """Why the template cannot show tools, their calls and their answers to the policy; nothing where it can."""
    try:
        text = renderer.text([_user("one"), reply_with("", _CALL), _result(0)], (_TOOL,), {})
    except Refused as error:
        return str(error)
    for mark, what in (("QZDESCRIPTIONZQ", "the descriptions of tools"), (_ARGUMENT, "calls of tools"), (_ANSWER, "answers of tools")):
        if mark not in text:
            return f"the template leaves out {what}"
    return ""


def _dialect(renderer: Renderer) -> str | None:
    """The parser that reads back a call as the template writes it."""
    asked = [_user("one")]
    before = renderer.text(asked, (_TOOL,), {}, prompting=False)
    prompt = renderer.text(asked, (_TOOL,), {}).removeprefix(before)
    text = renderer.text([*asked, reply_with("", _CALL)], (_TOOL,), {}, prompting=False).removeprefix(before)
    written = text.removeprefix(prompt)
    ends = [end for closer in renderer.closers if (end := written.find(closer)) > 0]
    written = written[: min(ends)] if ends else written
    schemas = {"look_up": _TOOL["function"]["parameters"]}
    for name, parse in PARSERS.items():
        calls = parse(written, schemas).calls
        if len(calls) == 1 and calls[0][0] == "look_up" and _ARGUMENT in calls[0][1]:
            return name
    return None


def _own_closer(tokenizer: ChatTokenizer) -> list[str]:
    """The special token the template puts behind a reply, if it puts one there."""
    special = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    try:
        text = Renderer(tokenizer, closers=()).text([_user("one"), reply_with(_MARK), _user("two")], (), {})
    except Refused:
        return []
    rest = text[text.rfind(_MARK) + len(_MARK) :] if _MARK in text else ""
    found = {token: place for token in special if (place := rest.find(token)) >= 0}
    return [min(found, key=lambda token: (found[token], -len(token)))] if found else []


def _refusal(tokenizer: ChatTokenizer, reason: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"the chat template of {tokenizer.name_or_path!r} cannot serve an agent: {reason}; agents that ask for chat need a template that "
        "keeps every message and ends a reply with a special token"
    )
