"""Credit finer than a row: one step per turn (GAE), turns that start from one state (GiGPO), steps of a process reward (GRPO).

T packed tokens, N rows, K turns. A turn is a row's unbroken run of action tokens. Results are constants, zero off the
action mask, computed in fp64.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.advantages import discounted_returns, gae, group_centred, group_index, group_normalised, row_sums, spread
from hone.algos.batch import rows_of_tokens
from hone.algos.checks import MEND_REWARDS, checked, require_finite
from hone.algos.group_baselines import action_counts
from hone.algos.masking import upcast


@checked
@torch.no_grad()
def turn_starts(action_mask: Bool[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"]) -> Bool[Tensor, " T"]:
    """True on the first action token of every turn; a turn never runs on into the next row."""
    row = rows_of_tokens(cu_seqlens)
    starts = action_mask.clone()
    starts[1:] &= ~action_mask[:-1] | (row[1:] != row[:-1])
    return starts


@checked
@torch.no_grad()
def turn_gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    lambd: float,
    bootstrap: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """GAE with one step per turn: A_k = delta_k + gamma lambda A_{k + 1}, delta_k = r_k + gamma V_{k + 1} - V_k.

    r_k is the sum of the turn's rewards, V_k the value before its first action token; gamma and lambda count turns, so
    a long answer is discounted no more than a short one. Advantage and return (A + V) stand on every token of the turn.
    `bootstrap` as in `gae`. A KL penalty per token belongs on top of the result, not into `rewards`.
    Reference: arXiv 1506.02438 eq 16, with turns for steps.
    """
    starts = turn_starts(action_mask, cu_seqlens)
    per_turn = _sums_on_starts(rewards, starts, action_mask)
    advantages, returns = gae(per_turn, values.double(), starts, cu_seqlens, gamma=gamma, lambd=lambd, bootstrap=bootstrap)
    return _over_turns(advantages, starts, action_mask, like=values), _over_turns(returns, starts, action_mask, like=values)


@checked
@torch.no_grad()
def anchor_centred(
    rewards: Float[Tensor, " T"],
    anchors: Int[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    group: Int[Tensor, " N"],
    *,
    gamma: float,
) -> Float[Tensor, " T"]:
    """GiGPO's step advantage with F = 1: A_k = R_k - mean over the prompt's turns that start from the same state.

    R_k = sum_j gamma^j r_{k + j} over the row's turns. `anchors` is read at a turn's first action token: the id of the
    environment's state there. A state met once tells nothing: exactly zero. Reference: arXiv 2505.10978 eq 3 to 8.
    """
    starts = turn_starts(action_mask, cu_seqlens)
    to_go, cell = _anchored_returns(rewards, anchors, starts, action_mask, cu_seqlens, group, gamma=gamma)
    return _over_turns(_scattered(group_centred(to_go, cell), starts), starts, action_mask, like=rewards)


@checked
@torch.no_grad()
def anchor_normalised(
    rewards: Float[Tensor, " T"],
    anchors: Int[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    group: Int[Tensor, " N"],
    *,
    gamma: float,
    eps: float,
) -> Float[Tensor, " T"]:
    """GiGPO's step advantage with F = std: A_k = (R_k - mean) / (std + eps); otherwise as `anchor_centred`.

    std divides by n - 1, as everywhere in this package. Reference: arXiv 2505.10978 eq 3 to 8.
    """
    starts = turn_starts(action_mask, cu_seqlens)
    to_go, cell = _anchored_returns(rewards, anchors, starts, action_mask, cu_seqlens, group, gamma=gamma)
    return _over_turns(_scattered(group_normalised(to_go, cell, eps=eps), starts), starts, action_mask, like=rewards)


@checked
@torch.no_grad()
def gigpo(
    rewards: Float[Tensor, " T"],
    anchors: Int[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    group: Int[Tensor, " N"],
    *,
    gamma: float,
    step_weight: float,
    eps: float,
) -> Float[Tensor, " T"]:
    """GiGPO: A = A_episode + step_weight A_step, both normalised; the episode's from the rows' summed rewards in their group.

    gamma discounts the step's returns per turn, never the episode's. Reference: arXiv 2505.10978 eq 3 to 8 (gamma 0.95,
    step_weight 1).
    """
    require_finite("gigpo", "rewards", rewards, action_mask, remedy=MEND_REWARDS)
    live = action_counts(action_mask, cu_seqlens) > 0
    scores = row_sums(rewards.double(), action_mask, cu_seqlens)
    episode = torch.zeros_like(scores).masked_scatter_(live, group_normalised(scores[live], group[live], eps=eps))
    step = anchor_normalised(rewards.double(), anchors, action_mask, cu_seqlens, group, gamma=gamma, eps=eps)
    return (spread(episode, action_mask, cu_seqlens) + step_weight * step).to(upcast(rewards).dtype)


@checked
@torch.no_grad()
def process_normalised(
    rewards: Float[Tensor, " T"],
    step_ends: Bool[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    group: Int[Tensor, " N"],
    *,
    eps: float,
) -> Float[Tensor, " T"]:
    """GRPO with process rewards: A_t = sum of (r - mean) / (std + eps) over the row's steps that end at t or later.

    The rewards at `step_ends` (a zero counts as well as any) of all rows of a group make one set, from which mean and std
    (dividing by n - 1) are taken. Tokens after the last step's end get zero. Reference: arXiv 2402.03300 section 4.1.3.
    Raises ValueError for a step that ends off the action mask.
    """
    astray = (step_ends & ~action_mask).nonzero().flatten()
    if astray.numel():
        raise ValueError(f"step_ends marks token {int(astray[0])}, which the policy did not choose; mark the step's last action token")
    require_finite("process_normalised", "rewards", rewards, step_ends, remedy=MEND_REWARDS)
    normalised = group_normalised(rewards[step_ends].double(), group[rows_of_tokens(cu_seqlens)[step_ends]], eps=eps)
    return discounted_returns(_scattered(normalised, step_ends), action_mask, cu_seqlens, gamma=1.0).to(upcast(rewards).dtype)


def _anchored_returns(
    rewards: Float[Tensor, " T"],
    anchors: Int[Tensor, " T"],
    starts: Bool[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    group: Int[Tensor, " N"],
    *,
    gamma: float,
) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """(reward to go of every turn, index of its prompt and state)."""
    to_go = discounted_returns(_sums_on_starts(rewards, starts, action_mask), starts, cu_seqlens, gamma=gamma)
    prompt, state = group_index(group[rows_of_tokens(cu_seqlens)[starts]]), group_index(anchors[starts])
    return to_go[starts], prompt * state.numel() + state


def _sums_on_starts(rewards: Float[Tensor, " T"], starts: Bool[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Each turn's summed rewards on its first action token, zero elsewhere."""
    turn = starts.cumsum(0)[action_mask] - 1
    sums = torch.zeros(int(starts.sum()), dtype=torch.float64, device=rewards.device)
    return _scattered(sums.index_add_(0, turn, rewards[action_mask].double()), starts)


def _over_turns(
    on_starts: Float[Tensor, " T"], starts: Bool[Tensor, " T"], action_mask: Bool[Tensor, " T"], *, like: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Each turn's number, found on its first action token, on all of its tokens."""
    turn = starts.cumsum(0)[action_mask] - 1
    return _scattered(on_starts[starts][turn].to(upcast(like).dtype), action_mask)


def _scattered(numbers: Float[Tensor, " K"], places: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    return numbers.new_zeros(places.shape).masked_scatter_(places, numbers)
