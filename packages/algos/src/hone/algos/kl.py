"""KL(policy || reference) from samples: estimators, and a loss whose gradient is chosen apart from its value.

With d = logp - ref_logp per token [nats]: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. On policy k1 and k3 are unbiased
values of KL(policy || reference), k2 is biased. As losses, in expectation on policy, k1 has no gradient at all, k2 has
exactly that of KL(policy || reference), k3 that of KL(reference || policy). Off policy, once the policy has left the one that
sampled, a weight rho = policy over sampler makes value and gradient unbiased again (`weighted_kl_loss`).
Reference: J. Schulman, http://joschu.net/blog/kl-approx.html (values); arXiv 2506.09477 (gradients). No gradient is clamped anywhere.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast
from hone.algos.protocol import Loss
from hone.algos.ratios import importance_ratio
from hone.algos.reduce import weighted_sum

LARGEST_VALUE = 1e6
"""Where the value of a penalty whose gradient is chosen apart saturates [nats per token]; k3 overflows 88 nats below the reference."""

Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["reverse", "as_written"]


@checked
def k1(logp: Float[Tensor, " T"], ref_logp: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Per-token d [nats]: unbiased, of either sign."""
    return upcast(logp) - upcast(ref_logp)


@checked
def k2(logp: Float[Tensor, " T"], ref_logp: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Per-token d^2 / 2 [nats^2, read as nats]: biased, never negative, with the right gradient."""
    return 0.5 * (upcast(logp) - upcast(ref_logp)).square()


@checked
def k3(logp: Float[Tensor, " T"], ref_logp: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Per-token exp(-d) - 1 + d [nats]: unbiased, never negative."""
    difference = upcast(logp) - upcast(ref_logp)
    # expm1: at d = 1e-4 in fp32 the plain form answers -1.7e-8 where the truth is 5e-9.
    return torch.expm1(-difference) + difference


ESTIMATORS: dict[Estimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@checked
def kl_per_token(
    logp: Float[Tensor, " T"], ref_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, estimator: Estimator
) -> Float[Tensor, " T"]:
    """The estimator's value at every action token [nats]; zero off the mask."""
    return ESTIMATORS[estimator](on_mask(logp, action_mask), on_mask(ref_logp.detach(), action_mask))


@checked
def kl_loss(
    logp: Float[Tensor, " T"],
    ref_logp: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    coef: float,
    estimator: Estimator,
    gradient: Gradient,
) -> Loss:
    """KL penalty coef * sum_t w_t k_t, with the figure "kl" = sum_t w_t k_t [nats].

    "as_written" differentiates the estimator. "reverse" keeps its value and takes k2's gradient, d per token, straight
    through: on policy that is exactly the gradient of KL(policy || reference), whatever the estimator, and it stays finite.
    """
    value = kl_per_token(logp, ref_logp, action_mask, estimator=estimator)
    if gradient == "reverse":
        value = _straight_through(value, kl_per_token(logp, ref_logp, action_mask, estimator="k1"))
    total = weighted_sum(value, weights, action_mask)
    return Loss(total=coef * total, metrics={"kl": total.detach()})


@checked
def weighted_kl_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    ref_logp: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    coef: float,
    estimator: Estimator,
    ratio_cap: float,
) -> Loss:
    """KL penalty coef * sum_t w_t rho_t k_t with the gradient rho_t d_t, rho = min(exp(logp - old_logp), ratio_cap), a constant.

    Averaged over samples of the OLD policy, value (for k1 and k3) and gradient are those of KL(policy || reference) at each token,
    as long as the cap is out of reach; behind it the pull towards the reference remains, and everything stays finite. On policy it is
    `kl_loss` with gradient "reverse". The figure is "kl". Reference: arXiv 2512.02556 eq 7 (k3).
    Raises ValueError for a cap not above 0 or infinite.
    """
    if not 0 < ratio_cap < math.inf:
        raise ValueError(f"ratio_cap is {ratio_cap}; a finite ratio above 0 is needed, so that no weight overflows (10 is usual)")
    ratio = importance_ratio(logp.detach(), old_logp, action_mask).clamp(max=ratio_cap)
    difference = kl_per_token(logp, ref_logp, action_mask, estimator="k1")
    value = _straight_through(kl_per_token(logp, ref_logp, action_mask, estimator=estimator), difference)
    total = weighted_sum(ratio * value, weights, action_mask)
    return Loss(total=coef * total, metrics={"kl": total.detach()})


def _straight_through(value: Float[Tensor, " T"], difference: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The value with the gradient of d^2 / 2, which is d; where the value overflows it saturates, the gradient does not."""
    return value.detach().clamp(max=LARGEST_VALUE) + difference.detach() * (difference - difference.detach())
