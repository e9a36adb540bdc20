"""DPPO: a trust region in probability, not in ratio, around the policy that SAMPLED. T packed tokens; log-probabilities in nats.

A ratio bound holds rare tokens tightly and common ones hardly at all; the divergence of the two-way split "this token or
any other" does the opposite. The anchor is the rollout's own log-probability: with a recomputed one the paper sees collapse.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.protocol import Loss
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import weighted_sum
from hone.algos.soft_losses import LARGEST_FACTOR, reinforce_loss, scaled_advantages

Divergence = Literal["tv", "kl"]


@checked
@torch.no_grad()
def binary_tv(logp: Float[Tensor, " T"], rollout_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Total variation of the two-way split, |mu - pi| with mu = exp(rollout_logp), pi = exp(logp), in [0, 1]; zero off the mask.

    Reference: arXiv 2602.04879 eq 13.
    """
    higher = torch.maximum(_log_probability(logp, action_mask), _log_probability(rollout_logp, action_mask))
    lower = torch.minimum(_log_probability(logp, action_mask), _log_probability(rollout_logp, action_mask))
    # Not exp - exp: near one, two close probabilities agree in all the digits there are.
    return -torch.exp(higher) * torch.expm1(lower - higher)


@checked
@torch.no_grad()
def binary_kl(logp: Float[Tensor, " T"], rollout_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """KL of the two-way split [nats], mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), mu the rollout; zero off the mask.

    inf where pi is one and mu is not. Reference: arXiv 2602.04879 eq 14.
    """
    policy, rollout = _log_probability(logp, action_mask), _log_probability(rollout_logp, action_mask)
    other = -torch.expm1(rollout)
    rest = torch.where(other == 0, 0.0, other * (_log1mexp(rollout) - _log1mexp(policy)))
    return on_mask(torch.where(policy == rollout, 0.0, torch.exp(rollout) * (rollout - policy) + rest), action_mask)


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"tv": binary_tv, "kl": binary_kl}


@checked
@torch.no_grad()
def divergence_mask(
    logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    divergence: Divergence,
    threshold: float,
) -> Bool[Tensor, " T"]:
    """True where an action token may still move: unless D > threshold and the update would take it further away.

    Further away means A > 0 with rho > 1, or A < 0 with rho < 1, rho = exp(logp - rollout_logp). A token without advantage
    is kept. Reference: arXiv 2602.04879 eq 12.
    """
    direction = log_ratio(logp, rollout_logp, action_mask) * on_mask(advantages, action_mask).sign()
    outside = DIVERGENCES[divergence](logp, rollout_logp, action_mask) > threshold
    return action_mask & ~(outside & (direction > 0))


@checked
def dppo_loss(
    logp: Float[Tensor, " T"],
    rollout_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    divergence: Divergence,
    threshold: float,
    ratio_cap: float = math.inf,
) -> Loss:
    """DPPO: sum_t w_t L_t with L = -sg(min(rho, ratio_cap)) M A logp; M of `divergence_mask`, rho = exp(logp - rollout_logp).

    Use no further correction between engine and learner: rho is one already. Denominators keep the masked tokens. The
    paper sums a row's tokens (a constant reduction). Paper: threshold 0.15 or 0.2 with "tv", 0.05 with "kl"; cap none or 5.
    Figures: "policy_loss", "ppo_clip_ratio" (weighted share of masked tokens), "ppo_kl" (rollout_logp - logp [nats]).
    Reference: arXiv 2602.04879 eq 12 to 14. Raises ValueError for a threshold below 0 or a cap not above 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; a divergence is at least 0 (the paper: 0.15 for tv, 0.05 for kl)")
    if not ratio_cap > 0:
        raise ValueError(f"ratio_cap is {ratio_cap}; an absolute ratio above 0 is needed (infinity for none)")
    keep = divergence_mask(logp, rollout_logp, advantages, action_mask, divergence=divergence, threshold=threshold)
    ratio = importance_ratio(logp.detach(), rollout_logp, action_mask).clamp(max=min(ratio_cap, LARGEST_FACTOR))
    factor = torch.where(keep, ratio, 0.0)
    loss = reinforce_loss(logp, scaled_advantages(advantages, factor, action_mask), weights, action_mask)
    metrics = {
        **loss.metrics,
        "ppo_clip_ratio": weighted_sum((~keep).to(ratio.dtype), weights, action_mask),
        "ppo_kl": weighted_sum(-log_ratio(logp.detach(), rollout_logp, action_mask), weights, action_mask),
    }
    return Loss(total=loss.total, metrics=metrics)


def _log_probability(logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    # Engines round the log of a probability of one to something slightly above zero.
    return on_mask(logp, action_mask).clamp(max=0.0)


def _log1mexp(x: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """log(1 - exp(x)) for x <= 0, exact at both ends."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
