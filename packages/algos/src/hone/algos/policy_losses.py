"""Policy losses: weighted sums over action tokens, to be minimised. T packed tokens; log-probabilities and entropy in nats.

Old log-probabilities, advantages and weights are constants; only `logp` and `entropy` carry a gradient.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.kernels import Kernels, kernels_for
from hone.algos.masking import cleared, known_exp, ones_where
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum

CUT_TOKENS = 2**18
"""On a CPU the loss is summed over cuts of so many tokens, whose intermediate results stay in its cache."""


@checked
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
    Large fp32 input takes a native path where there is one (`hone.algos.kernels`).
    Reference: arXiv 1707.06347 eq 7; 2503.14476 (two sides); 1912.09729 eq 5 (dual clip, which writes c A as a maximum).
    """
    per_token = (logp, old_logp.detach(), advantages.detach(), weights.detach())
    bounds = {"lowest": 1 - clip_low, "highest": 1 + clip_high, "dual_clip": math.inf if dual_clip is None else dual_clip}
    kernels = kernels_for(*per_token)
    if kernels is not None:
        total, clipped, kl = _native_sums(kernels, bounds, *per_token, action_mask)
    else:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in per_token), torch.float32)
        tokens = CUT_TOKENS if logp.device.type == "cpu" else max(logp.numel(), 1)
        cuts = zip(*(torch.split(tensor, tokens) for tensor in (*(tensor.to(dtype) for tensor in per_token), action_mask)), strict=True)
        sums = [_surrogate_sums(*cut, **bounds) for cut in cuts]
        total, clipped, kl = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return Loss(total=total, metrics={"policy_loss": total.detach(), "ppo_clip_ratio": clipped, "ppo_kl": kl})


@checked
def entropy_bonus(entropy: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, coef: float) -> Loss:
    """-coef * sum_t w_t H_t, H_t the entropy [nats] of the distribution a token was drawn from; the figure is "entropy"."""
    mean = weighted_sum(entropy, weights, action_mask)
    return Loss(total=-coef * mean, metrics={"entropy": mean.detach()})


def _surrogate_sums(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    lowest: float,
    highest: float,
    dual_clip: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """(loss, weight of the tokens at a bound, weighted old_logp - logp)."""
    ones = ones_where(action_mask, logp.dtype)
    advantage, weight = cleared(advantages, ones), cleared(weights, ones)
    difference = logp - old_logp  # garbage off the mask, where the advantage is zero
    ratio = torch.exp(difference.detach())
    bounded = ratio.clamp(lowest, highest)
    at_bound = ((ratio - bounded) * advantage).gt_(0)  # 1 where too high for a good token, or too low for a bad one, else 0
    if dual_clip < math.inf:
        above = (advantage < 0) & (ratio > dual_clip)
        bounded, at_bound = bounded.masked_fill_(above, dual_clip), at_bound.masked_fill_(above, 1.0)
    held = ones_where(at_bound.bool(), logp.dtype)
    # Only tokens that keep their gradient have a ratio here: behind a bound, or times a zero advantage, an overflow would
    # turn into 0 * inf = NaN on the way back.
    moving = ones_where(advantage.bool(), logp.dtype) & ~held
    price = weight * advantage
    free_ratio = known_exp(difference, cleared(ratio, moving))
    total = -((price * free_ratio).sum() + cleared(price * bounded, held).sum())
    return total, (weight * at_bound).sum(), -(weight * cleared(difference.detach(), ones)).sum()


def _native_sums(
    kernels: Kernels, bounds: Mapping[str, float], *per_token: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """What `_surrogate_sums` answers; one pass gives that and the gradient by logp."""
    total, figures = cast("tuple[Tensor, Tensor]", _NativeSurrogate.apply(kernels, bounds, *per_token))  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    return total, figures[0], figures[1]


class _NativeSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, bounds: Mapping[str, float], logp: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        sums, slope = kernels.surrogate(logp, *constants, **bounds)
        ctx.bounds = bounds
        ctx.save_for_backward(slope, logp, *constants)
        figures = sums[1:].to(logp.dtype)
        ctx.mark_non_differentiable(figures)
        return sums[0].to(logp.dtype), figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        slope, logp, *constants = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which only the plain path has
            total, _, _ = _surrogate_sums(logp, *constants, **ctx.bounds)
            (slope,) = torch.autograd.grad(total, logp, create_graph=True)
        return None, None, slope * grad_outputs[0], *(None for _ in constants)
