"""A conversation as the model is shown it: messages under a chat template or, without one, a text that is gone on with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import transformers

UNFINISHED = "\ufffd"
"""What decoding gives for the bytes of half a character."""


@runtime_checkable
class Talk(Protocol):
    """What was said so far, and how it is rendered."""

    tokenizer: "transformers.PreTrainedTokenizerBase"

    def ask(self, text: str) -> list[int]:
        """The ids the model is to go on from when `text` is said; nothing is remembered yet. Raises jinja's and the template's errors."""
        ...

    def keep(self, text: str, asked: Sequence[int], answer: str, drawn: Sequence[int], *, ended: bool) -> None:
        """Remember what was said (and the ids of all that was asked with) and answered (and its ids, its end left out where it has one)."""
        ...

    def take_back(self) -> None:
        """Forget the last exchange, if there is one."""
        ...

    def forget(self) -> None:
        """Forget all that was said."""
        ...

    def row(self) -> dict[str, Any] | None:
        """It as a row to learn from; None where nothing was said."""
        ...


@dataclass(kw_only=True)
class Conversation:
    """A `Talk` in messages, rendered by the tokenizer's chat template."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    given: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> list[int]:
        """See `Talk`."""
        rendered = self.tokenizer.apply_chat_template(
            [*self._shown(), {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **self.given
        )
        return ids_of(self.tokenizer, str(rendered), special=False)

    def keep(self, text: str, asked: Sequence[int], answer: str, drawn: Sequence[int], *, ended: bool) -> None:
        """See `Talk`."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def take_back(self) -> None:
        """See `Talk`."""
        del self.messages[-2:]

    def forget(self) -> None:
        """See `Talk`; the system message stays."""
        self.messages.clear()

    def row(self) -> dict[str, Any] | None:
        """See `Talk`."""
        return {"messages": self._shown()} if self.messages else None

    def _shown(self) -> list[dict[str, str]]:
        """The messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.messages]


@dataclass(kw_only=True)
class OpenText:
    """A `Talk` that is one text, as base models know it: each line goes on where the answer before it stopped.

    An answer that came to its end closes the text, and the next line begins another one: behind an end token no model was taught to go
    on. The ids that were drawn are gone on from as they were drawn.
    """

    tokenizer: "transformers.PreTrainedTokenizerBase"
    ids: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    over: bool = False

    def ask(self, text: str) -> list[int]:
        """See `Talk`."""
        said = [] if self.over else self.ids
        return [*said, *ids_of(self.tokenizer, text, special=not said)]

    def keep(self, text: str, asked: Sequence[int], answer: str, drawn: Sequence[int], *, ended: bool) -> None:
        """See `Talk`."""
        self.before = [] if self.over else self.ids
        self.ids, self.over = [*asked, *drawn], ended

    def take_back(self) -> None:
        """See `Talk`."""
        self.ids, self.over = self.before, False

    def forget(self) -> None:
        """See `Talk`."""
        self.ids, self.before, self.over = [], [], False

    def row(self) -> dict[str, Any] | None:
        """See `Talk`."""
        return {"text": self.tokenizer.decode(self.ids, skip_special_tokens=True)} if self.ids else None


def ids_of(tokenizer: "transformers.PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    """The ids of one text; `special` says whether the tokenizer's BOS (and whatever else it puts there) belongs to it."""
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType] - of one text


class Words:
    """Ids into text as they come: a text is given out when it cannot change any more, special tokens left out."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._from = self._to = 0

    def add(self, ids: Sequence[int]) -> str:
        """What these ids add. A character whose bytes are not all there yet waits for the rest."""
        self._ids += ids
        before, whole = self._decoded(self._ids[self._from : self._to]), self._decoded(self._ids[self._from :])
        if whole.endswith(UNFINISHED) or len(whole) <= len(before):
            return ""
        # Decoded behind what stands before it, for alone some tokenizers drop a leading space; but not behind everything, for that is slow.
        self._from, self._to = self._to, len(self._ids)
        return whole[len(before) :]

    def rest(self) -> str:
        """What has been held back."""
        before, whole = self._decoded(self._ids[self._from : self._to]), self._decoded(self._ids[self._from :])
        self._from = self._to = len(self._ids)
        return whole[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "the text of one list of ids"
        return text


def streamed(words: Words, ids: Iterator[Sequence[int]]) -> Iterator[str]:
    """Texts of an answer as its ids come."""
    for some in ids:
        if text := words.add(some):
            yield text
    if text := words.rest():
        yield text
