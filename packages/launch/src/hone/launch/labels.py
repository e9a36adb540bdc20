"""Samples into the labelled rows of one optimiser step: packed end to end, with weights that are settled for the step as a whole."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hone.algos.batch import Packed
from hone.algos.offline import weighed_demonstrations, weighed_judgements, weighed_pairs, weighed_steps
from hone.datasets.labelled import Sample, TokenRow

Labeller = Callable[[Packed, Sequence[Sample], Any], Packed]


def packed(rows: Sequence[TokenRow], ref_logp: Sequence[Tensor] | None = None) -> Packed:
    """Rows end to end; `ref_logp` [nats] are the reference's, one tensor a row."""
    lengths = [len(row.tokens) for row in rows]
    return Packed(
        tokens=torch.cat([torch.frombuffer(row.tokens, dtype=torch.int32) for row in rows]).long(),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=torch.cat([torch.frombuffer(bytearray(row.trained), dtype=torch.uint8) for row in rows]).bool(),
        ref_logp=None if ref_logp is None else torch.cat(list(ref_logp)),
    )


def demonstrations(rows: Packed, samples: Sequence[Sample], algo: Any) -> Packed:
    """Rows to imitate."""
    return weighed_demonstrations(_without_first(rows), reduction=algo.reduction)


def pairs(rows: Packed, samples: Sequence[Sample], algo: Any) -> Packed:
    """Chosen and rejected answers side by side."""
    return weighed_pairs(rows, margins=torch.tensor([sample.margin for sample in samples]))


def judgements(rows: Packed, samples: Sequence[Sample], algo: Any) -> Packed:
    """Answers found good or bad."""
    return weighed_judgements(rows, torch.tensor([sample.desirable for sample in samples]))


def steps(rows: Packed, samples: Sequence[Sample], algo: Any) -> Packed:
    """Solutions with the shares of their labels: bad and good for a classifier, good and bad where two tokens stand for them."""
    good = torch.tensor([share for sample in samples for share in sample.shares])
    shares = torch.stack([good, 1 - good] if algo.reward_tokens else [1 - good, good], dim=-1)
    targets = torch.zeros(rows.tokens.numel(), 2).masked_scatter(rows.action_mask[:, None].expand(-1, 2), shares)
    return weighed_steps(rows, targets, reduction=algo.reduction)


LABELLERS: dict[str, Labeller] = {
    "sft": demonstrations,
    "kd": demonstrations,
    "rm": pairs,
    "dpo": pairs,
    "kto": judgements,
    "prm": steps,
}
"""By command."""


def _without_first(rows: Packed) -> Packed:
    """Nothing stands before a row's first token, so it has no likelihood: in a document it is not among those that are counted."""
    rows.action_mask[rows.cu_seqlens[:-1].long()] = False
    return rows
