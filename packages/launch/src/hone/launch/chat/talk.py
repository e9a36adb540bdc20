"""A conversation as the model is shown it: messages under a chat template or, without one, each line alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

UNFINISHED = "\ufffd"
"""What decoding gives for the bytes of half a character."""


@dataclass(kw_only=True)
class Talk:
    """What was said so far, and how it is rendered; `raw` has no memory."""

    tokenizer: "transformers.PreTrainedTokenizerBase"
    raw: bool
    given: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> list[int]:
        """The ids the model is to go on from when `text` is said; nothing is remembered yet. Raises jinja's and the template's errors."""
        if self.raw:
            return list(self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType] - of one text
        rendered = self.tokenizer.apply_chat_template(
            [*self.shown(), {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **self.given
        )
        return list(self.tokenizer(rendered, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType] - of one text

    def keep(self, text: str, answer: str) -> None:
        """Remember what was said and answered."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def take_back(self) -> str | None:
        """Forget the last exchange; what was said in it, or None where there is none."""
        if not self.messages:
            return None
        text = self.messages[-2]["content"]
        del self.messages[-2:]
        return text

    def shown(self) -> list[dict[str, str]]:
        """The messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.messages]


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
