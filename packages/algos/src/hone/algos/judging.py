"""From a whole rollout to optimiser steps: Batch --judge--> Scored --optimiser_steps--> Scored, one per step.

Advantages are settled once, over the whole rollout; weights are settled once per optimiser step, before anything is cut.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored, select
from hone.algos.checks import MEND_REWARDS, require_finite
from hone.algos.mismatch import effective_sample_size, mismatch_figures, sample_size_figures
from hone.algos.protocol import Algorithm
from hone.algos.ranges import require_valid
from hone.algos.ratios import importance_ratio
from hone.algos.reduce import Reduction, token_weights, weighted_sum
from hone.algos.soft_losses import scaled_advantages

MEND_MODEL = "go back to an earlier checkpoint with a lower learning rate"
MEND_SIZE = "all they are made of is finite, so it is too large for fp32; clip or scale the rewards"


def judge(algo: Algorithm, batch: Batch) -> Scored:
    """The batch with the algorithm's advantages, corrected, and weights as if the whole rollout were one optimiser step.

    `figures` of the result are the algorithm's own and, wherever `old_logp` is known, those of `mismatch_figures` over all
    action tokens, "mismatch_ess" (what importance weights would leave of the sample) and, where advantages were corrected,
    "correction_ess", "correction_mean" (both over rows for a sequence-level correction, else over action tokens) and
    "correction_rejected" (share of action tokens).
    Raises ValueError for settings out of range, if a field in `algo.needs` is missing, or a reward on the mask is not finite;
    FloatingPointError if another number that is read, or an advantage before or after its correction, is not finite.
    """
    require_valid(algo)
    require_finite(
        "judge",
        "rewards",
        batch.rewards,
        batch.action_mask,
        remedy="nothing was trained on them: mend the reward function, or drop the rows",
    )
    # The engine's numbers are read wherever the learner's are known; a NaN among them would pass for a rejected token.
    read = algo.needs if batch.old_logp is None else {*algo.needs, "rollout_logp"}
    for name in sorted(read):
        _require_finite(batch, batch.require(name), name, remedy=MEND_REWARDS if name == "greedy_scores" else MEND_MODEL)
    judged = algo.advantages(batch)
    _require_finite(batch, judged.advantages, f"advantages of {algo.name}", remedy=MEND_SIZE)
    factor = algo.correction.factor(batch)
    advantages = judged.advantages
    if factor is not None:
        _require_finite(batch, factor, "the correction", remedy="bound it: give algo.correction.high a finite value")
        advantages = scaled_advantages(advantages, factor, batch.action_mask)
        _require_finite(batch, advantages, f"corrected advantages of {algo.name}", remedy=MEND_SIZE)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    weights = token_weights(batch.action_mask, batch.episode_cu_seqlens, algo.reduction)
    figures = {**judged.figures, **_disagreement(batch), **({} if factor is None else _corrected(batch, factor, algo.correction.level))}
    return Scored(**fields, advantages=advantages, returns=judged.returns, weights=weights, figures=figures)


def optimiser_steps(scored: Scored, *, batch_size: int, reduction: Reduction, generator: torch.Generator) -> Iterator[Scored]:
    """Shuffled samples in steps of `batch_size` (the last may be smaller), each with weights of its own.

    A sample is a row, or the rows of an episode: they stay together, and weigh what one sequence weighs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; an optimiser step needs at least 1 row")
    bounds = [int(row) for row in scored.episode_rows]
    order = [int(sample) for sample in torch.randperm(len(bounds) - 1, generator=generator)]
    for start in range(0, len(order), batch_size):
        rows = [row for one in order[start : start + batch_size] for row in range(bounds[one], bounds[one + 1])]
        step = select(scored, rows)
        yield dataclasses.replace(step, weights=token_weights(step.action_mask, step.episode_cu_seqlens, reduction))


def _disagreement(batch: Batch) -> dict[str, Float[Tensor, ""]]:
    if batch.old_logp is None:
        return {}
    mask, cu_seqlens = batch.action_mask, batch.cu_seqlens
    by_token = token_weights(mask, cu_seqlens, Reduction())
    importance = importance_ratio(batch.old_logp, batch.rollout_logp, mask)
    return {
        **mismatch_figures(batch.old_logp, batch.rollout_logp, by_token, mask, cu_seqlens),
        "mismatch_ess": effective_sample_size(sample_size_figures(importance, by_token, mask)),
    }


def _corrected(batch: Batch, factor: Float[Tensor, " T"], level: str) -> dict[str, Float[Tensor, ""]]:
    by_token = token_weights(batch.action_mask, batch.cu_seqlens, Reduction())
    # What shares one correction is one sample: at the level of sequences a row, else a token.
    by_row = token_weights(batch.action_mask, batch.cu_seqlens, Reduction(over="sequence"))
    sizes = sample_size_figures(factor, by_row if level == "sequence" else by_token, batch.action_mask)
    return {
        "correction_ess": effective_sample_size(sizes),
        "correction_mean": sizes["correction"],
        "correction_rejected": weighted_sum((factor == 0).to(by_token.dtype), by_token, batch.action_mask),
    }


def _require_finite(batch: Batch, values: Float[Tensor, " _"], name: str, *, remedy: str = MEND_MODEL) -> None:
    # A NaN set to zero here would train on, and hide its cause.
    per_token = values[batch.row_of_token] if name in batch.PER_ROW else values
    broken = (~torch.isfinite(per_token) & batch.action_mask).nonzero().flatten()
    if broken.numel():
        token = int(broken[0])
        row = int(batch.row_of_token[token])
        raise FloatingPointError(
            f"{name}: {broken.numel()} of {int(batch.action_mask.sum())} action tokens are not finite, the first {float(per_token[token])} "
            f"at token {token - int(batch.cu_seqlens[row])} of row {row} (group {int(batch.group[row])}); "
            f"nothing was trained on them: {remedy}"
        )
