"""Weights of action tokens: the only file that divides a loss by a count.

Before anything is sharded, every action token of an optimiser step gets a weight; every loss is then sum(weights * loss
per token). So micro-batching, packing, accumulation and parallelism can change the speed of a loss, never its value.
Reference: the three means compared in arXiv 2503.14476 (token), 2402.03300 (sequence) and 2503.20783 (constant).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How tokens are averaged.

    "token": every action token of the step weighs the same, 1 / N_tok. "sequence": every row weighs the same, each of
    its action tokens 1 / (N_seq T_i). "constant": 1 / (N_seq length), Dr. GRPO's; its weights need not sum to one.
    """

    over: Literal["token", "sequence", "constant"] = "token"
    """What weighs the same within an optimiser step: every action token, every sequence, or every slot of `length`."""
    length: Annotated[int, Range(low=1)] | None = None
    """Constant divisor C [tokens], at least 1; given with "constant" and only there. The longest response is usual."""

    def __post_init__(self) -> None:
        if self.over not in ("token", "sequence", "constant"):
            raise ValueError(f"reduction {self.over!r}: choose 'token', 'sequence' or 'constant'")
        if (self.over == "constant") != (self.length is not None):
            raise ValueError(f"reduction {self.over!r} with length {self.length}: a length [tokens] belongs to 'constant', and only there")
        if self.length is not None and self.length < 1:
            raise ValueError(f"reduction length is {self.length}; it must be at least 1 token")


@checked
def token_weights(action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], reduction: Reduction) -> Float[Tensor, " T"]:
    """Weight of every token of ONE optimiser step (all rows of all ranks at once); zero off the mask.

    w_t = 1/N_tok | 1/(N_seq T_i) | 1/(N_seq C); N_tok action tokens, T_i of row i, N_seq rows with T_i > 0, C constant.
    A step without action tokens has weights of zero everywhere. Accumulated in fp64, returned in fp32.
    """
    mask = action_mask.to(torch.float64)
    if reduction.over == "token":
        return (mask / mask.sum().clamp(min=1)).float()
    rows = cu_seqlens.numel() - 1
    row_of_token = rows_of_tokens(cu_seqlens)
    per_row = torch.zeros(rows, dtype=torch.float64, device=mask.device).index_add_(0, row_of_token, mask)
    live_rows = (per_row > 0).sum().clamp(min=1)
    if reduction.over == "sequence":
        return (mask / (per_row.clamp(min=1)[row_of_token] * live_rows)).float()
    assert reduction.length is not None
    return (mask / (live_rows * reduction.length)).float()


@checked
def weighted_sum(per_token: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, ""]:
    """sum_t w_t x_t over the action tokens; zero, and still attached to the graph, where there are none."""
    return (on_mask(weights, action_mask) * on_mask(per_token, action_mask)).sum()
