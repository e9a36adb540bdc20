"""Policy losses whose importance ratio belongs to a whole row: GSPO, its token form, and GMPO. T packed tokens, N rows.

Log-probabilities in nats; old log-probabilities, advantages and weights are constants. A row's ratio needs all of its
action tokens, so a micro-batch must hold WHOLE rows: these losses are additive over cuts between rows, never within one.
"Every row weighs the same" is the papers' choice: give them the weights of `Reduction(over="sequence")`.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.protocol import Loss
from hone.algos.ratios import log_ratio
from hone.algos.reduce import weighted_sum


@checked
def gspo_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Loss:
    """GSPO: the clipped surrogate of one ratio per row, sum_t w_t L_t with L = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A).

    s_i = exp(mean over row i's action tokens of logp - old_logp), the same on all of them; a clipped row sends nothing
    back, any other sends s_i A / T_i to each token. The paper clips at 3e-4 and 4e-4: the mean makes s far narrower than rho.
    With weights by token, long rows weigh more than the paper has it. `dual_clip` as in `clipped_surrogate`, on s. Needs whole rows.
    Figures: "policy_loss", "ppo_clip_ratio" (weighted share of rows at a bound), "ppo_kl" (old_logp - logp [nats]).
    Reference: arXiv 2507.18071 eq 5 to 7.
    """
    sequence = _row_means(log_ratio(logp, old_logp, action_mask), action_mask, cu_seqlens)
    old = torch.zeros_like(sequence)
    return clipped_surrogate(sequence, old, advantages, weights, action_mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@checked
def gspo_token_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Loss:
    """GSPO-token: the value of the row's ratio, the gradient of the token's own, for advantages that differ within a row.

    s_it = sg[s_i] exp(logp - sg[logp]) in the place of GSPO's s_i, sg the stop-gradient: an unclipped token's gradient is
    -s_i A_t. Where advantages and weights are constant along each row, value and gradient are GSPO's. Needs whole rows.
    Figures as in `gspo_loss`. Reference: arXiv 2507.18071 eq 13 and 14.
    """
    sequence = _row_means(log_ratio(logp.detach(), old_logp, action_mask), action_mask, cu_seqlens)
    carried = sequence + log_ratio(logp, logp.detach(), action_mask)
    old = torch.zeros_like(carried)
    return clipped_surrogate(carried, old, advantages, weights, action_mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


@checked
def gmpo_loss(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    log_clip_low: float,
    log_clip_high: float,
) -> Loss:
    """GMPO: the geometric mean of a row's clipped token ratios, sum_t w_t L_t with L = -exp(mean_row y) A.

    y_t = min(x_t, log_clip_high) where A > 0, max(x_t, -log_clip_low) where A < 0, 0 where A = 0; x = logp - old_logp.
    The bounds are LOG-ratios [nats]: the paper's 0.4 allows ratios from e^-0.4 to e^0.4. A clipped token sends nothing
    back, the rest of its row still does. Where nothing clips it is GSPO where nothing clips. Needs whole rows (see the module).
    Advantages are meant to be constant along a row: where their signs differ, nothing bounds the row, and an overflow is not caught.
    Figures: "policy_loss", "ppo_clip_ratio" (weighted share of tokens at a bound), "ppo_kl" (old_logp - logp [nats]).
    Reference: arXiv 2507.20673 eq 4.
    """
    difference = log_ratio(logp, old_logp, action_mask)
    advantages = on_mask(advantages.detach(), action_mask)
    above = (advantages > 0) & (difference > log_clip_high)
    below = (advantages < 0) & (difference < -log_clip_low)
    bounded = difference.masked_fill(above, log_clip_high).masked_fill(below, -log_clip_low).masked_fill(advantages == 0, 0.0)
    sequence = _row_means(bounded, action_mask, cu_seqlens)
    old = torch.zeros_like(sequence)
    # No bound on the row: all clipping happened token by token.
    loss = clipped_surrogate(sequence, old, advantages, weights, action_mask, clip_low=1.0, clip_high=math.inf)
    metrics = {
        "policy_loss": loss.metrics["policy_loss"],
        "ppo_clip_ratio": weighted_sum((above | below).to(difference.dtype), weights, action_mask),
        "ppo_kl": weighted_sum(-difference.detach(), weights, action_mask),
    }
    return Loss(total=loss.total, metrics=metrics)


def _row_means(
    per_token: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]
) -> Float[Tensor, " T"]:
    """Each row's mean over its action tokens, on all of its tokens, with gradient; zero in a row without action tokens.

    `per_token` is zero off the mask. Summed in fp64: a mean of 3e-4 over 1e5 tokens decides about a clip.
    """
    row = rows_of_tokens(cu_seqlens)
    per_row = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=per_token.device)
    counts = per_row.index_add(0, row, action_mask.double())
    sums = per_row.index_add(0, row, per_token.double())
    return (sums / counts.clamp(min=1))[row].to(per_token.dtype)
