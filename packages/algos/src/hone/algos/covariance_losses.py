"""Policy losses that hold back the few tokens whose log-probability and advantage rise together: Clip-Cov and KL-Cov.

T packed tokens; log-probabilities in nats. Covariances and the choice of tokens are constants, taken over the action
tokens GIVEN: these losses are not additive over cuts. Give them a whole optimiser step, or accept that each micro-batch
chooses its own tokens, as every peer does.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.protocol import Loss
from hone.algos.ratios import importance_ratio, log_ratio
from hone.algos.reduce import weighted_sum


@checked
@torch.no_grad()
def token_covariance(logp: Float[Tensor, " T"], advantages: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Each token's share of cov(logp, A): (logp_t - mean logp) (A_t - mean A) over the action tokens given; zero off the mask.

    High values are tokens whose probability is already high and rises further: they end a policy's entropy.
    Reference: arXiv 2505.22617 eq 10.
    """
    count = action_mask.sum().clamp(min=1)
    logp, advantages = on_mask(logp, action_mask), on_mask(advantages, action_mask)
    product = (logp.double() - logp.double().sum() / count) * (advantages.double() - advantages.double().sum() / count)
    return on_mask(product, action_mask).to(logp.dtype)


@checked
def clip_cov_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    clip_low: float,
    clip_high: float,
    fraction: float,
    cov_low: float,
    cov_high: float,
    generator: torch.Generator,
) -> Loss:
    """Clip-Cov: the clipped surrogate without a few random tokens of high covariance, whose loss is zero.

    Among tokens with cov_low < cov_t < cov_high that PPO's clip leaves a gradient, max(floor(fraction K), 1) are drawn, K
    the action tokens given; all of them if there are fewer. Denominators stay. Paper: fraction 2e-4, bounds 1 and 5.
    The draw is `generator`'s alone, made where it lives, so it is the same on every device.
    Figures of `clipped_surrogate`, and "cov_share" (weighted share of the tokens held back). Reference: arXiv 2505.22617 eq 11, 12.
    """
    ratio = importance_ratio(logp.detach(), old_logp, action_mask)
    signs = on_mask(advantages.detach(), action_mask)
    at_bound = ((signs > 0) & (ratio > 1 + clip_high)) | ((signs < 0) & (ratio < 1 - clip_low))
    covariance = token_covariance(logp, advantages, action_mask)
    candidates = action_mask & ~at_bound & (covariance > cov_low) & (covariance < cov_high)
    draw = torch.rand(logp.shape, generator=generator, device=generator.device).to(logp.device)
    chosen = candidates & (_descending_rank(draw.masked_fill(~candidates, -1.0)) < _quota(action_mask, fraction))
    kept = signs.masked_fill(chosen, 0.0)
    loss = clipped_surrogate(logp, old_logp, kept, weights, action_mask, clip_low=clip_low, clip_high=clip_high)
    return loss + _share(chosen, weights, action_mask, like=loss)


@checked
def kl_cov_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    fraction: float,
    coef: float,
) -> Loss:
    """KL-Cov: the unclipped surrogate -rho A, plus coef |logp - old_logp| on the tokens of highest covariance.

    Those are the max(floor(fraction K), 1) highest, K the action tokens given. The paper writes a KL divergence; its code
    takes the absolute log-ratio, as here. Paper: coef 1, fraction 2e-3 (7B) or 2e-4 (32B). Nothing bounds rho A: a log-ratio beyond
    88 nats (fp32) makes the loss infinite, and two of opposite sign NaN, which the learner refuses.
    Figures of `clipped_surrogate`, and "cov_share" (weighted share of the penalised tokens). Reference: arXiv 2505.22617 eq 13, 14.
    """
    covariance = token_covariance(logp, advantages, action_mask).masked_fill(~action_mask, -math.inf)
    chosen = action_mask & (_descending_rank(covariance) < _quota(action_mask, fraction))
    loss = clipped_surrogate(logp, old_logp, advantages, weights, action_mask, clip_low=1.0, clip_high=math.inf)
    distance = torch.where(chosen, log_ratio(logp, old_logp, action_mask).abs(), 0.0)
    penalty = Loss(total=coef * weighted_sum(distance, weights, action_mask), metrics={})
    return loss + penalty + _share(chosen, weights, action_mask, like=loss)


def _quota(action_mask: Bool[Tensor, " T"], fraction: float) -> Float[Tensor, ""]:
    return (fraction * action_mask.sum().double()).floor().clamp(min=1)


def _descending_rank(values: Float[Tensor, " T"]) -> Int[Tensor, " T"]:
    """Place of each value when sorted downwards, 0 for the highest; no number is read back from the device."""
    order = torch.argsort(values, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _share(chosen: Bool[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, like: Loss) -> Loss:
    share = weighted_sum(chosen.to(like.total.dtype), weights, action_mask)
    return Loss(total=torch.zeros_like(share), metrics={"cov_share": share.detach()})
