"""Each prompt with the answer of another: the rows KTO's anchor is measured on, chosen once for all the data."""

from array import array
from collections.abc import Sequence

from hone.datasets.errors import DataError
from hone.datasets.labelled import Drawable, TokenRow
from hone.datasets.lazy import Lazy

UNKNOWN = -1


def prompt_of(row: TokenRow) -> tuple[int, ...]:
    """The tokens before the first that is trained on."""
    return tuple(row.tokens[: row.trained.index(b"\1")])


class Mismatched(Lazy[TokenRow]):
    """For each sample its prompt with the answer of the next whose prompt differs, so that no batch is too small for it.

    Rows are put together, and the other samples looked for, when they are asked for; only their places are held. Raises DataError
    where all prompts are the same.
    """

    def __init__(self, samples: Drawable, max_len: int) -> None:
        self._samples, self._max_len = samples, max_len
        self._others = array("q", [UNKNOWN]) * len(samples)
        every = iter(samples)
        first = prompt_of(next(every).rows[0])
        if all(prompt_of(sample.rows[0]) == first for sample in every):
            raise DataError("all prompts are the same, so no prompt can be joined with another one's answer, which KTO's anchor needs")

    def __len__(self) -> int:
        return len(self._samples)

    def ready(self, places: Sequence[int]) -> None:
        """Have the samples of these rows, and those that most likely go with them, made in one go."""
        nexts = [(place + 1) % len(self) if self._others[place] == UNKNOWN else self._others[place] for place in places]
        self._samples.unusable([*places, *nexts])

    def _at(self, index: int) -> TokenRow:
        prompt, answered = prompt_of(self._samples[index].rows[0]), self._samples[self.other(index)].rows[0]
        answer = answered.tokens[len(prompt_of(answered)) :]
        tokens = (array("i", prompt) + answer)[: self._max_len]
        return TokenRow(tokens=tokens, trained=bytes(len(prompt)) + b"\1" * (len(tokens) - len(prompt)))

    def other(self, index: int) -> int:
        """The next sample that can be used and has another prompt, the first coming after the last."""
        if self._others[index] == UNKNOWN:
            prompt, same = prompt_of(self._samples[index].rows[0]), [index]
            other = (index + 1) % len(self)
            while other in self._samples.unusable([other]) or prompt_of(self._samples[other].rows[0]) == prompt:
                same.append(other)
                other = (other + 1) % len(self)
            for place in same:
                self._others[place] = other
        return self._others[index]
