"""Decoupled PPO: one policy sampled, another says where to stay, a third is trained. T packed tokens; log-probabilities in nats."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.corrections import check_bounds
from hone.algos.masking import on_mask
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.protocol import Loss
from hone.algos.ratios import log_ratio
from hone.algos.soft_losses import scaled_advantages


@checked
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
    check_bounds(0.0, weight_cap)
    weight = torch.exp(log_ratio(proximal_logp.detach(), behaviour_logp, action_mask)).clamp(max=weight_cap)
    # An overflowed weight would make NaN of a ratio that underflowed to zero; no finite one is anywhere near this bound.
    weight = weight.clamp(max=torch.finfo(weight.dtype).max ** 0.5)
    corrected = scaled_advantages(advantages, weight, action_mask)
    return clipped_surrogate(logp, proximal_logp.detach(), corrected, weights, action_mask, clip_low=clip_low, clip_high=clip_high)


@checked
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
    (negative). Constant: no gradient. Zero off the mask. At a lag of 0 this is AReaL's rule; the authors write the current policy
    there, which is then the behaviour policy too. Reference: arXiv 2512.06547.
    """
    lag = (policy_version - version).clamp(min=1).to(torch.float64)
    share = torch.where(version < 0, 0.0, (lag - 1) / lag)
    behaviour = on_mask(behaviour_logp, action_mask)
    return behaviour + on_mask(share, action_mask).to(behaviour.dtype) * log_ratio(logp, behaviour_logp, action_mask)
