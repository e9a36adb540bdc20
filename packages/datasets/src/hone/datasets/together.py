"""Work on rows that needs the ids of texts, done for many rows at a time: what they ask for together is tokenised in one call.

A piece of work is a generator: it yields the texts whose ids it needs, is sent these ids in the same order, and returns its result.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import transformers

Result = TypeVar("Result")


class Text(NamedTuple):
    """A text to be tokenised; `special` says whether the tokenizer puts its BOS (and whatever else) around it."""

    text: str
    special: bool


Ids = list[int]
Work = Generator[Sequence[Text], Sequence[Ids], Result]


def together(works: Iterable[Work[Result]], tokenizer: "transformers.PreTrainedTokenizerBase") -> list[Result]:
    """The results of all works, in order."""
    finished: dict[int, Result] = {}
    waiting: list[tuple[int, Work[Result], Sequence[Text]]] = []
    for number, work in enumerate(works):
        _go_on(number, work, None, finished, waiting)
    while waiting:
        asked, waiting = waiting, []
        ids = _ids_of([text for _, _, texts in asked for text in texts], tokenizer)
        start = 0
        for number, work, texts in asked:
            _go_on(number, work, ids[start : start + len(texts)], finished, waiting)
            start += len(texts)
    return [finished[number] for number in range(len(finished))]


def _go_on(
    number: int,
    work: Work[Result],
    ids: Sequence[Ids] | None,
    finished: dict[int, Result],
    waiting: list[tuple[int, Work[Result], Sequence[Text]]],
) -> None:
    try:
        texts = next(work) if ids is None else work.send(ids)
    except StopIteration as end:
        finished[number] = end.value
    else:
        waiting.append((number, work, texts))


def _ids_of(texts: Sequence[Text], tokenizer: "transformers.PreTrainedTokenizerBase") -> list[Ids]:
    found: list[Ids] = [[] for _ in texts]
    for special in (True, False):
        places = [place for place, one in enumerate(texts) if one.special is special]
        if places:
            for place, ids in zip(places, ids_of([texts[place].text for place in places], tokenizer, special=special), strict=True):
                found[place] = ids
    return found


def ids_of(texts: list[str], tokenizer: "transformers.PreTrainedTokenizerBase", *, special: bool) -> list[Ids]:
    """The ids of many texts; where the tokenizer is one of `tokenizers`, by its own batch call, without offsets and wrappers."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType] - of several texts
    backend = tokenizer.backend_tokenizer
    # What the last call with padding or truncation, or with split special tokens, has left behind.
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]
