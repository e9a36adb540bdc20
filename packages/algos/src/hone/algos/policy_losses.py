"""Policy losses: weighted sums over action tokens, to be minimised. T packed tokens; log-probabilities and entropy in nats.

Old log-probabilities, advantages and weights are constants; only `logp` and `entropy` carry a gradient.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.masking import on_mask
from hone.algos.protocol import Loss
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import weighted_sum


def clipped_surrogate(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Loss:
    """PPO's pessimistic surrogate, sum_t w_t L_t with L = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).

    rho = exp(logp - old_logp), A advantage, w weight. With `dual_clip` c > 1, L = min(L, -c A) where A < 0, which bounds
    the loss when the policy has moved towards a bad token. The gradient is -rho A, and zero where a bound holds; at the
    bound itself it still passes. A token without advantage costs nothing however large its ratio.
    Log-ratios are not clamped: without `dual_clip` a bad token's loss overflows to inf some 88 nats (fp32) above the old policy.
    Figures: "policy_loss", "ppo_clip_ratio" (weighted share of tokens at a bound), "ppo_kl" (old_logp - logp [nats]).
    Reference: arXiv 1707.06347 eq 7; 2503.14476 (two sides); 1912.09729 eq 5 (dual clip, which writes c A as a maximum).
    """
    ratio = importance_ratio(logp.detach(), old_logp, action_mask)
    advantages = on_mask(advantages.detach(), action_mask)
    upper = torch.full_like(advantages, math.inf).masked_fill(advantages > 0, 1 + clip_high)
    if dual_clip is not None:
        upper = upper.masked_fill(advantages < 0, dual_clip)
    lower = torch.zeros_like(advantages).masked_fill(advantages < 0, 1 - clip_low)
    at_bound = ((ratio > upper) | (ratio < lower)) & action_mask
    # Only tokens that keep their gradient enter exp: behind a bound, or times a zero advantage, an overflow would turn
    # into 0 * inf = NaN on the way back.
    moving = ~at_bound & (advantages != 0)
    difference = log_ratio(logp, old_logp, action_mask)
    free_ratio = torch.exp(torch.where(moving, difference, 0.0))
    bounded = torch.where(at_bound, torch.where(ratio > upper, upper, lower), free_ratio)
    total = weighted_sum(-bounded * advantages, weights, action_mask)
    metrics = {
        "policy_loss": total.detach(),
        "ppo_clip_ratio": weighted_sum(at_bound.to(ratio.dtype), weights, action_mask),
        "ppo_kl": weighted_sum(-difference.detach(), weights, action_mask),
    }
    return Loss(total=total, metrics=metrics)


def entropy_bonus(entropy: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, coef: float) -> Loss:
    """-coef * sum_t w_t H_t, H_t the entropy [nats] of the distribution a token was drawn from; the figure is "entropy"."""
    mean = weighted_sum(entropy, weights, action_mask)
    return Loss(total=-coef * mean, metrics={"entropy": mean.detach()})
