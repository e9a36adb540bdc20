"""Each prompt with the answer of another: the rows KTO's anchor is measured on, chosen once for all the data."""

from array import array

from hone.datasets.errors import DataError
from hone.datasets.labelled import Drawable, TokenRow
from hone.datasets.lazy import Lazy


def prompt_of(row: TokenRow) -> tuple[int, ...]:
    """The tokens before the first that is trained on."""
    return tuple(row.tokens[: row.trained.index(b"\1")])


class Mismatched(Lazy[TokenRow]):
    """For each sample its prompt with the answer of the next whose prompt differs, so that no batch is too small for it.

    Rows are put together when they are asked for; only the places of the other samples are held. Raises DataError where all prompts
    are the same.
    """

    def __init__(self, samples: Drawable, max_len: int) -> None:
        self._samples, self._max_len = samples, max_len
        self._others = array("q", bytes(8 * len(samples)))
        first = last = prompt_of(samples[0].rows[0])
        begins: list[int] = []
        for place, sample in enumerate(samples):
            prompt = prompt_of(sample.rows[0])
            if prompt != last:
                self._point(begins, place)
                begins, last = [], prompt
            begins.append(place)
        # Those at the end go on from the start.
        wrapped = 0 if last != first else self._others[0]
        if len(begins) == len(samples):
            raise DataError("all prompts are the same, so no prompt can be joined with another one's answer, which KTO's anchor needs")
        self._point(begins, wrapped)

    def __len__(self) -> int:
        return len(self._samples)

    def _at(self, index: int) -> TokenRow:
        prompt, answered = prompt_of(self._samples[index].rows[0]), self._samples[self._others[index]].rows[0]
        answer = answered.tokens[len(prompt_of(answered)) :]
        tokens = (array("i", prompt) + answer)[: self._max_len]
        return TokenRow(tokens=tokens, trained=bytes(len(prompt)) + b"\1" * (len(tokens) - len(prompt)))

    def _point(self, places: list[int], other: int) -> None:
        for place in places:
            self._others[place] = other
