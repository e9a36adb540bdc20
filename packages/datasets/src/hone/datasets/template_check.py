"""What a chat template does to sample conversations: whether what is trained on is what the policy will be asked for and will say.

Every check is one line: ok, or what is wrong and what follows from it. `bad` checks are those that silently spoil training.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hone.datasets.errors import BadRow, shown
from hone.datasets.exchanges import TAGS, Encoder
from hone.datasets.labelled import Exchange, TokenRow
from hone.datasets.offline_config import SFTData
from hone.datasets.records import Message
from hone.datasets.templates import template_errors

if TYPE_CHECKING:
    import transformers

QUESTION, FIRST, AGAIN, SECOND = "How many legs have two cats?", "They have eight.", "And three?", "Twelve legs."
TALK: tuple[Message, ...] = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": FIRST},
    {"role": "user", "content": AGAIN},
    {"role": "assistant", "content": SECOND},
)
SYSTEM: Message = {"role": "system", "content": "Answer in a few words."}
THOUGHT = "<think>\nFour legs each.\n</think>\n\n"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the answer."""

    name: str
    bad: bool
    told: str


def checks(tokenizer: "transformers.PreTrainedTokenizerBase", config: SFTData) -> Iterator[Check]:
    """Every check of the template that the configuration gives this tokenizer. Raises TokenizerError where there is none."""
    encoder = Encoder(tokenizer, config)
    sample = _Sample(tokenizer, encoder)
    yield Check(name="template", bad=False, told=_about(tokenizer))
    try:
        yield sample.prefix()
        rows = encoder.encode(Exchange(prompt=(), answer=TALK), line=1)
        if isinstance(rows, BadRow):
            yield Check(name="mask", bad=True, told=f"{rows.what} ({rows.detail}); {rows.remedy}")
        else:
            yield sample.mask(rows.rows)
            yield sample.stop(rows.rows)
            yield sample.same_prompt()
        yield sample.beginning()
        yield sample.system()
        yield sample.history()
        yield sample.thinking()
    except template_errors() as error:
        yield Check(name="rendering", bad=True, told=f"the template refuses a plain conversation: {type(error).__name__}: {error}")


def _about(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    template = str(tokenizer.chat_template)
    marks = "with generation tags" if TAGS.search(template) else "without generation tags: answers are found by their tokens"
    return f"{len(template)} characters, {marks}"


@dataclass(frozen=True)
class _Sample:
    tokenizer: "transformers.PreTrainedTokenizerBase"
    encoder: Encoder

    def prefix(self) -> Check:
        """Whether what the policy is asked with is how the conversation goes on, for every answer of it, by tokens."""
        for place in (1, 3):
            asked, said = self._ids(TALK[:place], asking=True), self._ids(TALK[: place + 1])
            if said[: len(asked)] != asked:
                same = next(at for at, (one, other) in enumerate(zip([*asked, -1], [*said, -2], strict=False)) if one != other)
                told = (
                    f"asked with {self._text(asked[max(0, same - 4) :])}, written as {self._text(said[max(0, same - 4) : len(asked) + 4])}"
                )
                return Check(name="prefix", bad=True, told=f"answer {place // 2 + 1} does not begin where it is asked for: {told}")
        return Check(name="prefix", bad=False, told="every answer begins where it is asked for, token by token")

    def mask(self, rows: Sequence[TokenRow]) -> Check:
        """What is trained on: each answer with one token behind it, and neither question."""
        spans = [span for row in rows for span in self._trained(row)]
        texts = [str(self.tokenizer.decode(span)) for span in spans]
        faults = [f"{text!r} is missing" for text in (FIRST, SECOND) if not any(text in span for span in texts)]
        faults += [f"{text!r}, which the user says, is among it" for text in (QUESTION, AGAIN) if any(text in span for span in texts)]
        for span, text in zip(spans, texts, strict=True):
            said = next((answer for answer in (FIRST, SECOND) if answer in text), None)
            if said is not None and (behind := text.partition(said)[2]) != str(self.tokenizer.decode(span[-1:])):
                faults.append(f"behind {said!r} stands {behind!r}, which is not one end token")
        told = f"trained on: {' | '.join(map(repr, texts))}"
        if len(rows) > 1:
            told += f" (earlier answers are rewritten: {len(rows)} rows of one conversation)"
        return Check(name="mask", bad=bool(faults), told="; ".join([told, *faults]))

    def stop(self, rows: Sequence[TokenRow]) -> Check:
        """The last token that is trained on must be one that ends a generation."""
        last = rows[-1].tokens[-1]
        ends = last == self.tokenizer.eos_token_id
        name, eos = self.tokenizer.convert_ids_to_tokens(last), self.tokenizer.eos_token
        if ends:
            return Check(name="stop token", bad=False, told=f"{name!r}, the tokenizer's EOS, is trained on")
        told = (
            f"{name!r} is trained on, and the tokenizer's EOS is {eos!r}; the model's generation_config must list {last} as an eos_token_id"
        )
        return Check(name="stop token", bad=last not in self.tokenizer.all_special_ids, told=told)

    def beginning(self) -> Check:
        """How often the BOS stands there, tokenised as the programs do, and as with a tokenizer's own special tokens."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return Check(name="BOS", bad=False, told="the tokenizer has none")
        text = self._render(TALK)
        once, twice = self._ids(TALK).count(bos), self.tokenizer(text)["input_ids"][:2] == [bos, bos]  # pyright: ignore[reportIndexIssue, reportArgumentType] - of one text
        told = (
            f"{once} of {self.tokenizer.bos_token!r}" + " (two where a program adds special tokens to rendered text; ours do not)" * twice
        )
        return Check(name="BOS", bad=once > 1, told=told)

    def system(self) -> Check:
        """Whether a system message reaches the policy."""
        try:
            kept = str(SYSTEM["content"]) in self._render((SYSTEM, *TALK))
        except template_errors() as error:
            return Check(name="system message", bad=False, told=f"refused: {error}")
        return Check(name="system message", bad=not kept, told="rendered" if kept else "dropped without a word")

    def history(self) -> Check:
        """What becomes of the thoughts of earlier answers."""
        said: list[Message] = [dict(message) for message in TALK]
        for place, text in ((1, FIRST), (3, SECOND)):
            said[place] = {"role": "assistant", "content": THOUGHT + text}
        text = self._render(said)
        kept = text.count("Four legs each.")
        told = {2: "kept", 1: "dropped from earlier answers: each turn is a training row of its own", 0: "dropped from every answer"}[
            min(kept, 2)
        ]
        return Check(name="thoughts", bad=kept == 0, told=told)

    def thinking(self) -> Check:
        """Whether thinking can be switched, and what the policy is then asked with."""
        on, off = (self._render(TALK[:1], asking=True, enable_thinking=value) for value in (True, False))
        if on == off:
            return Check(name="thinking toggle", bad=False, told="none (enable_thinking changes nothing)")
        same = next((at for at, (one, other) in enumerate(zip(on, off, strict=False)) if one != other), min(len(on), len(off)))
        return Check(name="thinking toggle", bad=False, told=f"enable_thinking true ends {on[same:]!r}, false {off[same:]!r}")

    def same_prompt(self) -> Check:
        """Whether the tokens before a trained answer are those that reinforcement asks with."""
        found = self.encoder.encode(Exchange(prompt=TALK[:3], answer=SECOND), line=1)
        assert not isinstance(found, BadRow), "the whole conversation was encoded"
        row = found.rows[-1]
        before, asked = list(row.tokens[: row.trained.index(b"\1")]), self._ids(TALK[:3], asking=True)
        if before == asked:
            return Check(name="SFT = RL", bad=False, told=f"the same {len(asked)} tokens stand before the answer")
        same = next(at for at, (one, other) in enumerate(zip([*before, -1], [*asked, -2], strict=False)) if one != other)
        told = f"supervised {self._text(before[same:])}, asked {self._text(asked[same:])}"
        return Check(name="SFT = RL", bad=True, told=f"what stands before the answer differs from token {same} on: {told}")

    def _trained(self, row: TokenRow) -> list[list[int]]:
        """The tokens of every stretch that is trained on."""
        stretches = re.finditer(b"\1+", row.trained)
        return [list(row.tokens[stretch.start() : stretch.end()]) for stretch in stretches]

    def _render(self, messages: Sequence[Message], *, asking: bool = False, **given: Any) -> str:
        return self.encoder.rendered(messages, prompting=asking, **given)

    def _ids(self, messages: Sequence[Message], *, asking: bool = False) -> list[int]:
        return list(self.tokenizer(self._render(messages, asking=asking), add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType] - of one text

    def _text(self, ids: Sequence[int]) -> str:
        return shown(str(self.tokenizer.decode(list(ids))))
