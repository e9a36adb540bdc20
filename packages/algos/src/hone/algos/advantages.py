"""Advantages and returns: constants, zero off the action mask, computed in fp64 over a whole rollout.

T packed tokens, N rows, K action tokens. "Next" always means the row's next action token: tokens of the environment
between two turns are no steps of the policy, so nothing is discounted, and no value is read, across such a gap.
"""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.checks import MEND_REWARDS, checked, require_finite
from hone.algos.kernels import kernels_for, plain
from hone.algos.masking import cleared, ones_where, upcast

VARIANCE_FLOOR = 1e-8
"""Smallest variance that whitening divides by."""


@checked
@torch.no_grad()
def gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    lambd: float | Float[Tensor, " N"],
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Generalised advantage estimation: A_t = delta_t + gamma lambda A_t', delta_t = r_t + gamma V_t' - V_t; returns A + V.

    t' is the row's next action token. After the last one V is zero, or `bootstrap` (the value of the state a row was
    cut off in; zero for rows that ended). `lambd` is one number, or one per row. Returns (advantages, returns), neither
    whitened. Large fp32 input takes a native path where there is one (`hone.algos.kernels`).
    Reference: arXiv 1506.02438 eq 16. Raises ValueError for a reward, a value on the mask, a lambda or a bootstrap
    that is not finite.
    """
    if bootstrap is None:
        bootstrap = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=values.device)
    kernels = kernels_for(rewards, values)
    path = plain.gae if kernels is None else kernels.gae
    advantages, returns, finite = path(rewards, values, action_mask, cu_seqlens, gamma=gamma, lambd=lambd, bootstrap=bootstrap.double())
    # What is not finite comes out again, so one look at the advantages does for both inputs.
    if not finite:
        require_finite("gae", "rewards", rewards, action_mask, remedy=MEND_REWARDS)
        require_finite("gae", "values", values, action_mask, remedy="go back to an earlier checkpoint of the critic")
        if isinstance(lambd, Tensor):
            require_finite("gae", "lambd", lambd, remedy="give every row one in [0, 1]")
        require_finite("gae", "bootstrap", bootstrap, remedy="go back to an earlier checkpoint of the critic")
    return advantages, returns


@checked
@torch.no_grad()
def discounted_returns(
    rewards: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], *, gamma: float
) -> Float[Tensor, " T"]:
    """Reward to go: G_t = r_t + gamma G_t', t' the row's next action token. It is `gae` with lambda 1 and no values.

    Raises ValueError for a reward on the mask that is not finite.
    """
    return gae(rewards, torch.zeros_like(rewards), action_mask, cu_seqlens, gamma=gamma, lambd=1.0)[1]


@checked
@torch.no_grad()
def row_sums(per_token: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " N"]:
    """Sum over each row's action tokens; of rewards, that is the row's score."""
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=per_token.device)
    sums.index_add_(0, rows_of_tokens(cu_seqlens), cleared(per_token.double(), ones_where(action_mask, torch.float64)))
    return sums.to(upcast(per_token).dtype)


@checked
@torch.no_grad()
def spread(per_row: Float[Tensor, " N"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " T"]:
    """Each row's number on all of its action tokens."""
    per_token = torch.repeat_interleave(upcast(per_row), cu_seqlens.diff().long())
    return cleared(per_token, ones_where(action_mask, per_token.dtype))


@checked
@torch.no_grad()
def group_centred(scores: Float[Tensor, " N"], group: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """A_i = r_i - mean of its group. Exactly zero in a group of equal scores, and so in a group of one.

    Groups are told by id, never by position. Reference: arXiv 2503.20783. Raises ValueError for a score that is not finite.
    """
    index, sizes = _group_sizes(group)
    return _centred(scores.double(), index, sizes).to(upcast(scores).dtype)


@checked
@torch.no_grad()
def group_normalised(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], *, eps: float) -> Float[Tensor, " N"]:
    """A_i = (r_i - mean) / (std + eps) within its group. Exactly zero in a group of equal scores, and so in a group of one.

    std divides by n - 1. The paper gives neither that choice nor eps. Reference: arXiv 2402.03300 section 4.1.2.
    Raises ValueError for a score that is not finite.
    """
    index, sizes = _group_sizes(group)
    centred = _centred(scores.double(), index, sizes)
    squares = centred.new_zeros(sizes.shape).scatter_add_(0, index, centred.square())
    scale = (squares / (sizes - 1).clamp(min=1)).sqrt() + eps
    # A group of equal scores is all zeros, which must stay zeros for eps = 0 too.
    scale.masked_fill_(scale == 0, 1.0)
    return (centred / scale.index_select(0, index)).to(upcast(scores).dtype)


@checked
@torch.no_grad()
def group_index(group: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Groups renumbered from zero without gaps, in the order of their ids, so that they can index."""
    if _can_index(group):
        present = torch.bincount(group) > 0
        return (present.cumsum(0) - 1).index_select(0, group)
    _, index = cast("tuple[Tensor, Tensor]", torch.unique(group, return_inverse=True))  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    return index


@checked
@torch.no_grad()
def whiten(advantages: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """(A - mean) / std over all action tokens, each weighing the same; exactly zero if all are equal.

    Two passes: E[x^2] - mean^2 cancels. The variance divides by the count (as OpenRLHF's does) and is at least 1e-8.
    """
    ones = ones_where(action_mask, torch.float64)
    count = action_mask.sum().clamp(min=1)
    numbers = advantages.double()
    # From one of the numbers themselves, so that equal ones are exact zeros whatever their mean is rounded to.
    one_of_them = numbers.index_select(0, action_mask.int().argmax()[None]) if numbers.numel() else 0.0
    shifted = cleared(numbers - one_of_them, ones)
    centred = cleared(shifted - shifted.sum() / count, ones)
    deviation = (centred.square().sum() / count).clamp(min=VARIANCE_FLOOR).sqrt()
    return (centred / deviation).to(upcast(advantages).dtype)


def _can_index(group: Int[Tensor, " N"]) -> bool:
    """Whether the ids are few enough numbers from zero to index a table by themselves."""
    if group.numel() == 0:
        return False
    lowest, highest = group.aminmax()
    return int(lowest) >= 0 and int(highest) < 4 * group.numel()


def _group_sizes(group: Int[Tensor, " N"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " G"]]:
    """(indices that tell the groups apart, rows of each index); gaps, of no rows, are left in: sorting is dear."""
    index = group.long() if _can_index(group) else group_index(group)
    return index, torch.bincount(index)


def _centred(scores: Float[Tensor, " N"], index: Int[Tensor, " N"], sizes: Int[Tensor, " G"]) -> Float[Tensor, " N"]:
    # From one of the group's own scores: where all are equal that is exactly zero, and so is its mean. Seven copies of 0.1
    # have a mean off by 1e-17, which a small eps would blow up to an advantage of -0.8.
    one_of_group = scores.new_zeros(sizes.shape).scatter_(0, index, scores)
    shifted = scores - one_of_group.index_select(0, index)
    mean = scores.new_zeros(sizes.shape).scatter_add_(0, index, shifted) / sizes
    centred = shifted - mean.index_select(0, index)
    if not math.isfinite(centred.sum()):
        require_finite("group statistics", "scores", scores, remedy=MEND_REWARDS)
    return centred
