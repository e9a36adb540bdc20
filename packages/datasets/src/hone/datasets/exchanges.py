"""Exchanges into token ids with their marks: what the assistant says, its end included, is trained on, and nothing else is.

Where the marks come from, in this order: the chat template's own generation tags; else the tokens themselves: those of the
rendering up to and with an answer, less those of the rendering before it, which must be a prefix (that is checked). Plain texts
are a prompt's own tokens, as the policy will see them, and the answer's. A row ends with the last token that is trained on.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hone.datasets.chat import SLOT, dropped
from hone.datasets.errors import BadRow, TokenizerError, shown
from hone.datasets.labelled import Exchange, Sampled, TokenRow
from hone.datasets.offline_config import LabelledData
from hone.datasets.records import Message
from hone.datasets.templates import template_errors, template_kwargs, use_template
from hone.datasets.together import Text, Work, together
from hone.datasets.tokenizer import unknown_id

if TYPE_CHECKING:
    import transformers

TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An exchange as rows of tokens; `apart` says that prompt and answer had to be tokenised one by one."""

    rows: tuple[TokenRow, ...]
    apart: bool = False


class Piece(NamedTuple):
    """A document, or some of one; whether it begins, and ends, with it."""

    text: str
    begins: bool = True
    ends: bool = True


class Encoder:
    """Turns exchanges into token ids, one after another, with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", config: LabelledData) -> None:
        use_template(tokenizer, config)
        self._given: dict[str, Any] = template_kwargs(config)
        if tokenizer.eos_token_id is None:
            raise TokenizerError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no end token, so nothing could be taught to end; "
                "set eos_token in its tokenizer_config.json"
            )
        self._tokenizer, self._config = tokenizer, config
        self._eos = int(str(tokenizer.eos_token_id))
        self._special = frozenset(tokenizer.all_special_ids)
        template = tokenizer.chat_template
        self._tagged = config.apply_chat_template and isinstance(template, str) and TAGS.search(template) is not None
        self._ignores: bool | None = None
        self._names = tokenizer.all_special_tokens

    def encode(self, exchange: Exchange | Sampled, *, line: int) -> Encoded | BadRow:
        """The exchange's rows, uncut; what is wrong with it where the chat template does not take it."""
        (found,) = together([self.work(exchange, line=line)], self._tokenizer)
        return found

    def work(self, exchange: Exchange | Sampled, *, line: int) -> Work[Encoded | BadRow]:
        """What `encode` does, to be done together with others."""
        if isinstance(exchange, Sampled):
            return self._sampled(exchange, line)
        if not self._config.apply_chat_template:
            return (yield from self._plain(exchange, line))
        prompt = _messages(exchange.prompt, "user")
        messages = (*prompt, *_messages(exchange.answer, "assistant"))
        try:
            if self._tagged:
                return self._by_tags(messages, len(prompt), line)
            return (yield from self._by_prefixes(messages, len(prompt), line))
        except template_errors() as error:
            return BadRow(
                what=f"the chat template of {self._tokenizer.name_or_path!r} fails",
                remedy="mend the rows, or put a chat_template.jinja that takes them beside the tokenizer",
                line=line,
                detail=f"{type(error).__name__}: {error}; messages {shown(messages)}",
            )

    def _sampled(self, exchange: Sampled, line: int) -> Encoded | BadRow:
        ids = exchange.prompt + exchange.answer
        if max(ids) >= len(self._tokenizer):
            return BadRow(
                what=f"ids that the tokenizer of {self._tokenizer.name_or_path!r} does not have",
                remedy="use the model that the rows were sampled from, or take the columns of ids out to have texts tokenised",
                line=line,
                detail=f"id {max(ids)} of {len(self._tokenizer)}",
            )
        return Encoded(rows=(_row(ids, [(len(exchange.prompt), len(ids))]),))

    def document(self, piece: Piece) -> Work[list[int]]:
        """A document's tokens, or those of a piece of it; its end is marked."""
        (ids,) = yield [Text(piece.text, special=piece.begins)]
        if ids and ids[-1] == self._eos:
            return ids if piece.ends else ids[:-1]
        return [*ids, self._eos] if piece.ends else ids

    def _plain(self, exchange: Exchange, line: int) -> Work[Encoded | BadRow]:
        assert isinstance(exchange.prompt, str) and isinstance(exchange.answer, str), "messages are refused without a chat template"
        template = self._config.input_template
        prompt = exchange.prompt if template is None else template.replace(SLOT, exchange.prompt)
        before, whole = yield [Text(prompt, special=True), Text(prompt + exchange.answer, special=True)]
        if whole and whole[-1] == self._eos and not exchange.answer.endswith(str(self._tokenizer.eos_token)):
            whole = whole[:-1]  # put there by the tokenizer, which is saved with add_eos_token
        if before and before[-1] == self._eos and not prompt.endswith(str(self._tokenizer.eos_token)):
            before = before[:-1]
        apart = whole[: len(before)] != before
        answer = (yield [Text(exchange.answer, special=False)])[0] if apart else whole[len(before) :]
        unknown = unknown_id(self._tokenizer)
        if unknown is not None and unknown in (*before, *answer):
            return BadRow(
                what=f"characters outside the vocabulary of {self._tokenizer.name_or_path!r}",
                remedy="use a model whose tokenizer knows them (--model.model-name-or-path), or mend the rows",
                line=line,
                detail=shown(prompt + exchange.answer),
            )
        if not answer or answer[-1] != self._eos:
            answer = [*answer, self._eos]
        return Encoded(rows=(_row(before + answer, [(len(before), len(before) + len(answer))]),), apart=apart)

    def _by_tags(self, messages: Sequence[Message], first: int, line: int) -> Encoded | BadRow:
        """The template marks what the assistant says; of it, what belongs to the answer's messages is trained on."""
        found = self._tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", [dict(one) for one in messages]),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self._given,
        )
        ids, marks = cast("list[int]", list(found["input_ids"])), [bool(mark) for mark in found["assistant_masks"]]  # pyright: ignore[reportArgumentType, reportCallIssue] - a BatchEncoding of one row
        spans = [
            (start, end)
            for start, end in zip(
                (at for at in range(len(ids)) if marks[at] and (at == 0 or not marks[at - 1])),
                (at + 1 for at in range(len(ids)) if marks[at] and (at + 1 == len(ids) or not marks[at + 1])),
                strict=True,
            )
        ]
        earlier = sum(message["role"] == "assistant" for message in messages[:first])
        said = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != said:
            return BadRow(
                what=f"the generation tags of the chat template of {self._tokenizer.name_or_path!r} do not mark every answer",
                remedy="mend the template's {% generation %} tags, or take them out",
                line=line,
                detail=f"{len(spans)} marked spans, {said} messages of the assistant",
            )
        text = self.rendered(messages, prompting=False)
        for place, message in enumerate(messages):
            if lost := dropped(message, text, place=place, answer=place >= first, line=line):
                return lost
        ids, spans = self._ended(ids, spans)
        return Encoded(rows=(_row(ids, spans[earlier:]),))

    def _by_prefixes(self, messages: Sequence[Message], first: int, line: int) -> Work[Encoded | BadRow]:
        """What each answer adds to the rendering before it, token by token."""
        turns: list[tuple[int, list[int]]] = []
        places = [place for place, message in enumerate(messages) if place >= first and message["role"] == "assistant"]
        cuts = [(end, prompting) for place in places for end, prompting in ((place, True), (place + 1, False))]
        texts = [self.rendered(messages[:end], prompting=prompting) for end, prompting in cuts]
        for place, asked, written in zip(places, texts[::2], texts[1::2], strict=True):
            if bad := self._misplaced(messages[: place + 1], asked, written, line):
                return bad
        ids = yield [Text(text, special=False) for text in texts]
        for place, before, through in zip(places, ids[::2], ids[1::2], strict=True):
            if through[: len(before)] != before:
                asked, written = (self._tokenizer.decode(ids[max(0, len(before) - 12) :]) for ids in (before, through))
                return BadRow(
                    what=f"the chat template of {self._tokenizer.name_or_path!r} writes an answer otherwise than it asks for one",
                    remedy="put {% generation %} tags into the template, or take what it drops out of the rows",
                    line=line,
                    detail=f"message {place} is {shown(messages[place]['content'])}: asked for after {shown(asked)}, "
                    f"written {shown(written)}",
                )
            through, ((_, end),) = self._ended(through, [(len(before), len(through))])
            turns.append((len(before), through[:end]))
        whole = turns[-1][1]
        if all(whole[: len(through)] == through for _, through in turns):
            return Encoded(rows=(_row(whole, [(start, len(through)) for start, through in turns]),))
        # A template that rewrites earlier turns (it drops their thoughts, say): each answer is learnt after what stands before it then.
        return Encoded(rows=tuple(_row(through, [(start, len(through))]) for start, through in turns))

    def _misplaced(self, messages: Sequence[Message], asked: str, written: str, line: int) -> BadRow | None:
        """What of a conversation does not reach the rendering, or what would be trained on that the assistant does not say."""
        place, said = len(messages) - 1, messages[-1]
        for number, message in enumerate(messages[:-1]):
            if lost := dropped(message, asked, place=number, answer=False, line=line):
                return lost
        added = written.removeprefix(asked)
        if lost := dropped(said, added, place=place, answer=True, line=line):
            return lost
        content = said["content"]
        if (
            not isinstance(content, str)
            or not content.strip()
            or said.keys() > {"role", "content"}
            or not self._asks_alike(messages, asked)
        ):
            return None
        around = "".join(added.partition(content.strip())[::2])
        for name in self._names:
            around = around.replace(name, "")
        if content.strip() not in added or not around.strip():
            return None  # as with Mistral's: an answer begins right behind what is asked
        return BadRow(
            what=f"the chat template of {self._tokenizer.name_or_path!r} ignores add_generation_prompt, so the mark of a turn would be "
            "trained on with what is said",
            remedy="let the template end with {% if add_generation_prompt %} and the beginning of an answer, put {% generation %} tags "
            "into it, or name another with --data.tokenizer-chat-template",
            line=line,
            detail=f"message {place} is written {shown(added)}",
        )

    def _asks_alike(self, messages: Sequence[Message], asked: str) -> bool:
        """Whether a conversation that asks for an answer is rendered as one that does not. One is looked at: templates tell all alike."""
        if self._ignores is None:
            self._ignores = self.rendered(messages[:-1], prompting=False) == asked
        return self._ignores

    def _ended(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Spans that end with the end tokens behind what is said, and with nothing that a template puts behind those."""
        ended = [(start, self._end_of(ids, start, end)) for start, end in spans]
        start, end = ended[-1]
        if ids[end - 1] not in self._special:
            ids, end = [*ids[:end], self._eos], end + 1
            ended[-1] = (start, end)
        return ids, ended

    def _end_of(self, ids: list[int], start: int, end: int) -> int:
        """Behind the last word come white space, perhaps, and end tokens: the first run of them ends the answer."""
        said = next((at for at in range(end - 1, start - 1, -1) if not self._blank(ids[at])), start - 1) + 1
        at = next((at for at in range(said, end) if ids[at] in self._special), end)
        if at == end:  # tags may leave the end token outside
            return end + 1 if ids[end : end + 1] == [self._eos] else said
        return next((after for after in range(at, end) if ids[after] not in self._special), end)

    def _blank(self, token: int) -> bool:
        """Whether a token says nothing: a special one, or white space."""
        return token in self._special or not str(self._tokenizer.decode(token)).strip()

    def rendered(self, messages: Sequence[Message], *, prompting: bool, **given: Any) -> str:
        """The text of a conversation, asking for an answer or not; `given` to the template on top of the configuration's."""
        text = self._tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", [dict(message) for message in messages]),
            tokenize=False,
            add_generation_prompt=prompting,
            **{**self._given, **given},
        )
        assert isinstance(text, str)
        return text


def cut(row: TokenRow, max_len: int) -> TokenRow | None:
    """The row's first `max_len` tokens, ending with one that is trained on; None where none is left."""
    kept = row.trained[:max_len].rstrip(b"\0")
    return TokenRow(tokens=row.tokens[: len(kept)], trained=kept) if len(kept) > 1 else None


def _row(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> TokenRow:
    trained = bytearray(len(ids))
    for start, end in spans:
        trained[start:end] = b"\1" * (end - start)
    kept = bytes(trained).rstrip(b"\0")
    return TokenRow(tokens=array("i", ids[: len(kept)]), trained=kept)


def _messages(side: str | Sequence[Message], role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": side},) if isinstance(side, str) else tuple(side)


def filled(documents: Iterator[tuple[str, int, list[int]]], max_len: int) -> Iterator[tuple[str, int, tuple[TokenRow, ...]]]:
    """Documents (uid, line, ids) laid into samples of at most `max_len` tokens, each of which is called after its first.

    A document that is longer goes on in the next sample; no row holds parts of two, so nothing attends across documents.
    """
    rows: list[TokenRow] = []
    name: tuple[str, int] | None = None
    room = max_len
    for uid, line, ids in documents:
        while len(ids) > 1:
            # A document that fits whole is not parted; of a longer one, no scrap ends up at the end of a sample.
            if room < len(ids) and (len(ids) <= max_len or room < max(2, max_len // 8)) and room < max_len:
                assert name is not None
                yield (*name, tuple(rows))
                rows, name, room = [], None, max_len
            part, ids = ids[:room], ids[room:]
            rows.append(TokenRow(tokens=array("i", part), trained=b"\1" * len(part)))
            name, room = name or (uid, line), room - len(part)
    if name is not None:
        yield (*name, tuple(rows))
