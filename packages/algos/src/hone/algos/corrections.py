"""Off-policy corrections: what the engine sampled against what the learner computes, and stale policies. All constants.

u_t = old_logp_t - rollout_logp_t [nats]; a weight is w = exp of u aggregated by LEVEL, then bounded by MODE. Bounds are
absolute ratios of learner over engine, both ends inside. T packed tokens, N rows; everything is exactly zero off the mask.
Levels "sequence" and "geometric" need WHOLE rows in what they are given. By their names in the field:
TIS = token, truncate. OpenRLHF's TIS = token, clip. IcePop = token, mask in [0.5, 5]. Sequence TIS = sequence, truncate.
MIS = token or sequence, mask with low 0. Sequence-mask TIS, M2PO and OPSM have functions of their own; decoupled PPO and A-3PO
stand in `decoupled.py`. What a correction leaves of the sample is told by `mismatch.py`.

A correction multiplies the advantages (`scaled_advantages`): a rejected token then costs nothing, however large its
ratio, and stays in the denominator, as do the KL and entropy terms. `weights_of_kept` is the other choice.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import row_sums, spread
from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast
from hone.algos.ratios import log_ratio
from hone.algos.reduce import Reduction, token_weights

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]


@checked
@torch.no_grad()
def log_weights(
    old_logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    level: Level,
) -> Float[Tensor, " T"]:
    """Log w on every action token [nats]: u_t, or its row's sum ("sequence", a product of ratios) or mean ("geometric").

    "geometric" is no importance weight, fit for gating only. Reference: "When Speed Kills Stability", https://richardli.xyz/rl-collapse
    """
    difference = log_ratio(old_logp, rollout_logp, action_mask)
    if level == "token":
        return difference
    per_row = row_sums(difference, action_mask, cu_seqlens)
    if level == "geometric":
        per_row = per_row / row_sums(torch.ones_like(difference), action_mask, cu_seqlens).clamp(min=1)
    return spread(per_row, action_mask, cu_seqlens)


@checked
def correction_weights(
    old_logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    level: Level,
    mode: Mode,
    low: float = 0.0,
    high: float,
) -> Float[Tensor, " T"]:
    """Bounded importance weight: min(w, high) | clip(w, low, high) | w 1[low <= w <= high] for truncate | clip | mask.

    "clip" also RAISES small weights to `low`. "mask" with [0, inf] leaves w as it is. A rejected token has exactly zero.
    Reference: arXiv 1802.01561 (truncate), 2510.18855 eq 1 to 3 (mask, token); "When Speed Kills Stability",
    https://richardli.xyz/rl-collapse (sequence).
    Raises ValueError unless 0 <= low <= high, or for a `low` above 0 with "truncate", which has no lower bound.
    """
    check_bounds(low, high)
    if mode == "truncate" and low > 0:
        raise ValueError(f"low is {low}, but 'truncate' has no lower bound; choose 'clip' to raise small weights, 'mask' to reject them")
    weight = torch.exp(log_weights(old_logp, rollout_logp, action_mask, cu_seqlens, level=level))
    if mode == "mask":
        return on_mask(torch.where((weight >= low) & (weight <= high), weight, 0.0), action_mask)
    return on_mask(weight.clamp(low, high), action_mask)


@checked
def sequence_mask_tis(
    old_logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    low: float,
    high: float,
    cap: float,
) -> Float[Tensor, " T"]:
    """Token weights of the rows that pass a geometric gate: min(w_t, cap) 1[low <= exp(mean_row u) <= high].

    The weight itself is truncated too, where OpenRLHF and NeMo-RL let it pass unbounded: a good mean hides a single e^8.
    Needs whole rows. Raises ValueError unless 0 <= low <= high and 0 <= cap.
    """
    gate = correction_weights(old_logp, rollout_logp, action_mask, cu_seqlens, level="geometric", mode="mask", low=low, high=high)
    weight = correction_weights(old_logp, rollout_logp, action_mask, cu_seqlens, level="token", mode="truncate", high=cap)
    return torch.where(gate == 0, 0.0, weight)


@checked
@torch.no_grad()
def second_moment_mask(
    old_logp: Float[Tensor, " T"], rollout_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, threshold: float
) -> Float[Tensor, " T"]:
    """M2PO: 1 on the tokens kept, 0 on those of the largest u^2, dropped until the mean of u^2 over the rest is below threshold.

    At least one action token is kept. Over ALL the tokens given: give it a whole rollout. AReaL's form; the paper's takes the
    CURRENT policy's ratio, of the tokens only whose update leads further away, until the mean is at most 0.04 [nats^2].
    Reference: arXiv 2510.01161 eq 4. Raises ValueError unless threshold > 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; M2PO bounds a mean of squares, which needs one above 0 (0.04 in the paper)")
    squares = log_ratio(old_logp, rollout_logp, action_mask)[action_mask].double().square()
    ascending = squares.sort(stable=True)
    means = ascending.values.cumsum(0) / torch.arange(1, squares.numel() + 1, device=squares.device)
    # Means of a growing number of ever larger squares never fall, so the kept ones are a beginning of the order.
    kept = torch.zeros_like(squares)
    kept[ascending.indices[: max(1, int((means < threshold).sum()))]] = 1.0
    return torch.zeros(action_mask.shape, dtype=upcast(old_logp).dtype, device=old_logp.device).masked_scatter_(
        action_mask, kept.to(upcast(old_logp).dtype)
    )


@checked
@torch.no_grad()
def self_normalised(correction: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """c_t / (sum w c / sum w): corrections with a weighted mean of one, so that a step's size does not follow the mismatch.

    w are weights by token for a token-level correction, by sequence for a sequence-level one, of ALL the tokens that shall share
    the mean (a whole rollout). If every token is rejected, nothing is left to scale: all zero.
    """
    mass = on_mask(weights, action_mask).double().sum()
    total = (on_mask(weights, action_mask).double() * on_mask(correction, action_mask).double()).sum()
    return torch.where(total == 0, 0.0, on_mask(correction, action_mask).double() * mass / total).to(upcast(correction).dtype)


@checked
@torch.no_grad()
def off_policy_sequence_mask(
    logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    threshold: float,
) -> Float[Tensor, " T"]:
    """OPSM: 0 iff A_t < 0 and mean_row(rollout_logp - logp) > threshold [nats], else 1 (on action tokens).

    Bad rows that the current policy has left behind teach nothing. The anchor is the SAMPLER's log-probability. Needs whole
    rows. The paper tells no threshold; TRL suggests 0.5. Reference: arXiv 2512.02556 eq 8, 9.
    """
    left_behind = -log_weights(logp, rollout_logp, action_mask, cu_seqlens, level="geometric")
    rejected = (on_mask(advantages, action_mask) < 0) & (left_behind > threshold)
    return on_mask((~rejected).to(left_behind.dtype), action_mask)


@checked
def weights_of_kept(
    correction: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], *, reduction: Reduction
) -> Float[Tensor, " T"]:
    """Token weights as if rejected tokens (correction exactly zero) had never been drawn: the denominator shrinks with them.

    For one whole optimiser step, as `token_weights`. The default is to keep the weights: a step that rejects more learns less.
    """
    return token_weights(action_mask & (on_mask(correction, action_mask) != 0), cu_seqlens, reduction)


def check_bounds(low: float, high: float) -> None:
    """Raise ValueError unless 0 <= low <= high."""
    if not 0 <= low <= high:
        raise ValueError(f"weight bounds [{low}, {high}]: need 0 <= low <= high, absolute ratios of learner over engine (1 = no mismatch)")
