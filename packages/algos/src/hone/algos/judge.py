"""From a whole rollout to optimiser steps: Batch --judge--> Scored --optimiser_steps--> Scored, one per step.

Advantages are settled once, over the whole rollout; weights are settled once per optimiser step, before anything is cut.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored, select
from hone.algos.protocol import Algorithm
from hone.algos.reduce import Reduction, token_weights


def judge(algo: Algorithm, batch: Batch) -> Scored:
    """The batch with the algorithm's advantages, and weights as if the whole rollout were one optimiser step.

    Raises ValueError if a field in `algo.needs` is missing, FloatingPointError if it, a reward or an advantage is not finite.
    """
    for name in ("rewards", *sorted(algo.needs)):
        _require_finite(batch, batch.require(name), name)
    judged = algo.advantages(batch)
    _require_finite(batch, judged.advantages, f"advantages of {algo.name}")
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    weights = token_weights(batch.action_mask, batch.cu_seqlens, algo.reduction)
    return Scored(**fields, advantages=judged.advantages, returns=judged.returns, weights=weights)


def optimiser_steps(scored: Scored, *, batch_size: int, reduction: Reduction, generator: torch.Generator) -> Iterator[Scored]:
    """Shuffled rows in steps of `batch_size` rows (the last may be smaller), each with weights of its own."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; an optimiser step needs at least 1 row")
    order = [int(row) for row in torch.randperm(scored.rows, generator=generator)]
    for start in range(0, scored.rows, batch_size):
        step = select(scored, order[start : start + batch_size])
        yield dataclasses.replace(step, weights=token_weights(step.action_mask, step.cu_seqlens, reduction))


def _require_finite(batch: Batch, per_token: Float[Tensor, " T"], name: str) -> None:
    # A NaN set to zero here would train on, and hide its cause.
    broken = (~torch.isfinite(per_token) & batch.action_mask).nonzero().flatten()
    if broken.numel():
        token = int(broken[0])
        row = int(batch.row_of_token[token])
        raise FloatingPointError(
            f"{name}: {broken.numel()} of {int(batch.action_mask.sum())} action tokens are not finite, the first {float(per_token[token])} "
            f"at token {token - int(batch.cu_seqlens[row])} of row {row} (group {int(batch.group[row])}); nothing was trained on them: "
            "mend the reward function if it is a reward, else go back to an earlier checkpoint with a lower learning rate"
        )
