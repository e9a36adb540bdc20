"""The critic's losses: weighted sums over action tokens. T packed tokens; values and returns in units of reward."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def squared_value_loss(
    values: Float[Tensor, " T"], returns: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> Loss:
    """sum_t w_t (V - R)^2 / 2, with the figures "critic_loss", "values" and "returns" (weighted sums of V and R)."""
    values, returns = on_mask(values, action_mask), on_mask(returns.detach(), action_mask)
    return _loss(0.5 * (values - returns).square(), values, returns, weights, action_mask)


@checked
def clipped_value_loss(
    values: Float[Tensor, " T"],
    old_values: Float[Tensor, " T"],
    returns: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    clip: float,
) -> Loss:
    """sum_t w_t max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2: no reward for moving V further than c at once.

    The gradient is zero where the clipped branch is the larger. Figures as in `squared_value_loss`.
    Reference: arXiv 1909.08593 (its code), which has no equation for it.
    """
    values, returns = on_mask(values, action_mask), on_mask(returns.detach(), action_mask)
    old_values = on_mask(old_values.detach(), action_mask)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return _loss(0.5 * torch.maximum((values - returns).square(), (near - returns).square()), values, returns, weights, action_mask)


def _loss(
    per_token: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    returns: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
) -> Loss:
    total = weighted_sum(per_token, weights, action_mask)
    metrics = {
        "critic_loss": total.detach(),
        "values": weighted_sum(values.detach(), weights, action_mask),
        "returns": weighted_sum(returns, weights, action_mask),
    }
    return Loss(total=total, metrics=metrics)
