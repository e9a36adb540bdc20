"""Policy losses without a hard clip: plain REINFORCE, CISPO and SAPO. Weighted sums over T packed tokens; log-probabilities in nats.

Old log-probabilities, advantages and weights are constants; only `logp` carries a gradient. Values of different losses
do not compare (on policy PPO says -A, SAPO -2 A / tau, CISPO and REINFORCE -A logp); their gradients on policy are equal.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.protocol import Loss
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import weighted_sum

LARGEST_FACTOR = 1e18
"""Where a detached ratio without a cap saturates: an infinite one would meet a log-probability of zero, and 0 * inf is NaN."""


@checked
def reinforce_loss(
    logp: Float[Tensor, " T"], advantages: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> Loss:
    """Plain policy gradient, -sum_t w_t A_t logp_t: right on policy only, and its value says nothing; figure "policy_loss".

    Reference: Williams 1992, https://doi.org/10.1007/BF00992696, with an advantage for the reward.
    """
    total = weighted_sum(-on_mask(advantages.detach(), action_mask) * on_mask(logp, action_mask), weights, action_mask)
    return Loss(total=total, metrics={"policy_loss": total.detach()})


@checked
def cispo_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    cap: float,
    floor: float = 0.0,
) -> Loss:
    """CISPO: a policy gradient with a bounded, detached ratio, sum_t w_t L_t with L = -sg(clip(rho, floor, cap)) A logp.

    Every token keeps its gradient, -clip(rho, floor, cap) A. `cap` and `floor` are ABSOLUTE ratios, not distances from
    one: a peer's "epsilon_high" of 4 that means 1 + 4 is a cap of 5 here. The paper leaves the floor open (0) and tells no
    cap; infinity is no cap, and then the gradient is PPO's without a clip.
    Figures: "policy_loss", "ppo_clip_ratio" (weighted share of tokens outside the bounds), "ppo_kl" (old_logp - logp [nats]).
    Reference: arXiv 2506.13585 eq 4 and 5; absolute cap: 2510.13786. Raises ValueError unless 0 <= floor <= cap.
    """
    if not 0 <= floor <= cap:
        raise ValueError(f"ratio bounds [{floor}, {cap}] of CISPO: need 0 <= floor <= cap, both absolute ratios (5, not 1 + 4)")
    ratio = importance_ratio(logp.detach(), old_logp, action_mask)
    outside = (ratio < floor) | (ratio > cap)
    bounded = ratio.clamp(floor, min(cap, LARGEST_FACTOR))
    loss = reinforce_loss(logp, scaled_advantages(advantages, bounded, action_mask), weights, action_mask)
    metrics = {
        **loss.metrics,
        "ppo_clip_ratio": weighted_sum(outside.to(ratio.dtype), weights, action_mask),
        "ppo_kl": weighted_sum(-log_ratio(logp.detach(), old_logp, action_mask), weights, action_mask),
    }
    return Loss(total=loss.total, metrics=metrics)


@checked
def sapo_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Loss:
    """SAPO: a sigmoid gate in the clip's place, sum_t w_t L_t with L = -(4 / tau) sigmoid(tau (rho - 1)) A.

    tau is `temperature_positive` where A > 0 and `temperature_negative` elsewhere. The gradient is -4 p (1 - p) rho A with
    p the sigmoid: -A on policy, fading on both sides, exactly zero where rho overflows. The paper averages by sequence.
    Figures: "policy_loss", "sapo_gate" (weighted mean of 4 p (1 - p), 1 on policy), "ppo_kl" (old_logp - logp [nats]).
    Reference: arXiv 2511.20347 eq 5, 6. Raises ValueError unless both temperatures are above 0.
    """
    for name, tau in (("temperature_positive", temperature_positive), ("temperature_negative", temperature_negative)):
        if not tau > 0:
            raise ValueError(f"{name} is {tau}; SAPO's gate needs a temperature above 0 (the paper takes 1.0 and 1.05)")
    difference = log_ratio(logp, old_logp, action_mask)
    advantages = on_mask(advantages.detach(), action_mask)
    temperature = torch.full_like(advantages, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    # An overflowing ratio saturates the gate; sent through exp it would come back as 0 * inf = NaN.
    saturated = torch.exp(difference.detach()).isinf()
    gate = torch.sigmoid(temperature * (torch.exp(difference.masked_fill(saturated, 0.0)) - 1))
    gate = gate.masked_fill(saturated, 1.0)
    total = weighted_sum(-4 / temperature * gate * advantages, weights, action_mask)
    metrics = {
        "policy_loss": total.detach(),
        "sapo_gate": weighted_sum((4 * gate * (1 - gate)).detach(), weights, action_mask),
        "ppo_kl": weighted_sum(-difference.detach(), weights, action_mask),
    }
    return Loss(total=total, metrics=metrics)


@checked
def scaled_advantages(advantages: Float[Tensor, " T"], factor: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """factor_t A_t, detached: zero off the mask, and wherever A or the factor is zero, however large the other is.

    Every policy loss here is positively homogeneous in A, L(c A) = c L(A) for c >= 0: so a correction multiplies
    advantages, while the KL and entropy terms, and the reduction's denominators, stay as they were.
    """
    advantages, factor = on_mask(advantages.detach(), action_mask), on_mask(factor.detach(), action_mask)
    return torch.where((advantages == 0) | (factor == 0), 0.0, factor * advantages)
