"""The worked examples the golden numbers refer to, packed, in fp64, with NaN in every slot off the action mask.

F1: rows of 3 and 2 action tokens with chosen log-ratios. F2: four scores of one group. F3: one row with a gap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class F1:
    """Two rows; a prompt token before each, an environment token inside the first and after the second."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    action_mask: Tensor
    cu_seqlens: Tensor


def f1(*, sign: float = 1.0) -> F1:
    """F1 with advantages of +sign on the first row and -sign on the second; `logp` asks for a gradient."""
    mask = torch.tensor([False, True, True, False, True, False, True, True, False])
    old_logp = torch.tensor([-1.0, -0.5, -2.0, -0.7, -1.2], dtype=torch.float64)
    logp = old_logp + torch.tensor([0.0, 0.3, -0.4, 0.5, -0.1], dtype=torch.float64)
    ref_logp = logp - torch.tensor([0.2, -0.5, 1.0, 0.0, -1.5], dtype=torch.float64)
    advantages = sign * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    return F1(
        logp=scatter(logp, mask).requires_grad_(),
        old_logp=scatter(old_logp, mask),
        ref_logp=scatter(ref_logp, mask),
        advantages=scatter(advantages, mask),
        action_mask=mask,
        cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32),
    )


def f2() -> Tensor:
    """Scores of one group of four."""
    return torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)


def f3() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rewards, values, action_mask, cu_seqlens) of one row of five tokens, the third the environment's."""
    rewards = torch.tensor([0.0, 0.0, NAN, 0.0, 1.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.6, NAN, 0.4, 0.7], dtype=torch.float64)
    return rewards, values, torch.tensor([True, True, False, True, True]), torch.tensor([0, 5], dtype=torch.int32)


def scatter(live: Tensor, mask: Tensor) -> Tensor:
    """The live numbers on the mask, NaN elsewhere."""
    return torch.full(mask.shape, NAN, dtype=live.dtype).masked_scatter(mask, live)
