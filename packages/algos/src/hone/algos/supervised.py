"""Supervised losses: weighted sums over the tokens to imitate. T packed tokens; log-probabilities in nats."""

from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def nll(logp: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Loss:
    """Negative log-likelihood, -sum_t w_t logp_t [nats], with the figure "nll"; by token it is the mean cross-entropy."""
    total = -weighted_sum(logp, weights, action_mask)
    return Loss(total=total, metrics={"nll": total.detach()})
