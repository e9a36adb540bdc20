"""Rows into micro-batches under a hard token cap, balanced over ranks, the same number of micro-batches on every rank.

Flow: Batch --shards--> one Shard per rank --(learner)--> one flat array per rank --unshard--> [T] in the batch's own order.
A rank with fewer micro-batches than the others repeats one of its rows as a filler, whose weights the learner sets to
zero: collectives then match and the loss does not change. Everything here is deterministic.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hone.algos.batch import Batch, select

LINEAR_TOKENS = 49_152
"""Row length [tokens] at which attention costs as much as all linear layers, 12 x hidden size (here of 4,096)."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank works on: its rows, and how they fall into micro-batches.

    `micro_batches` and `fillers` index the rows of `batch` and the micro-batches; `rows[i]` is the place of row i in the
    whole batch.
    """

    batch: Batch
    micro_batches: tuple[tuple[int, ...], ...]
    fillers: frozenset[int]
    rows: tuple[int, ...]


def plan(lengths: Sequence[int], *, ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Rank -> micro-batch -> row indices; every row once, then fillers until all ranks have the same number.

    Raises ValueError for a row longer than `max_tokens`, for no rows, and for lengths, ranks or a cap below 1.
    """
    return _with_fillers(_without_fillers(lengths, ranks=ranks, max_tokens=max_tokens), lengths)


def shards(batch: Batch, *, ranks: int, max_tokens: int) -> list[Shard]:
    """The batch cut for `ranks` ranks, each micro-batch at most `max_tokens` tokens. Raises as `plan`."""
    lengths = batch.lengths.tolist()
    real = _without_fillers(lengths, ranks=ranks, max_tokens=max_tokens)
    result = []
    for without, micro_batches in zip(real, _with_fillers(real, lengths), strict=True):
        rows = sorted({row for micro_batch in micro_batches for row in micro_batch})
        local = {row: index for index, row in enumerate(rows)}
        result.append(
            Shard(
                batch=select(batch, rows),
                micro_batches=tuple(tuple(local[row] for row in micro_batch) for micro_batch in micro_batches),
                fillers=frozenset(range(len(without), len(micro_batches))),
                rows=tuple(rows),
            )
        )
    return result


def unshard(parts: Sequence[Shard], arrays: Sequence[Tensor], *, cu_seqlens: Int[Tensor, " N_plus_1"]) -> Tensor:
    """Per-token results of each rank, flat in its shard's row order, back in the order of the batch `cu_seqlens` belongs to.

    Raises ValueError where the number or the length of the arrays does not fit the shards.
    """
    if len(parts) != len(arrays):
        raise ValueError(f"{len(arrays)} arrays for {len(parts)} shards; hand in one per rank, in rank order")
    starts = cu_seqlens.tolist()
    result = torch.zeros(starts[-1], dtype=arrays[0].dtype)
    for rank, (shard, array) in enumerate(zip(parts, arrays, strict=True)):
        bounds = shard.batch.cu_seqlens.tolist()
        if array.shape != (bounds[-1],):
            raise ValueError(f"rank {rank} returned {tuple(array.shape)} values for the {bounds[-1]} tokens of its shard")
        for index, micro_batch in enumerate(shard.micro_batches):
            # A filler may repeat a row that belongs to another rank, and its results mean nothing.
            for row in () if index in shard.fillers else micro_batch:
                start = starts[shard.rows[row]]
                result[start : start + bounds[row + 1] - bounds[row]] = array[bounds[row] : bounds[row + 1]]
    return result


def _cost(length: int) -> float:
    """Work of a row, in units of a token's linear layers: attention adds a share that grows with the length."""
    return length * (1 + length / LINEAR_TOKENS)


def _without_fillers(lengths: Sequence[int], *, ranks: int, max_tokens: int) -> list[list[list[int]]]:
    if not lengths:
        raise ValueError("no rows to plan: every prompt of the step was dropped")
    if ranks < 1 or max_tokens < 1 or min(lengths) < 1:
        raise ValueError(f"ranks {ranks}, max_tokens {max_tokens} and the shortest row {min(lengths)} must all be at least 1")
    if max(lengths) > max_tokens:
        raise ValueError(
            f"a row of {max(lengths)} tokens does not fit a micro-batch of {max_tokens}; "
            "raise --train.max-tokens-per-gpu or lower --rollout.max-new-tokens"
        )
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    loads = [(0.0, rank) for rank in range(ranks)]
    per_rank: list[list[int]] = [[] for _ in range(ranks)]
    for row in longest_first:
        load, rank = heapq.heappop(loads)
        per_rank[rank].append(row)
        heapq.heappush(loads, (load + _cost(lengths[row]), rank))
    return [_bins(rows, lengths, max_tokens) for rows in per_rank]


def _bins(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows, longest first, each into the fullest micro-batch it still fits (best fit decreasing, O(n log n))."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the micro-batch), ascending
    for row in rows:
        place = bisect.bisect_left(room, (lengths[row], -1))
        if place < len(room):
            left, index = room.pop(place)
        else:
            left, index = capacity, len(bins)
            bins.append([])
        bins[index].append(row)
        bisect.insort(room, (left - lengths[row], index))
    return [sorted(rows_of_bin) for rows_of_bin in bins]


def _with_fillers(micro_batches: list[list[list[int]]], lengths: Sequence[int]) -> list[list[list[int]]]:
    count = max(len(of_rank) for of_rank in micro_batches)
    shortest = min(range(len(lengths)), key=lambda row: (lengths[row], row))
    result = []
    for of_rank in micro_batches:
        own = [row for micro_batch in of_rank for row in micro_batch]
        filler = min(own, key=lambda row: (lengths[row], row)) if own else shortest
        result.append([*of_rank, *([filler] for _ in range(count - len(of_rank)))])
    return result
