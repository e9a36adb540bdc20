"""KL(policy || reference) from samples: estimators, and a loss whose gradient is chosen apart from its value.

With d = logp - ref_logp per token [nats]: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. On policy k1 and k3 are unbiased
values of KL(policy || reference), k2 is biased. As losses, in expectation on policy, k1 has no gradient at all, k2 has
exactly that of KL(policy || reference), k3 that of KL(reference || policy).
Reference: J. Schulman, http://joschu.net/blog/kl-approx.html (values); arXiv 2506.09477 (gradients). No clamp anywhere.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum

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
    return ESTIMATORS[estimator](on_mask(logp, action_mask), on_mask(ref_logp, action_mask))


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
        carrier = kl_per_token(logp, ref_logp, action_mask, estimator="k2")
        value = value.detach() + (carrier - carrier.detach())
    total = weighted_sum(value, weights, action_mask)
    return Loss(total=coef * total, metrics={"kl": total.detach()})
