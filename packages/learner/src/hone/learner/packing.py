"""Rows into micro-batches under a hard token cap, balanced over ranks, the same number of micro-batches on every rank.

Flow: Batch --shards--> one Shard per rank --(learner)--> one flat array per rank --unshard--> [T] in the batch's own order.
Rows that a loss reads together (the two of a pair) form a unit and are never parted. A rank with too few units for its
micro-batches repeats one as a filler, whose weights the learner sets to zero: collectives then match and the loss does not
change. Everything here is deterministic.
"""

import array
import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hone.algos.batch import Packed, select

HIDDEN_SIZE = 4096
"""Hidden size that costs are reckoned with where the model's own is not given."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank works on: its rows, and how they fall into micro-batches.

    `micro_batches` and `fillers` index the rows of `batch` and the micro-batches; `rows[i]` is the place of row i in the
    whole batch.
    """

    batch: Packed
    micro_batches: tuple[tuple[int, ...], ...]
    fillers: frozenset[int]
    rows: tuple[int, ...]

    @property
    def own_rows(self) -> list[int]:
        """Rows of `batch` that are this rank's to answer for; a filler may bring one that is another's."""
        return [row for index, rows in enumerate(self.micro_batches) if index not in self.fillers for row in rows]


def plan(
    lengths: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    max_rows: int | None = None,
    rows_per_unit: int = 1,
    hidden_size: int = HIDDEN_SIZE,
) -> list[list[list[int]]]:
    """Rank -> micro-batch -> row indices; every row once, then fillers until all ranks have the same number.

    A micro-batch holds at most `max_tokens` tokens and, if given, `max_rows` rows. `rows_per_unit` neighbours stay together.
    Ranks are balanced by `cost` at `hidden_size`; a rank's micro-batches come heaviest first, so that those which
    run at the same time are alike. Raises ValueError for a unit that fits no micro-batch, for no rows, for rows that make no
    whole number of units, and for any number below 1.
    """
    settings = {"max_rows": max_rows, "rows_per_unit": rows_per_unit, "hidden_size": hidden_size}
    return [own + fillers for own, fillers in _planned(lengths, ranks=ranks, max_tokens=max_tokens, **settings)]


def shards(
    batch: Packed,
    *,
    ranks: int,
    max_tokens: int,
    max_rows: int | None = None,
    hidden_size: int = HIDDEN_SIZE,
) -> list[Shard]:
    """The batch cut for `ranks` ranks, as `plan` has it, its pairs whole; raises as `plan`."""
    settings = {"max_rows": max_rows, "rows_per_unit": batch.ROWS_TOGETHER, "hidden_size": hidden_size}
    result = []
    for own, fillers in _planned(batch.lengths.tolist(), ranks=ranks, max_tokens=max_tokens, **settings):
        micro_batches = own + fillers
        rows = sorted({row for micro_batch in micro_batches for row in micro_batch})
        local = {row: index for index, row in enumerate(rows)}
        result.append(
            Shard(
                batch=select(batch, rows),
                micro_batches=tuple(tuple(local[row] for row in micro_batch) for micro_batch in micro_batches),
                fillers=frozenset(range(len(own), len(micro_batches))),
                rows=tuple(rows),
            )
        )
    return result


def unshard(parts: Sequence[Shard], arrays: Sequence[Tensor], *, cu_seqlens: Int[Tensor, " N_plus_1"]) -> Tensor:
    """Per-token results of each rank ([T] or [T, ...]), in its shard's row order, back in the order of the batch `cu_seqlens` belongs to.

    Raises ValueError where the number or the length of the arrays does not fit the shards.
    """
    if len(parts) != len(arrays):
        raise ValueError(f"{len(arrays)} arrays for {len(parts)} shards; hand in one per rank, in rank order")
    starts = cu_seqlens.tolist()
    result = torch.zeros(starts[-1], *arrays[0].shape[1:], dtype=arrays[0].dtype)
    for rank, (shard, found) in enumerate(zip(parts, arrays, strict=True)):
        bounds = shard.batch.cu_seqlens.tolist()
        if found.shape != (bounds[-1], *arrays[0].shape[1:]):
            raise ValueError(f"rank {rank} returned {tuple(found.shape)} values for the {bounds[-1]} tokens of its shard")
        for index, micro_batch in enumerate(shard.micro_batches):
            # A filler may repeat a row that belongs to another rank, and its results mean nothing.
            for row in () if index in shard.fillers else micro_batch:
                start = starts[shard.rows[row]]
                result[start : start + bounds[row + 1] - bounds[row]] = found[bounds[row] : bounds[row + 1]]
    return result


def unshard_rows(parts: Sequence[Shard], arrays: Sequence[Tensor]) -> Tensor:
    """Per-row results of each rank, in its shard's row order, back in the whole batch's order.

    Raises ValueError where the number or the length of the arrays does not fit the shards.
    """
    if [len(shard.rows) for shard in parts] != [len(one) for one in arrays]:
        raise ValueError(f"arrays of {[len(one) for one in arrays]} rows for shards of {[len(shard.rows) for shard in parts]}")
    own = [(shard.rows[row], found[row]) for shard, found in zip(parts, arrays, strict=True) for row in shard.own_rows]
    result = arrays[0].new_zeros(len(own), *arrays[0].shape[1:])
    for row, value in own:
        result[row] = value
    return result


def cost(lengths: np.ndarray, *, hidden_size: int) -> np.ndarray:
    """Work of each row [N], in units of a token's linear layers: s + s^2 / (12 H) for s tokens and hidden size H.

    A layer has about 12 H^2 weights, 24 H^2 operations a token; causal attention takes 2 s^2 H a row. Equal at s = 12 H.
    """
    return lengths * (1.0 + lengths / (12.0 * hidden_size))


def _planned(
    lengths: Sequence[int], *, ranks: int, max_tokens: int, max_rows: int | None, rows_per_unit: int, hidden_size: int
) -> list[tuple[list[list[int]], list[list[int]]]]:
    """(micro-batches, fillers) of every rank, in rows."""
    rows = np.frombuffer(array.array("q", lengths), dtype=np.int64)  # in half the time that np.asarray takes
    _check(rows, ranks=ranks, max_tokens=max_tokens, max_rows=max_rows, rows_per_unit=rows_per_unit)
    tokens = rows.reshape(-1, rows_per_unit).sum(1)
    costs = cost(rows, hidden_size=hidden_size).reshape(-1, rows_per_unit).sum(1)
    if tokens.max() > max_tokens:
        what = (
            f"a row of {tokens.max()} tokens does" if rows_per_unit == 1 else f"{rows_per_unit} rows of {tokens.max()} tokens together do"
        )
        raise ValueError(
            f"{what} not fit a micro-batch of {max_tokens}; raise --train.max-tokens-per-gpu or lower --rollout.max-new-tokens"
        )
    units = None if max_rows is None else max_rows // rows_per_unit
    # A cap on rows asks for ranks of equally many.
    # A row's cost grows with its length, and whole numbers are sorted faster.
    order = _descending(tokens if rows_per_unit == 1 else costs)
    hand = _dealt(costs, order, ranks, evenly=units is not None)
    of_rank = _groups(hand, ranks)
    held = np.bincount(hand, weights=tokens, minlength=ranks)
    fewest = -(-int(held.max()) // max_tokens)  # the lower bound on micro-batches
    if units is not None:
        fewest = max(fewest, -(-max(len(own) for own in of_rank) // units))
    packed = [_micro_batches(own, tokens, fewest, max_tokens, units) for own in of_rank]
    if (needed := max(len(bins) for bins in packed)) > fewest:
        packed = [
            bins if len(bins) == needed else _micro_batches(own, tokens, needed, max_tokens, units)
            for own, bins in zip(of_rank, packed, strict=True)
        ]
    result = []
    for own, bins in zip(of_rank, packed, strict=True):
        heaviest_first = sorted(bins, key=lambda members: -float(costs[members].sum())) if len(bins) > 1 else bins
        fillers = []
        if len(bins) < needed:
            of_whom = own if len(own) else np.arange(len(tokens))
            fillers = [_rows([int(of_whom[np.argmin(tokens[of_whom])])], rows_per_unit)] * (needed - len(bins))
        result.append(([_rows(members, rows_per_unit) for members in heaviest_first], fillers))
    return result


def _check(lengths: np.ndarray, *, ranks: int, max_tokens: int, max_rows: int | None, rows_per_unit: int) -> None:
    if not len(lengths):
        raise ValueError("no rows to plan: every prompt of the step was dropped")
    if ranks < 1 or max_tokens < 1 or rows_per_unit < 1 or lengths.min() < 1:
        raise ValueError(
            f"ranks {ranks}, max_tokens {max_tokens}, rows_per_unit {rows_per_unit} and the shortest row {lengths.min()} "
            "must all be at least 1"
        )
    if len(lengths) % rows_per_unit:
        raise ValueError(f"{len(lengths)} rows are no whole number of units of {rows_per_unit}; pack the rows of a unit side by side")
    if max_rows is not None and max_rows < rows_per_unit:
        raise ValueError(f"a micro-batch of {max_rows} rows holds no unit of {rows_per_unit}; raise --train.micro-batch-size")


def _dealt(costs: np.ndarray, order: np.ndarray, hands: int, *, evenly: bool) -> np.ndarray:
    """The hand each item is dealt to, in `order`, largest items first: a round at a time, its largest to the lightest hand.

    As longest-processing-time-first, with one sort a round in place of one heap operation an item: a hand that is heavier than
    the lightest would be with the next item sits the round out, unless all are to hold equally many (`evenly`).
    """
    sorted_costs, hand = costs[order], np.empty(len(costs), dtype=np.uint16 if hands <= 2**16 else np.int64)
    loads = np.zeros(hands)
    done = 0
    while done < len(costs):
        lightest = loads.argsort(kind="stable")
        if not evenly:
            within_reach = loads[lightest].searchsorted(loads[lightest[0]] + sorted_costs[done])
            lightest = lightest[: max(1, int(within_reach))]
        lightest = lightest[: len(costs) - done]
        end = done + len(lightest)
        loads[lightest] += sorted_costs[done:end]
        hand[order[done:end]] = lightest
        done = end
    return hand


def _descending(keys: np.ndarray) -> np.ndarray:
    """Indices by falling key, equal ones in order; 16 bits are sorted in linear time."""
    largest = keys.max()
    if keys.dtype.kind == "i" and largest < 2**16:
        return (largest - keys).astype(np.uint16).argsort(kind="stable")
    return (-keys).argsort(kind="stable")


def _groups(hand: np.ndarray, hands: int) -> list[np.ndarray]:
    """Items of each hand, ascending."""
    order = hand.argsort(kind="stable")
    ends = np.bincount(hand, minlength=hands).cumsum().tolist()
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _micro_batches(own: np.ndarray, tokens: np.ndarray, count: int, max_tokens: int, max_units: int | None) -> list[np.ndarray]:
    """`own` units in `count` micro-batches of like size where that keeps the caps, else in as few as best fit finds."""
    count = min(count, len(own))
    if count <= 1:
        return [own] if len(own) else []
    tokens = tokens[own]
    groups = _groups(_dealt(tokens.astype(float), _descending(tokens), count, evenly=max_units is not None), count)
    fit = max(int(tokens[group].sum()) for group in groups) <= max_tokens
    if not fit or (max_units is not None and max(len(group) for group in groups) > max_units):
        groups = _best_fit(tokens, max_tokens, max_units)
    return [own[group] for group in groups]


def _best_fit(tokens: np.ndarray, max_tokens: int, max_units: int | None) -> list[np.ndarray]:
    """Units, longest first, each into the fullest micro-batch it still fits; O(n log n)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the micro-batch), ascending
    lengths = tokens.tolist()
    for unit in _descending(tokens).tolist():
        place = bisect.bisect_left(room, (lengths[unit], -1))
        if place < len(room):
            left, index = room.pop(place)
        else:
            left, index = max_tokens, len(bins)
            bins.append([])
        bins[index].append(unit)
        if max_units is None or len(bins[index]) < max_units:
            bisect.insort(room, (left - lengths[unit], index))
    return [np.array(sorted(members)) for members in bins]


def _rows(units: np.ndarray | list[int], rows_per_unit: int) -> list[int]:
    if rows_per_unit == 1:
        return units if isinstance(units, list) else units.tolist()
    return [unit * rows_per_unit + place for unit in _rows(units, 1) for place in range(rows_per_unit)]
