"""Reward-model losses: weighted sums over pairs, to be minimised. P pairs; scores in units of reward.

`chosen` and `rejected` are the model's scores of the two answers. Pairs off `pair_mask` may hold anything and change nothing.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.pairs import paired_loss
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def bradley_terry(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    margins: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
) -> Loss:
    """sum_i w_i softplus(m_i - (r_w - r_l)) = -log sigmoid(r_w - r_l - m) over a reward model's scores; m = 0 for no margin.

    Figures "rm_loss", "chosen_reward", "rejected_reward", "accuracy". Exact where log(1 + exp(r_l - r_w)) overflows.
    Reference: arXiv 2203.02155 eq 1; 2307.09288 eq 2 (margin).
    """
    chosen, rejected, margins = on_mask(chosen, pair_mask), on_mask(rejected, pair_mask), on_mask(margins.detach(), pair_mask)
    return paired_loss(-logsigmoid(chosen - rejected - margins), chosen, rejected, weights, pair_mask, name="rm_loss")


@checked
def log_exp(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], weights: Float[Tensor, " P"], pair_mask: Bool[Tensor, " P"]
) -> Loss:
    """sum_i w_i log(1 + exp(r_l - r_w)), through softplus: Bradley-Terry without a margin. Reference: arXiv 2112.00861 eq 3.1."""
    return bradley_terry(chosen, rejected, torch.zeros_like(chosen), weights, pair_mask)


@checked
def reward_centre(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], weights: Float[Tensor, " P"], pair_mask: Bool[Tensor, " P"], *, coef: float
) -> Loss:
    """Coef * sum_i w_i (r_w + r_l)^2: pairs fix only differences, this the level. The figure is "centre". Reference: arXiv 2312.09244."""
    total = weighted_sum((on_mask(chosen, pair_mask) + on_mask(rejected, pair_mask)).square(), weights, pair_mask)
    return Loss(total=coef * total, metrics={"centre": total.detach()})
