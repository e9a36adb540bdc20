"""A micro-batch's rows on a ring of ranks: short rows whole on one rank, long ones cut so that every rank has as much to do.

T tokens of the micro-batch, k ranks of the ring, S tokens that this rank runs the transformer on. Every rank makes the same
`Cut` from the rows' lengths alone; a `Piece` is one rank's part of it. Whole rows cost no communication; cut ones lie in 2k
chunks as `attention/ring.py` has it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hone.learner.attention.ring import Ring
from hone.learner.attention.ring_flash import FlashRing, flash_ring
from hone.learner.attention.varlen import row_arguments
from hone.learner.attention.wire import GroupWire, Wire
from hone.learner.packing import HIDDEN_SIZE, cost

BALANCE = 1.08
"""Work of the busiest rank over the mean, above which one more row is cut: cutting it costs communication in every layer, so a
micro-batch may wait for its busiest rank for a twelfth of its time. At 1.05 up to twice as many rows are cut."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where rows lie.

    `whole[r]` lists the rows that rank r holds alone, `long` those that are cut, and `chunks[i]` has the lengths of the 2k
    chunks of `long[i]` [tokens].
    """

    whole: tuple[tuple[int, ...], ...]
    long: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank runs the transformer on.

    `index` has the place in the micro-batch of each of this rank's tokens: rows it holds alone, then its chunks.
    `places` is the inverse, -1 for tokens of other ranks. `rows` bounds the rows it holds alone; `ring` is None where no row
    is cut. Of ring-flash-attn, all of its tokens are the ring's, and the last of them may be padding.
    """

    index: Int[Tensor, " S"]
    places: Int[Tensor, " T"]
    rows: Int[Tensor, " n_plus_1"]
    ring: Ring | FlashRing | None
    held: int
    """S less padding at the end, so 0 of a rank with no tokens of its own: what it runs is no result."""

    def row_arguments(self) -> dict[str, Any]:
        """Keyword arguments for a transformers model's forward over this rank's tokens; see `varlen.row_arguments`."""
        return {**row_arguments(self.rows), "ring": self.ring}


def piece_for(
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    wire: Wire,
    impl: Literal["own", "ring-flash-attn"],
    head_stride: int | None,
    max_tokens: int,
    hidden_size: int = HIDDEN_SIZE,
) -> Piece:
    """What the calling rank holds of a micro-batch, as `--ds.ring-attn-impl` has it; the rest as in `cut_rows`, `piece_of`."""
    if impl == "ring-flash-attn":
        assert isinstance(wire, GroupWire), "the package takes a process group"
        return slice_of(cu_seqlens, wire=wire, head_stride=head_stride)
    cut = cut_rows(cu_seqlens.diff().tolist(), size=wire.size, max_tokens=max_tokens, hidden_size=hidden_size)
    return piece_of(cut, cu_seqlens, wire=wire, head_stride=head_stride)


def slice_of(cu_seqlens: Int[Tensor, " N_plus_1"], *, wire: GroupWire, head_stride: int | None) -> Piece:
    """The calling rank's run of a micro-batch with row bounds `cu_seqlens`, of as many tokens as every rank's, on their device.

    For that, a last row of padding repeats the micro-batch's first token; nobody reads its results.
    """
    bounds, device = cu_seqlens.to("cpu", torch.int32), cu_seqlens.device
    total = int(bounds[-1])
    share = -(-total // wire.size)
    if total % wire.size:
        bounds = torch.cat([bounds, torch.tensor([share * wire.size], dtype=torch.int32)])
    start = wire.rank * share
    held = min(share, max(0, total - start))
    index, places = torch.zeros(share, dtype=torch.long), torch.full((total,), -1)
    index[:held] = torch.arange(start, start + held)
    places[start : start + held] = torch.arange(held)
    ring = flash_ring(bounds, wire=wire, head_stride=head_stride, device=device)
    none_alone = torch.zeros(1, dtype=torch.int32, device=device)
    return Piece(index=index.to(device), places=places.to(device), rows=none_alone, ring=ring, held=held)


def cut_rows(lengths: Sequence[int], *, size: int, max_tokens: int, hidden_size: int = HIDDEN_SIZE) -> Cut:
    """Rows over `size` ranks: as few as possible of them cut, the longest.

    Work is `packing.cost` at `hidden_size`. A row is cut when its work exceeds a rank's share, and more are until no rank has
    more than `BALANCE` times its share of the work, nor more than `max_tokens` tokens; but none of fewer than 2k tokens, which
    have no token for every chunk.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    costs = cost(np.asarray(lengths, dtype=np.int64), hidden_size=hidden_size).tolist()
    share = sum(costs) / size
    can_be_cut = sum(length >= 2 * size for length in lengths)
    cuts = sum(lengths[row] >= 2 * size and costs[row] > share for row in longest_first)
    while True:
        cut = _place(lengths, costs, longest_first[:cuts], longest_first[cuts:], size)
        tokens, work = _loads(cut, lengths, costs, size)
        if cuts == can_be_cut or (max(tokens) <= max_tokens and max(work) <= BALANCE * share):
            return cut
        cuts += 1


def piece_of(cut: Cut, cu_seqlens: Int[Tensor, " N_plus_1"], *, wire: Wire, head_stride: int | None) -> Piece:
    """What the calling rank holds of a micro-batch with row bounds `cu_seqlens`, on their device.

    A rank with no tokens of its own gets the micro-batch's first, as a row of one whose results nobody reads: every rank then
    runs every layer.
    """
    starts, rank, device = cu_seqlens.tolist(), wire.rank, cu_seqlens.device
    alone = [torch.arange(starts[row], starts[row + 1]) for row in cut.whole[rank]]
    chunks = []
    for chunk in (rank, 2 * wire.size - 1 - rank):
        for row, sizes in zip(cut.long, cut.chunks, strict=True):
            start = starts[row] + sum(sizes[:chunk])
            chunks.append(torch.arange(start, start + sizes[chunk]))
    own = torch.cat([*alone, *chunks]) if alone or chunks else torch.zeros(0, dtype=torch.long)
    places = torch.full((starts[-1],), -1)
    places[own] = torch.arange(len(own))
    held = len(own)
    if not held:
        own, alone = torch.zeros(1, dtype=torch.long), [torch.zeros(1, dtype=torch.long)]
    rows = [0, *accumulate(len(row) for row in alone)]
    by_chunk = tuple(zip(*cut.chunks, strict=True))
    ring = Ring(wire=wire, chunks=by_chunk, whole=rows[-1], head_stride=head_stride, device=device) if cut.long else None
    bounds = torch.tensor(rows, dtype=torch.int32, device=device)
    return Piece(index=own.to(device), places=places.to(device), rows=bounds, ring=ring, held=held)


def _place(lengths: Sequence[int], costs: Sequence[float], long: Sequence[int], short: Sequence[int], size: int) -> Cut:
    """Long rows cut evenly; short ones, longest first, each to the rank that has least to do."""
    tokens = [0] * size
    chunks = []
    for row in long:
        even, left = divmod(lengths[row], 2 * size)
        sizes = [even] * (2 * size)
        for _ in range(left):  # a token more to a chunk of the rank that has fewest, at most one each
            chunk = min((one for one in range(2 * size) if sizes[one] == even), key=lambda one: (tokens[_holder(one, size)], one))
            sizes[chunk] += 1
            tokens[_holder(chunk, size)] += 1
        chunks.append(tuple(sizes))
    loads = [(float(extra), rank) for rank, extra in enumerate(tokens)]
    heapq.heapify(loads)
    whole: list[list[int]] = [[] for _ in range(size)]
    for row in short:
        load, rank = heapq.heappop(loads)
        whole[rank].append(row)
        heapq.heappush(loads, (load + costs[row], rank))
    return Cut(whole=tuple(tuple(sorted(rows)) for rows in whole), long=tuple(long), chunks=tuple(chunks))


def _loads(cut: Cut, lengths: Sequence[int], costs: Sequence[float], size: int) -> tuple[list[int], list[float]]:
    """Tokens and work of every rank; a cut row's work is spread as its tokens are, which zigzag makes true of attention, too."""
    tokens = [sum(lengths[row] for row in rows) for rows in cut.whole]
    work = [sum((costs[row] for row in rows), start=0.0) for rows in cut.whole]
    for row, sizes in zip(cut.long, cut.chunks, strict=True):
        for chunk, length in enumerate(sizes):
            tokens[_holder(chunk, size)] += length
            work[_holder(chunk, size)] += costs[row] * length / lengths[row]
    return tokens, work


def _holder(chunk: int, size: int) -> int:
    """The rank that holds a chunk."""
    return min(chunk, 2 * size - 1 - chunk)
