"""Off-policy corrections: what the engine sampled against what the learner computes, and stale policies. All constants.

u_t = old_logp_t - rollout_logp_t [nats]; a weight is w = exp of u aggregated by LEVEL, then bounded by MODE. Bounds are
absolute ratios of learner over engine, both ends inside. T packed tokens, N rows; everything is exactly zero off the mask.
Levels "sequence" and "geometric" need WHOLE rows in what they are given. By their names in the field:
TIS = token, truncate. OpenRLHF's TIS = token, clip. IcePop = token, mask in [0.5, 5]. Sequence TIS = sequence, truncate.
MIS = token or sequence, mask with low 0. Sequence-mask TIS, OPSM, decoupled PPO and A-3PO have functions of their own.

A correction multiplies the advantages (`scaled_advantages`): a rejected token then costs nothing, however large its
ratio, and stays in the denominator, as do the KL and entropy terms. `weights_of_kept` is the other choice.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import row_sums, spread
from hone.algos.masking import on_mask
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.protocol import Loss
from hone.algos.ratios import log_ratio
from hone.algos.reduce import Reduction, token_weights, weighted_sum
from hone.algos.soft_losses import scaled_advantages

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]


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

    "geometric" is no importance weight, fit for gating only. Reference: arXiv 2512.23075.
    """
    difference = log_ratio(old_logp, rollout_logp, action_mask)
    if level == "token":
        return difference
    per_row = row_sums(difference, action_mask, cu_seqlens)
    if level == "geometric":
        per_row = per_row / row_sums(torch.ones_like(difference), action_mask, cu_seqlens).clamp(min=1)
    return spread(per_row, action_mask, cu_seqlens)


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
    Reference: arXiv 1606.02647 (truncate), 2510.18855 (mask, token), 2512.23075 (sequence).
    Raises ValueError unless 0 <= low <= high, or for a `low` above 0 with "truncate", which has no lower bound.
    """
    _check_bounds(low, high)
    if mode == "truncate" and low > 0:
        raise ValueError(f"low is {low}, but 'truncate' has no lower bound; choose 'clip' to raise small weights, 'mask' to reject them")
    weight = torch.exp(log_weights(old_logp, rollout_logp, action_mask, cu_seqlens, level=level))
    if mode == "mask":
        return on_mask(torch.where((weight >= low) & (weight <= high), weight, 0.0), action_mask)
    return on_mask(weight.clamp(low, high), action_mask)


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


def weights_of_kept(
    correction: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], *, reduction: Reduction
) -> Float[Tensor, " T"]:
    """Token weights as if rejected tokens (correction exactly zero) had never been drawn: the denominator shrinks with them.

    For one whole optimiser step, as `token_weights`. The default is to keep the weights: a step that rejects more learns less.
    """
    return token_weights(action_mask & (on_mask(correction, action_mask) != 0), cu_seqlens, reduction)


def decoupled_surrogate(
    logp: Float[Tensor, " T"],
    proximal_logp: Float[Tensor, " T"],
    behaviour_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    clip_low: float,
    clip_high: float,
    weight_cap: float = math.inf,
) -> Loss:
    """Decoupled PPO: the clipped surrogate around a proximal policy, times min(exp(proximal - behaviour), weight_cap).

    The behaviour policy sampled the token, the proximal policy says where to stay. With proximal = behaviour it is PPO.
    Figures of `clipped_surrogate`. Reference: arXiv 2110.00641; 2505.24298. Raises ValueError for a cap below 0.
    """
    _check_bounds(0.0, weight_cap)
    weight = torch.exp(log_ratio(proximal_logp.detach(), behaviour_logp, action_mask)).clamp(max=weight_cap)
    corrected = scaled_advantages(advantages, weight, action_mask)
    return clipped_surrogate(logp, proximal_logp.detach(), corrected, weights, action_mask, clip_low=clip_low, clip_high=clip_high)


@torch.no_grad()
def proximal_approximation(
    logp: Float[Tensor, " T"],
    behaviour_logp: Float[Tensor, " T"],
    version: Int[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    policy_version: int,
) -> Float[Tensor, " T"]:
    """A-3PO's proximal log-probability without a forward pass: l_b + a (l - l_b), a = (lag - 1) / lag clipped to [0, 1].

    lag = policy_version - version, in versions; a is 0, so behaviour itself, where the lag is 0 or the version unknown
    (negative). Constant: no gradient. Zero off the mask. Reference: arXiv 2512.06547.
    """
    lag = (policy_version - version).clamp(min=1).to(torch.float64)
    share = torch.where(version < 0, 0.0, (lag - 1) / lag)
    behaviour = on_mask(behaviour_logp, action_mask)
    return behaviour + on_mask(share, action_mask).to(behaviour.dtype) * log_ratio(logp, behaviour_logp, action_mask)


def sample_size_figures(
    correction: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> dict[str, Float[Tensor, ""]]:
    """The sums that `effective_sample_size` needs, additive over cuts: sum w, sum w c and sum w c^2, c the correction."""
    return {
        "correction_mass": on_mask(weights, action_mask).sum().detach(),
        "correction": weighted_sum(correction, weights, action_mask).detach(),
        "correction_square": weighted_sum(on_mask(correction, action_mask).square(), weights, action_mask).detach(),
    }


def effective_sample_size(figures: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """ESS as a share of all samples, (sum w c)^2 / (sum w sum w c^2) in [0, 1]: 1 iff the corrections are equal, 0 if none is left.

    With weights by token it counts tokens, with weights by sequence and a sequence-level correction rows.
    """
    denominator = figures["correction_mass"] * figures["correction_square"]
    # An overflowed square means that one sample outweighs all others.
    share = figures["correction"].square() / denominator
    return torch.where((denominator == 0) | denominator.isinf(), 0.0, share)


@torch.no_grad()
def mismatch_figures(
    old_logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
) -> dict[str, Float[Tensor, ""]]:
    """How far engine and learner are apart, weighted means that add up over cuts between rows (all zero or one if equal).

    "mismatch_k1" mean(-u) and "mismatch_k3" mean(e^u - 1 - u), estimates of KL(engine || learner) [nats];
    "mismatch_chi2" mean(e^2u - 1); "mismatch_perplexity_ratio" mean over rows of exp(mean_row(-u)), learner over engine.
    """
    difference = log_ratio(old_logp, rollout_logp, action_mask)
    per_row = log_weights(old_logp, rollout_logp, action_mask, cu_seqlens, level="geometric")
    figures = {
        "mismatch_k1": -difference,
        "mismatch_k3": torch.expm1(difference) - difference,
        "mismatch_chi2": torch.expm1(2 * difference),
        "mismatch_perplexity_ratio": torch.exp(-per_row),
    }
    return {name: weighted_sum(per_token, weights, action_mask) for name, per_token in figures.items()}


def _check_bounds(low: float, high: float) -> None:
    if not 0 <= low <= high:
        raise ValueError(f"weight bounds [{low}, {high}]: need 0 <= low <= high, absolute ratios of learner over engine (1 = no mismatch)")
