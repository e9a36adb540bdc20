"""GAE with one lambda for the policy and another for the critic, and a lambda that grows with a row's length.

T packed tokens, N rows. A lambda below one costs a late reward most of its way to the first token; a
critic's targets need none (lambda = 1 has no bias), and a long row needs one nearer to one than a short row does.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import gae
from hone.algos.checks import checked
from hone.algos.group_baselines import action_counts


@checked
@torch.no_grad()
def decoupled_gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    policy_lambd: float,
    value_lambd: float,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """(A under policy_lambd, A + V under value_lambd): two passes of `gae`, whose conventions hold.

    Reference: arXiv 2503.01491 (policy 0.95, critic 1).
    """
    advantages, _ = gae(rewards, values, action_mask, cu_seqlens, gamma=gamma, lambd=policy_lambd, bootstrap=bootstrap)
    _, returns = gae(rewards, values, action_mask, cu_seqlens, gamma=gamma, lambd=value_lambd, bootstrap=bootstrap)
    return advantages, returns


@checked
def length_adaptive_lambda(lengths: Int[Tensor, " N"], *, alpha: float) -> Float[Tensor, " N"]:
    """lambda_i = max(0, 1 - 1 / (alpha l_i)), l_i the action tokens [tokens] of row i; zero for a row without any.

    From sum_k lambda^k = 1 / (1 - lambda) = alpha l. Up to l = 1 / alpha that gives none at all, hence the bound at zero.
    Reference: arXiv 2504.05118 eq 4 and 5. Raises ValueError for an alpha that is not above zero.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; a lambda that grows with the length needs one above 0")
    return torch.where(lengths > 0, (1 - 1 / (alpha * lengths.double())).clamp(min=0), 0.0)


@checked
@torch.no_grad()
def length_adaptive_gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    alpha: float,
    value_lambd: float,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """VAPO's: (A under `length_adaptive_lambda`, A + V under value_lambd).

    Reference: arXiv 2504.05118 eq 4 and 5 (alpha 0.05, critic 1). Raises ValueError for an alpha that is not above zero.
    """
    lambd = length_adaptive_lambda(action_counts(action_mask, cu_seqlens), alpha=alpha)
    advantages, _ = gae(rewards, values, action_mask, cu_seqlens, gamma=gamma, lambd=lambd, bootstrap=bootstrap)
    _, returns = gae(rewards, values, action_mask, cu_seqlens, gamma=gamma, lambd=value_lambd, bootstrap=bootstrap)
    return advantages, returns
