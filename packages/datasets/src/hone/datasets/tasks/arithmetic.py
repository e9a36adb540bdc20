"""The built-in verifiable task: sums such as "7+8=", their labels, their judge, and the tiny model's tokenizer and corpus.

Everything follows from a seed. Importing this file costs milliseconds: the reward worker does.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hone.datasets.records import Row, Source

if TYPE_CHECKING:
    import transformers

Item = TypeVar("Item")

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-= "
# The whole response: one integer, then nothing but special tokens such as <eos>. 18 digits keep int() cheap and exact.
ANSWER = re.compile(r"\s*(-?[0-9]{1,18})\s*(?:<[^<>\s]+>\s*)*")


class Problem(NamedTuple):
    """A prompt and the integer that answers it."""

    prompt: str
    label: int


def problems(seed: int, count: int, *, largest_term: int = 9) -> list[Problem]:
    """`count` sums, drawn uniformly (with repetition) from all pairs of terms up to `largest_term`, the second at least 1."""
    if count < 1 or largest_term < 1:
        raise ValueError(f"count is {count} and largest_term {largest_term}; both must be at least 1")
    generator = random.Random(f"arithmetic:{seed}")
    pairs = _pairs(largest_term)
    return [_problem(*_pick(generator, pairs)) for _ in range(count)]


def source(seed: int, count: int, *, largest_term: int = 9) -> Source:
    """The same problems as rows with the columns "prompt" and "label", counted as lines from 1."""
    drawn = problems(seed, count, largest_term=largest_term)
    digest = hashlib.blake2b(repr([tuple(problem) for problem in drawn]).encode(), digest_size=16)
    rows = tuple(Row(line=line, columns=problem._asdict()) for line, problem in enumerate(drawn, 1))
    return Source(name="the built-in arithmetic task", fingerprint=digest.hexdigest(), rows=rows)


def imperfect_corpus(seed: int, count: int, *, wrong: int, of: int, largest_term: int = 9) -> list[tuple[str, str]]:
    """(prompt, response) pairs to make the small model from; of every `of` responses to a sum, `wrong` have the wrong sign.

    Sparse reward teaches a tiny model nothing new, but it moves a choice between answers the model already gives: so it
    learns both here. The pairs are dealt from shuffled decks that hold every sum `of` times, which keeps the shares exact.
    """
    if not 0 <= wrong <= of or of < 1:
        raise ValueError(f"wrong is {wrong} and of is {of}; wrong must be in [0, of], and of at least 1")
    generator = random.Random(f"arithmetic errors:{seed}")
    deck = [(_problem(left, right), place < wrong) for left, right in _pairs(largest_term) for place in range(of)]
    corpus: list[tuple[str, str]] = []
    while len(corpus) < count:
        dealt = sorted(deck, key=lambda _: generator.random())
        corpus += [(problem.prompt, str(-problem.label if negated else problem.label)) for problem, negated in dealt]
    return corpus[:count]


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object]) -> dict[str, object]:
    """1 for a response that is exactly the label's integer, else 0; a query is its prompt and the response, special tokens kept.

    `extra_logs` has "answered": 1 where the response is an integer at all. Raises ValueError for a query without its
    prompt and for a label that is no integer.
    """
    answers = [_answer(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    scores = [float(answer == _integer(label)) for answer, label in zip(answers, labels, strict=True)]
    return {"rewards": scores, "scores": list(scores), "extra_logs": {"answered": [float(answer is not None) for answer in answers]}}


def build_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """The tiny model's tokenizer: a token per character, <pad>, <eos>, <unk> for any other character, no BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def _pairs(largest_term: int) -> list[tuple[int, int]]:
    """All pairs of terms; a second term of 0 is left out, so that no sum is its own negative."""
    return [(left, right) for left in range(largest_term + 1) for right in range(1, largest_term + 1)]


def _problem(left: int, right: int) -> Problem:
    return Problem(f"{left}+{right}=", left + right)


def _pick(generator: random.Random, items: Sequence[Item]) -> Item:
    """One item; from random() alone, whose sequence Python promises to keep between versions."""
    return items[int(generator.random() * len(items))]


def _answer(query: str, prompt: str) -> int | None:
    _, found, response = query.partition(prompt)
    if not found:
        raise ValueError(f"query {query[:80]!r} does not hold its prompt {prompt[:80]!r}; a query is the prompt and the response")
    match = ANSWER.fullmatch(response)
    return int(match[1]) if match else None


def _integer(label: object) -> int:
    try:
        return int(str(label))
    except ValueError as error:
        raise ValueError(
            f"label {label!r} is not an integer; the arithmetic task judges integers (name another --reward.remote-url)"
        ) from error
