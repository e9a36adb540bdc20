"""From chat messages to ids: the whole conversation once, and after that only what was said since, cut out behind a sentinel.

A template is rendered over a made-up exchange whose reply is a sentinel, followed by the new messages; what stands behind the
reply's closing token is what the policy has to read next. Whether that equals the template's own rendering of real
conversations is tried out at the start (`templates.py`), for templates differ and some look far back.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import Message, ToolCall

SENTINEL = "QZSENTINELZQ"
_QUESTION = Message(role="user", content="What is it?")
# A template drops these only by mistake; what it does with a tool's answer is its own affair (some re-encode it).
_KEPT_ROLES = ("system", "user")

Tools = Sequence[Mapping[str, Any]]


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that renders conversations and turns text into ids and back."""

    chat_template: Any
    name_or_path: str

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The text of a conversation."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of the text."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """The text of the ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What follows a reply, as ids; the first is the token that closes it (or, where none does, the next role's marker)."""

    ids: tuple[int, ...]
    text: str


class CannotAppend(Exception):
    """The template cannot say what follows a reply without rendering everything anew; str() is the reason."""


class Renderer:
    """A chat template with its tokenizer. `closers` are the texts that may end a reply: the stop tokens' and the template's own."""

    def __init__(self, tokenizer: ChatTokenizer, *, closers: Sequence[str]) -> None:
        self.tokenizer, self.closers = tokenizer, tuple(dict.fromkeys(closers))

    def text(self, messages: Sequence[Message], tools: Tools, options: Mapping[str, Any], *, prompting: bool = True) -> str:
        """The rendered conversation, up to where the policy begins to write. Raises Refused with the template's own words."""
        try:
            rendered = self.tokenizer.apply_chat_template(
                [message.plain() for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                **{**options, "add_generation_prompt": prompting},
            )
        except Exception as error:  # a template is a program: what it does with what it was given may end in any error
            what = str(error) or type(error).__name__
            raise Refused(f"the chat template refuses these messages: {what}", code="template_error", param="messages") from error
        return str(rendered)

    def whole(self, messages: Sequence[Message], tools: Tools, options: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
        """Ids and text of the whole conversation. Raises Refused, for a message that would never reach the policy too."""
        text = self.text(messages, tools, options)
        for message in messages:
            if message.role in _KEPT_ROLES and any(piece.strip() not in text for piece in message.texts):
                raise Refused(
                    f"the chat template drops a {message.role} message: {message.content[:80]!r}", code="template_error", param="messages"
                )
        return self.ids(text), text

    def tail(
        self,
        reply: Message,
        new: Sequence[Message],
        tools: Tools,
        options: Mapping[str, Any],
        *,
        before: Sequence[Message] = (_QUESTION,),
    ) -> Tail:
        """What follows `reply` when `new` was said after it. Raises CannotAppend, or Refused.

        `before` is what was said until then, where that matters: some templates number the images of a conversation.
        """
        text = self.text([*before, _stand_in(reply), *new], tools, options)
        return self.closing(self.behind(text, SENTINEL))

    def behind(self, text: str, mark: str) -> str:
        """What stands behind the last `mark`, from the token on that closes the reply it is in. Raises CannotAppend."""
        place = text.rfind(mark)
        if place < 0:
            raise CannotAppend("the template leaves the reply out")
        rest = text[place + len(mark) :]
        found = [start for closer in self.closers if (start := rest.find(closer)) >= 0]
        if not found:
            raise CannotAppend("no token of the template closes the reply")
        return rest[min(found) :]

    def closing(self, text: str) -> Tail:
        """Ids of what follows, its closing token included: tokenised alone, some tokenizers would begin a text with a space."""
        return Tail(ids=self.ids(text), text=text)

    def ids(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Ids of rendered text: the template wrote the `special` tokens itself. Raises Refused for what is no Unicode."""
        refuse_broken(text)
        return tuple(self.tokenizer.encode(text, add_special_tokens=special))

    @functools.cached_property
    def last_id(self) -> int:
        """The largest id of the vocabulary."""
        return max(self.tokenizer.get_vocab().values())

    def decoded(self, ids: Sequence[int], *, behind: Sequence[int] = ()) -> str:
        """Text of ids with special tokens, as it reads behind others: alone, some tokenizers drop a leading space."""
        head, whole = self._decoded(behind), self._decoded((*behind, *ids))
        return whole[len(head) :] if whole.startswith(head) else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def refuse_broken(text: str) -> None:
    """Raises Refused for text that no tokenizer takes: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"a text has half of a surrogate pair ({text[error.start]!a}), which is no character") from error


def _stand_in(reply: Message) -> Message:
    """A reply of the same shape that says nothing but the sentinel."""
    calls = tuple(replace(call, arguments=f'{{"x": "{SENTINEL}"}}') for call in reply.tool_calls)
    return Message(role="assistant", content=SENTINEL if reply.content or not calls else "", tool_calls=calls)


def reply_with(content: str, *calls: tuple[str, str]) -> Message:
    """An assistant's message, its calls given as (name, JSON arguments) and numbered."""
    numbered = tuple(ToolCall(id=f"call{index:05}", name=name, arguments=text) for index, (name, text) in enumerate(calls))
    return Message(role="assistant", content=content, tool_calls=numbered)
