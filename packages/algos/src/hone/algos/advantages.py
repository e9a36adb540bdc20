"""Advantages and returns: constants, zero off the action mask, computed in fp64 over a whole rollout.

T packed tokens, N rows, K action tokens. "Next" always means the row's next action token: tokens of the environment
between two turns are no steps of the policy, so nothing is discounted, and no value is read, across such a gap.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import rows_of_tokens
from hone.algos.masking import upcast

VARIANCE_FLOOR = 1e-8
"""Smallest variance that whitening divides by."""


@torch.no_grad()
def gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    lambd: float,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Generalised advantage estimation: A_t = delta_t + gamma lambda A_t', delta_t = r_t + gamma V_t' - V_t; returns A + V.

    t' is the row's next action token. After the last one V is zero, or `bootstrap` (the value of the state a row was
    cut off in; zero for rows that ended). Returns (advantages, returns), neither whitened.
    Reference: arXiv 1506.02438 eq 16.
    """
    row = rows_of_tokens(cu_seqlens)[action_mask]
    reward, value = rewards[action_mask].double(), values[action_mask].double()
    value_after = torch.zeros_like(value) if bootstrap is None else bootstrap.double()[row]
    last = row != torch.roll(row, -1)
    last[-1:] = True
    delta = reward + gamma * torch.where(last, value_after, torch.roll(value, -1)) - value
    advantage = _discounted_suffix_sums(delta, row, discount=gamma * lambd)
    return _onto_tokens(advantage, action_mask, like=values), _onto_tokens(advantage + value, action_mask, like=values)


@torch.no_grad()
def discounted_returns(
    rewards: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], *, gamma: float
) -> Float[Tensor, " T"]:
    """Reward to go: G_t = r_t + gamma G_t', t' the row's next action token."""
    sums = _discounted_suffix_sums(rewards[action_mask].double(), rows_of_tokens(cu_seqlens)[action_mask], discount=gamma)
    return _onto_tokens(sums, action_mask, like=rewards)


@torch.no_grad()
def row_sums(per_token: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " N"]:
    """Sum over each row's action tokens; of rewards, that is the row's score."""
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=per_token.device)
    sums.index_add_(0, rows_of_tokens(cu_seqlens)[action_mask], per_token[action_mask].double())
    return sums.to(upcast(per_token).dtype)


@torch.no_grad()
def spread(per_row: Float[Tensor, " N"], action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " T"]:
    """Each row's number on all of its action tokens."""
    return torch.where(action_mask, upcast(per_row)[rows_of_tokens(cu_seqlens)], 0.0)


@torch.no_grad()
def group_centred(scores: Float[Tensor, " N"], group: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """A_i = r_i - mean of its group. Exactly zero in a group of equal scores, and so in a group of one.

    Groups are told by id, never by position. Reference: arXiv 2503.20783.
    """
    return _centred(scores.double(), _group_index(group)).to(upcast(scores).dtype)


@torch.no_grad()
def group_normalised(scores: Float[Tensor, " N"], group: Int[Tensor, " N"], *, eps: float) -> Float[Tensor, " N"]:
    """A_i = (r_i - mean) / (std + eps) within its group. Exactly zero in a group of equal scores, and so in a group of one.

    std divides by n - 1. The paper gives neither that choice nor eps. Reference: arXiv 2402.03300 section 4.1.2.
    """
    index = _group_index(group)
    centred = _centred(scores.double(), index)
    squares = torch.zeros_like(centred).index_add_(0, index, centred.square())
    variance = squares / (torch.bincount(index, minlength=index.numel()) - 1).clamp(min=1)
    # Zeros stay zeros for eps = 0 too, where a group of equal scores would be 0 / 0.
    advantages = torch.where(centred == 0, 0.0, centred / (variance.sqrt() + eps)[index])
    return advantages.to(upcast(scores).dtype)


@torch.no_grad()
def whiten(advantages: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """(A - mean) / std over all action tokens, each weighing the same; exactly zero if all are equal.

    Two passes: E[x^2] - mean^2 cancels. The variance divides by the count (as OpenRLHF's does) and is at least 1e-8.
    """
    live = advantages[action_mask].double()
    if live.numel() == 0 or bool(live.max() == live.min()):
        return _onto_tokens(torch.zeros_like(live), action_mask, like=advantages)
    centred = live - live.mean()
    return _onto_tokens(centred / centred.square().mean().clamp(min=VARIANCE_FLOOR).sqrt(), action_mask, like=advantages)


def _discounted_suffix_sums(terms: Float[Tensor, " K"], row: Int[Tensor, " K"], *, discount: float) -> Float[Tensor, " K"]:
    """s_k = x_k + discount s_{k + 1} within each row, by doubling: log2(longest row) vector operations, no loop over time.

    After each pass s_k sums `span` terms; the next adds discount^span times the span that follows.
    """
    longest = int(torch.bincount(row).max()) if row.numel() else 0
    span, factor = 1, discount
    while span < longest:
        following = torch.where(row[span:] == row[:-span], factor * terms[span:], 0.0)
        terms = torch.cat([terms[:-span] + following, terms[-span:]])
        span, factor = 2 * span, factor * factor
    return terms


def _onto_tokens(per_action: Float[Tensor, " K"], action_mask: Bool[Tensor, " T"], *, like: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Action tokens back in their places among all tokens, zero elsewhere, in the precision of `like` (at least fp32)."""
    dtype = upcast(like).dtype
    return torch.zeros(action_mask.shape, dtype=dtype, device=like.device).masked_scatter_(action_mask, per_action.to(dtype))


def _group_index(group: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Groups renumbered from zero, so that their number is at most N."""
    order = torch.argsort(group, stable=True)
    first = torch.ones_like(order)
    first[:1] = 0
    first[1:] = group[order[1:]] != group[order[:-1]]
    return torch.empty_like(order).scatter_(0, order, first.cumsum(0))


def _centred(scores: Float[Tensor, " N"], index: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    total = torch.zeros_like(scores).index_add_(0, index, scores)
    mean = total / torch.bincount(index, minlength=index.numel()).clamp(min=1)
    lowest = torch.zeros_like(scores).scatter_reduce_(0, index, scores, "amin", include_self=False)
    highest = torch.zeros_like(scores).scatter_reduce_(0, index, scores, "amax", include_self=False)
    # Equality, not a small spread: seven copies of 0.1 have a mean off by 1e-17, which a small eps would blow up to an
    # advantage of -0.8. A NaN equals nothing, so it is not hidden either.
    return torch.where((highest == lowest)[index], 0.0, scores - mean[index])
