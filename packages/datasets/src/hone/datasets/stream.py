"""Draws: which prompts each step gets, fixed by the seed, countable beforehand, and resumable from a few numbers.

Steps take `batch_size` prompts each from the epochs of an `Order` laid end to end, so a step may span two epochs (its prompts
then still have different ids), and only the last step of all may be smaller. Where rows are tokenised as they are drawn, a row
that cannot be used is passed over, and the next takes its place.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hone.datasets.errors import DataError
from hone.datasets.order import Order
from hone.datasets.records import Dropped, PromptRecord, Records


class Draw(NamedTuple):
    """One prompt drawn for one step; `prompt_id` is "<fingerprint>:<epoch>:<index>", unique in a run (and "...:<n>" the n-th time more)."""

    prompt_id: str
    record: PromptRecord


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a stream stands: `drawn` places of the order have been used up since the start of the run."""

    fingerprint: str
    batch_size: int
    seed: int
    num_episodes: int
    drawn: int


class PromptStream:
    """An iterator over steps, each a list of draws; `sizes` and `weights` as in a PromptSet."""

    def __init__(
        self,
        records: Sequence[PromptRecord] | Records,
        *,
        batch_size: int,
        seed: int,
        num_episodes: int,
        drawn: int = 0,
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        for name, value in (("--rollout.batch-size", batch_size), ("--train.num-episodes", num_episodes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not len(records):
            raise DataError("there is no prompt to draw: the data has no usable row")
        self._records = records if isinstance(records, Records) else _Listed(records)
        self._fingerprint = mixture(self._records.fingerprint, sizes, weights)
        self._batch_size, self._seed, self._num_episodes, self._drawn = batch_size, seed, num_episodes, drawn
        self._order = Order(sizes if weights else (len(records),), weights, seed=seed, episodes=num_episodes)
        self._passed_over: dict[str, Dropped] = {}

    @classmethod
    def from_state(
        cls,
        state: StreamState,
        records: Sequence[PromptRecord] | Records,
        *,
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> "PromptStream":
        """The stream that goes on where `state` was taken. Raises DataError when the records are not those it was drawn from."""
        stream = cls(
            records,
            batch_size=state.batch_size,
            seed=state.seed,
            num_episodes=state.num_episodes,
            drawn=state.drawn,
            sizes=sizes,
            weights=weights,
        )
        if stream._fingerprint != state.fingerprint:
            raise DataError(
                f"the data has changed since the run was saved: fingerprint {stream._fingerprint} now, {state.fingerprint} then "
                f"({len(records)} prompts now); give back the same file, template, tokenizer and --data settings, or start a new run"
            )
        return stream

    @property
    def steps(self) -> int:
        """Steps of the whole run, those already taken included; fewer where rows are passed over."""
        return math.ceil(len(self._order) / self._batch_size)

    @property
    def passed_over(self) -> tuple[Dropped, ...]:
        """The rows that this stream came upon and could not use, in the order it did."""
        return tuple(self._passed_over.values())

    def state(self) -> StreamState:
        """Where the stream stands after the last step it handed out."""
        return StreamState(
            fingerprint=self._fingerprint,
            batch_size=self._batch_size,
            seed=self._seed,
            num_episodes=self._num_episodes,
            drawn=self._drawn,
        )

    def __iter__(self) -> Iterator[list[Draw]]:
        return self

    def __next__(self) -> list[Draw]:
        if not (draws := self.draw(self._batch_size)):
            raise StopIteration
        return draws

    def draw(self, count: int) -> list[Draw]:
        """The next `count` prompts, or as many as are left."""
        draws: list[Draw] = []
        while len(draws) < count and self._drawn < len(self._order):
            start, self._drawn = self._drawn, min(self._drawn + count - len(draws), len(self._order))
            draws.extend(self._at(range(start, self._drawn)))
        return draws

    def drawn_before(self, prompt_ids: Collection[str]) -> list[Draw]:
        """Prompts that were drawn already, the latest first. Raises DataError for ids that were not."""
        wanted, found = set(prompt_ids), list[Draw]()
        for end in range(self._drawn, 0, -self._batch_size):
            if len(found) == len(wanted):
                break
            draws = self._at(range(max(0, end - self._batch_size), end))
            found.extend(draw for draw in reversed(draws) if draw.prompt_id in wanted)
        if missing := wanted - {draw.prompt_id for draw in found}:
            raise DataError(f"{len(missing)} prompts that the saved run had under way are not in the data, {min(missing)} among them")
        return found

    def _at(self, positions: range) -> list[Draw]:
        """What the draws at these positions of the order draw; rows that cannot be used are passed over."""
        places, draws = [self._order[position] for position in positions], list[Draw]()
        for place, record in zip(places, self._records.take([place.row for place in places]), strict=True):
            if isinstance(record, Dropped):
                self._passed_over.setdefault(record.uid, record)
                continue
            fingerprint, index = record.uid.split(":")
            again = f":{place.again}" if place.again else ""
            draws.append(Draw(prompt_id=f"{fingerprint}:{place.epoch}:{index}{again}", record=record))
        return draws


class _Listed:
    """Records that are all there."""

    def __init__(self, records: Sequence[PromptRecord]) -> None:
        self._records = tuple(records)
        digest = hashlib.blake2b(digest_size=8)
        for record in self._records:
            seen = " ".join(image.digest for image in record.images)
            digest.update(f"{record.uid} {record.tokens}{seen and ' '}{seen}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[PromptRecord | Dropped]:
        return iter(self._records)

    def take(self, rows: Sequence[int]) -> list[PromptRecord | Dropped]:
        """The prompts of these rows."""
        return [self._records[row] for row in rows]


def mixture(fingerprint: str, sizes: Sequence[int], weights: Sequence[float]) -> str:
    """A fingerprint with that of the weights, which decide the order, too; `sizes` are the rows of the datasets that have them."""
    if not weights:
        return fingerprint
    return hashlib.blake2b(f"{fingerprint} {tuple(sizes)} {tuple(weights)}".encode(), digest_size=8).hexdigest()
