"""From packed tokens to pairs of answers. T packed tokens, N rows, P pairs; log-probabilities in nats.

Pairs lie side by side: row 2i is pair i's chosen answer, row 2i + 1 its rejected one. `row_logp` or `row_mean_logp` ->
`split_pairs` -> a loss of `preference.py` or `reward_models.py`; `pair_weights` settles the weights once per optimiser step.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast
from hone.algos.protocol import Loss
from hone.algos.reduce import Reduction, token_weights, weighted_sum


@checked
def row_logp(logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " N"]:
    """s_i = sum over row i's action tokens of logp_t [nats], added up in fp64, with gradient; zero for a row without any.

    Of `upcast(logp) - upcast(ref_logp)` it is the row's log-ratio: differences first, since sums of thousands of tokens are large.
    """
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=logp.device)
    live = on_mask(logp, action_mask)
    return sums.index_add(0, rows_of_tokens(cu_seqlens), live.double()).to(live.dtype)


@checked
def row_mean_logp(logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " N"]:
    """a_i = s_i / T_i [nats per token], T_i action tokens: what IPO, SimPO and ORPO compare. Zero for a row without any."""
    lengths = row_logp(action_mask.double(), action_mask, cu_seqlens)
    return (row_logp(logp, action_mask, cu_seqlens).double() / lengths.clamp(min=1)).to(upcast(logp).dtype)


@checked
def split_pairs(per_row: Float[Tensor, " N"]) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """(chosen, rejected): the even rows and the odd ones. Raises ValueError for an odd number of rows."""
    if per_row.numel() % 2:
        raise ValueError(f"per_row has {per_row.numel()} rows; pairs need an even number: chosen, rejected, chosen, rejected, ...")
    return per_row[0::2], per_row[1::2]


@checked
def pair_weights(pair_mask: Bool[Tensor, " P"]) -> Float[Tensor, " P"]:
    """1 / (pairs on the mask) for each of them, zero elsewhere; of ONE optimiser step, all ranks at once. Serves KTO's rows too.

    Leave out pairs with an answer of no tokens.
    """
    return token_weights(pair_mask, torch.arange(pair_mask.numel() + 1, device=pair_mask.device), Reduction())


@checked
def paired_loss(
    per_pair: Float[Tensor, " P"],
    chosen_reward: Float[Tensor, " P"],
    rejected_reward: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    name: str,
) -> Loss:
    """sum_i w_i x_i, with the figures of all paired losses: `name`, "chosen_reward", "rejected_reward" and "accuracy".

    Rewards are what was compared (beta times a log-ratio, or a score); accuracy is the weighted share of pairs with chosen > rejected.
    """
    total = weighted_sum(per_pair, weights, pair_mask)
    won = (chosen_reward > rejected_reward).to(per_pair.dtype)
    metrics = {
        name: total.detach(),
        "chosen_reward": weighted_sum(chosen_reward.detach(), weights, pair_mask),
        "rejected_reward": weighted_sum(rejected_reward.detach(), weights, pair_mask),
        "accuracy": weighted_sum(won, weights, pair_mask),
    }
    return Loss(total=total, metrics=metrics)
