"""How far the engine that sampled and the learner are apart, and what a correction leaves of a sample. Constants; T packed tokens, N rows.

u_t = old_logp_t - rollout_logp_t [nats] of the same policy version: zero if both computed alike.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.corrections import log_weights
from hone.algos.masking import on_mask
from hone.algos.ratios import log_ratio
from hone.algos.reduce import weighted_sum


@checked
def sample_size_figures(
    correction: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> dict[str, Float[Tensor, ""]]:
    """The sums that `effective_sample_size` needs, additive over cuts: sum w, sum w c and sum w c^2, c the correction."""
    # Squares in fp64: corrections of 1e25 are as good as any other if they are all alike.
    own = on_mask(correction.detach(), action_mask).double()
    return {
        "correction_mass": on_mask(weights, action_mask).double().sum().detach(),
        "correction": weighted_sum(own, weights, action_mask).detach(),
        "correction_square": weighted_sum(own.square(), weights, action_mask).detach(),
    }


@checked
def effective_sample_size(figures: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """ESS as a share of all samples, (sum w c)^2 / (sum w sum w c^2) in [0, 1]: 1 iff the corrections are equal, 0 if none is left.

    With weights by token it counts tokens, with weights by sequence and a sequence-level correction rows.
    """
    denominator = figures["correction_mass"] * figures["correction_square"]
    # An overflowed square means that one sample outweighs all others.
    share = (figures["correction"].square() / denominator).clamp(max=1.0)  # above it by rounding alone
    return torch.where((denominator == 0) | denominator.isinf(), 0.0, share)


@checked
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
