"""Labelled rows for the offline algorithms: masks as strings, F4 as tokens, slow references that start from tokens, one call for all.

In a mask "#" is an action token, "." any other; a row is one string. Everything is in fp64, with NaN off the masks.
"""

import itertools
import math

import torch
from torch import Tensor

from hone.algos.batch import Packed
from hone.algos.offline import LogitsLoss, Offline, ScoreLoss
from hone.algos.protocol import Loss, Outputs
from tests.reference import numpy_offline
from tests.reference.fixtures import scatter


def packed(masks: list[str], *, ref_logp: Tensor | None = None) -> Packed:
    """Rows with these masks; tokens count upwards, so that mixing up slots shows."""
    lengths = [len(mask) for mask in masks]
    return Packed(
        tokens=torch.arange(sum(lengths)) % 5,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        position_ids=torch.tensor([position for length in lengths for position in range(length)], dtype=torch.long),
        action_mask=torch.tensor([slot == "#" for mask in masks for slot in mask], dtype=torch.bool),
        ref_logp=ref_logp,
    )


def f4() -> tuple[Packed, Tensor]:
    """F4 as tokens, (rows, logp): sums -10 and -12 against the reference's -11 and -11.5 over 4 and 5 tokens, with a prompt, a gap."""
    masks = ["..##.##", ".#####."]
    rows = packed(masks)
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -2.0, -3.0, -3.0]
    ref_chosen, ref_rejected = [-2.0, -2.0, -3.5, -3.5], [-2.0, -2.0, -1.5, -3.5, -2.5]
    logp, ref_logp = (torch.tensor(numbers, dtype=torch.float64) for numbers in (chosen + rejected, ref_chosen + ref_rejected))
    return packed(masks, ref_logp=scatter(ref_logp, rows.action_mask)), scatter(logp, rows.action_mask)


def per_row(numbers: Tensor, rows: Packed) -> list[list[float]]:
    """The action tokens' numbers, row by row."""
    edges, mask = rows.cu_seqlens.tolist(), rows.action_mask.tolist()
    return [[float(numbers[token]) for token in range(start, stop) if mask[token]] for start, stop in itertools.pairwise(edges)]


def preferred(name: str, logp: Tensor, rows: Packed, *, mean: bool, against_reference: bool, **settings: float) -> float:
    """The mean over pairs whose answers both have tokens; every pair compares sums or means of logp or of logp - ref_logp."""
    own = per_row(logp, rows)
    if against_reference:
        assert rows.ref_logp is not None
        own = [[a - b for a, b in zip(row, its, strict=True)] for row, its in zip(own, per_row(rows.ref_logp, rows), strict=True)]
    compared = [(sum(row) / (len(row) if mean else 1) if row else None) for row in own]
    pairs = [(c, r) for c, r in zip(compared[0::2], compared[1::2], strict=True) if c is not None and r is not None]
    return sum(numpy_offline.paired(name, c, r, **settings) for c, r in pairs) / max(len(pairs), 1)


def chosen_nll(logp: Tensor, rows: Packed) -> float:
    """Mean over such pairs of the chosen answer's mean -logp."""
    own = per_row(logp, rows)
    live = [-sum(c) / len(c) for c, r in zip(own[0::2], own[1::2], strict=True) if c and r]
    return sum(live) / max(len(live), 1)


def kahneman_tversky(logp: Tensor, rows: Packed, good: list[bool], anchor: float, *, beta: float, scales: tuple[float, float]) -> float:
    """The mean over rows with tokens; scales of good and of bad answers."""
    assert rows.ref_logp is not None
    own, ref = per_row(logp, rows), per_row(rows.ref_logp, rows)
    losses = [
        numpy_offline.kto(sum(row) - sum(its), anchor, good=one, beta=beta, scale=scales[0] if one else scales[1])
        for row, its, one in zip(own, ref, good, strict=True)
        if row
    ]
    return sum(losses) / max(len(losses), 1)


def weights(rows: Packed, *, over: str) -> list[float]:
    """Weight of every token in turn."""
    edges, mask = rows.cu_seqlens.tolist(), rows.action_mask.tolist()
    counts = [sum(mask[start:stop]) for start, stop in itertools.pairwise(edges)]
    live = max(sum(count > 0 for count in counts), 1)
    divisor = {"token": lambda count: sum(counts), "sequence": lambda count: live * count}[over]
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    flat = [count for count, length in zip(counts, lengths, strict=True) for _ in range(length)]
    return [1 / divisor(count) if one else 0.0 for count, one in zip(flat, mask, strict=True)]


def likelihood(logits: Tensor, token: int) -> float:
    """-log softmax of one token."""
    return -math.log(numpy_offline.softmax(logits.numpy())[token])


def loss_of(algo: Offline, numbers: Tensor, rows: Packed) -> Loss:
    """Whatever the algorithm reads: log-probabilities, scores or logits."""
    if isinstance(algo, ScoreLoss):
        return algo.score_loss(numbers, rows)
    return algo.logits_loss(numbers, rows) if isinstance(algo, LogitsLoss) else algo.loss(Outputs(logp=numbers), rows)


def evaluated(algo: Offline, numbers: Tensor, rows: Packed) -> tuple[Loss, Tensor]:
    leaf = numbers.detach().clone().requires_grad_()
    loss = loss_of(algo, leaf, rows)
    return loss, torch.autograd.grad(loss.total, leaf)[0]
