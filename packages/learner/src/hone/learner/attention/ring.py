"""How rows lie on a ring of k ranks, who computes what there, and what travels.

A long row lies on the ring in 2k chunks, of which rank r holds an early one, r, and a late one, 2k - 1 - r, so that causal
attention is the same work for all (zigzag). A rank's states hold the early chunks of all rows, then the late ones. Rank r
needs of rank j the early chunks, and the late ones where j >= r: only these travel, straight from their owner, and so do
gradients on their way back. S tokens travel, of T; g key heads, d head size; keys and values are stacked.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from hone.learner.attention.blocks import Block
from hone.learner.attention.wire import Wire


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The cut rows of one micro-batch: `chunks[c]` has the length of every row's chunk c [tokens], none of them 0.

    `whole` tokens come before this rank's share of them: rows it holds alone. `head_stride` chooses the all-gather form,
    with that many key heads at a time.
    """

    wire: Wire
    chunks: tuple[tuple[int, ...], ...]
    whole: int
    head_stride: int | None
    device: torch.device

    def early(self, rank: int) -> tuple[int, ...]:
        """Lengths of the early chunks of `rank`, one per row."""
        return self.chunks[rank]

    def late(self, rank: int) -> tuple[int, ...]:
        """Lengths of the late chunks of `rank`, one per row."""
        return self.chunks[2 * self.wire.size - 1 - rank]

    def tokens(self, owner: int, reader: int) -> int:
        """How many of `owner`'s tokens `reader` needs, the first so many of them."""
        return sum(self.early(owner)) + (sum(self.late(owner)) if owner >= reader else 0)

    @cached_property
    def pool(self) -> list[tuple[int, slice]]:
        """The order of gathered keys, as (owner, which of its tokens): early chunks of all ranks, then late ones, so by position."""
        rank, size = self.wire.rank, self.wire.size
        bounds = [(sum(self.early(owner)), self.tokens(owner, owner)) for owner in range(size)]
        late = [(owner, slice(*bounds[owner])) for owner in range(size - 1, rank - 1, -1)]
        return [*((owner, slice(0, bounds[owner][0])) for owner in range(size)), *late]

    @cached_property
    def views(self) -> tuple[tuple[slice, Tensor, Block], tuple[slice, Tensor, Block]]:
        """Early and late: (queries, which of the gathered keys they see, row by row, and how)."""
        rank, size, rows = self.wire.rank, self.wire.size, len(self.chunks[0])
        flat = list(accumulate((length for chunk in self.chunks[: 2 * size - rank] for length in chunk), initial=0))
        starts = [flat[chunk * rows : (chunk + 1) * rows] for chunk in range(2 * size - rank)]  # in the pool, of every row
        result, seen_by = [], {rank: slice(0, sum(self.early(rank))), 2 * size - 1 - rank: slice(sum(self.early(rank)), None)}
        for last, queries in seen_by.items():
            spans = [
                torch.arange(starts[chunk][row], starts[chunk][row] + self.chunks[chunk][row])
                for row in range(rows)
                for chunk in range(last + 1)
            ]
            lengths = tuple(sum(sizes) for sizes in zip(*self.chunks[: last + 1], strict=True))
            result.append((queries, torch.cat(spans).to(self.device), Block(self.chunks[last], lengths, causal=True)))
        return result[0], result[1]

    def fetch(self, held: Float[Tensor, "2 T g d"]) -> Iterator[tuple[int, Float[Tensor, "2 S g d"]]]:
        """(owner, its keys and values as far as this rank needs them), this rank's own first; the next ones travel meanwhile."""
        rank, size = self.wire.rank, self.wire.size

        def start(step: int) -> tuple[int, Tensor, Callable[[], None]]:
            reader, owner = (rank - step) % size, (rank + step) % size
            incoming = held.new_empty(2, self.tokens(owner, rank), *held.shape[2:])
            outgoing = held[:, : self.tokens(rank, reader)].contiguous()
            return owner, incoming, self.wire.exchange({reader: outgoing}, {owner: incoming})

        under_way = start(1)
        yield rank, held
        for step in range(2, size + 1):
            owner, incoming, wait = under_way
            wait()
            if step < size:
                under_way = start(step)
            yield owner, incoming

    def fetch_all(self, held: Float[Tensor, "2 T g d"]) -> Callable[[], Float[Tensor, "2 S g d"]]:
        """Starts fetching everything this rank needs; what it returns waits for it, laid out as `pool` has it."""
        rank, others = self.wire.rank, [one for one in range(self.wire.size) if one != self.wire.rank]
        arrived = {owner: held.new_empty(2, self.tokens(owner, rank), *held.shape[2:]) for owner in others}
        wait = self.wire.exchange({reader: held[:, : self.tokens(rank, reader)].contiguous() for reader in others}, arrived)

        def finish() -> Tensor:
            wait()
            parts = {**arrived, rank: held}
            return torch.cat([parts[owner][:, there] for owner, there in self.pool], 1)

        return finish

    def send_home(self, theirs: Mapping[int, Float[Tensor, "2 S g d"]], own: Float[Tensor, "2 T g d"]) -> Callable[[], None]:
        """Starts sending owners the gradients of their keys; what it returns adds those that arrive to `own`.

        The readers of this rank's keys, whose gradients arrive, stand as far below it as the owners in `theirs` stand above.
        """
        rank, size = self.wire.rank, self.wire.size
        readers = [(2 * rank - owner) % size for owner in theirs]
        first = next(iter(theirs.values()))
        arrived = {reader: first.new_empty(2, self.tokens(rank, reader), *own.shape[2:]) for reader in readers}
        wait = self.wire.exchange({owner: gradient.contiguous() for owner, gradient in theirs.items()}, arrived)

        def finish() -> None:
            wait()
            for gradient in arrived.values():
                own[:, : gradient.shape[1]] += gradient

        return finish

    def pairs(self, owner: int) -> list[tuple[slice, slice, Block]]:
        """What this rank computes with an owner's keys: (queries, keys, how), in chunks of all rows."""
        rank = self.wire.rank
        queries, keys = ({"early": sum(self.early(one)), "all": self.tokens(one, one)} for one in (rank, owner))
        early, late = slice(0, queries["early"]), slice(queries["early"], queries["all"])
        their_early, their_late = slice(0, keys["early"]), slice(keys["early"], keys["all"])
        late_sees_early = (late, their_early, Block(self.late(rank), self.early(owner), causal=False))
        early_sees_early = (early, their_early, Block(self.early(rank), self.early(owner), causal=owner == rank))
        late_sees_late = (late, their_late, Block(self.late(rank), self.late(owner), causal=owner == rank))
        if owner < rank:
            return [early_sees_early, late_sees_early]
        return [late_sees_early, late_sees_late] if owner > rank else [early_sees_early, late_sees_early, late_sees_late]
