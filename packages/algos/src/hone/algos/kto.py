"""KTO: answers judged good or bad one by one, against an anchor. M mismatched rows, N judged rows; log-ratios in nats.

Flow: mismatched rows (prompt i with another prompt's answer) -> `anchor_sums` on every rank -> added up over ranks ->
`kl_anchor` -> `kto_loss`. Sums and counts are added, never means: a mean of the ranks' means depends on how rows were dealt out.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
@torch.no_grad()
def anchor_sums(log_ratios: Float[Tensor, " M"], row_mask: Bool[Tensor, " M"]) -> Float[Tensor, "2"]:
    """(sum, count) of the mismatched rows' log-ratios, in fp64: what ranks and micro-batches add up."""
    return torch.stack([on_mask(log_ratios, row_mask).double().sum(), row_mask.double().sum()])


@checked
@torch.no_grad()
def kl_anchor(sums: Float[Tensor, "2"]) -> Float[Tensor, ""]:
    """z_0 = max(0, sum / count), a rough KL(policy || reference) [nats], of the whole optimiser step's `anchor_sums`.

    Reads the count on the host, so call it once per step. Raises ValueError for fewer than two rows: the only other answer a
    batch of one has is its own, and z_0 would be the very log-ratio it is to be compared with.
    Reference: arXiv 2402.01306, "KL estimate" (unnumbered).
    """
    count = int(sums[1])
    if count < 2:
        raise ValueError(f"KTO's anchor has {count} mismatched rows; it needs at least 2 per optimiser step: raise train.batch_size")
    return (sums[0] / count).clamp(min=0.0)


@checked
def kto_loss(
    log_ratios: Float[Tensor, " N"],
    desirable: Bool[Tensor, " N"],
    weights: Float[Tensor, " N"],
    row_mask: Bool[Tensor, " N"],
    anchor: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """sum_i w_i lambda_i (1 - sigmoid(beta (r - z_0))) for good answers, (1 - sigmoid(beta (z_0 - r))) for bad; r log-ratios.

    The anchor is a constant. Choose lambda so that lambda_D n_D / (lambda_U n_U) lies in [1, 3/2] (eq 9; 4/3 in the first version);
    one kind alone is no error.
    Figures "preference_loss", "kl_anchor" (weighted, so it adds up to z_0), "chosen_reward" and "rejected_reward" (sums of
    w beta r over good and over bad answers). Reference: arXiv 2402.01306 eq 8.
    """
    reward = beta * on_mask(log_ratios, row_mask)
    threshold = beta * anchor.detach().to(reward)
    sign = torch.where(desirable, 1.0, -1.0).to(reward)
    scale = torch.where(desirable, desirable_weight, undesirable_weight).to(reward)
    # 1 - sigmoid(x) = sigmoid(-x), which does not cancel.
    total = weighted_sum(scale * torch.sigmoid(sign * (threshold - reward)), weights, row_mask)
    figures = reward.detach()
    metrics = {
        "preference_loss": total.detach(),
        "kl_anchor": weighted_sum(anchor.detach().to(reward).expand_as(reward), weights, row_mask),
        "chosen_reward": weighted_sum(figures, weights, row_mask & desirable),
        "rejected_reward": weighted_sum(figures, weights, row_mask & ~desirable),
    }
    return Loss(total=total, metrics=metrics)
