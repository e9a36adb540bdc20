"""Expectations by enumeration: a policy over a few states, every trajectory it can take, every group of them, with probabilities.

From state 0, action 0 ends the row; actions 1 and 2 lead to states 1 and 2, where any action ends it: 7 trajectories of one
or two action tokens, a prompt's token before them and an environment's between them. Every group of n trajectories is a
group of rows in ONE packed batch, and its probability is the weight of its tokens: so a weighted sum is an expectation.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

TRAJECTORIES = [(0,), *itertools.product((1, 2), range(3))]
LOGITS = torch.tensor([[0.4, -0.3, 0.1], [0.9, 0.0, -0.7], [-0.2, 0.5, 0.3]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.3, 0.2, 0.6], [0.1, 0.8, -0.4], [0.7, -0.6, 0.2]], dtype=torch.float64)
"""Logits of another policy over the same states: a reference, a sampler, a teacher."""
REWARDS = torch.tensor([[0.3, -0.5, 1.1], [2.0, -1.0, 0.4], [0.0, 0.7, -0.9]], dtype=torch.float64)
"""Reward of each action in each state."""


class Enumerated:
    """Every group of `size` trajectories, end to end; row i of group g is one of them."""

    def __init__(self, *, size: int) -> None:
        """Lay out 7 ** size groups."""
        self.size = size
        outcomes = list(itertools.product(range(len(TRAJECTORIES)), repeat=size))
        self.trajectory = torch.tensor(outcomes).flatten()
        self.group = torch.arange(len(outcomes)).repeat_interleave(size)
        states, actions, mask, lengths = [], [], [], [0]
        for row in self.trajectory.tolist():
            for state, action in _steps(TRAJECTORIES[row]):
                states += [0, state]
                actions += [0, action]
                mask += [False, True]
            lengths.append(len(mask))
        self.states, self.actions, self.action_mask = torch.tensor(states), torch.tensor(actions), torch.tensor(mask)
        self.cu_seqlens = torch.tensor(lengths, dtype=torch.int32)
        self.live = torch.ones(len(self.trajectory), dtype=torch.bool)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Where the action tokens and the rows are."""
        return self.action_mask, self.cu_seqlens

    def per_token(self, table: Tensor) -> Tensor:
        """table[state, action] at every action token, NaN elsewhere."""
        return torch.where(self.action_mask, table[self.states, self.actions], math.nan)

    def logp(self, logits: Tensor) -> Tensor:
        """Log-probability of every action token, with gradient if the logits have one."""
        return self.per_token(logits.log_softmax(-1))

    def weights(self, sampler: Tensor) -> Tensor:
        """Probability of the row's group under the sampler, shared among its rows: a constant on each of their action tokens."""
        probability = trajectory_probabilities(sampler).detach()
        of_group = probability[self.trajectory].reshape(-1, self.size).prod(1) / self.size
        of_row = of_group.repeat_interleave(self.size)
        per_token = of_row.repeat_interleave(self.cu_seqlens.diff().long())
        return torch.where(self.action_mask, per_token, math.nan)


def _steps(trajectory: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *trajectory), trajectory, strict=False))


def trajectory_probabilities(logits: Tensor) -> Tensor:
    """[7], with gradient."""
    logp = logits.log_softmax(-1)
    return torch.stack([torch.stack([logp[step] for step in _steps(trajectory)]).sum().exp() for trajectory in TRAJECTORIES])


def trajectory_returns(table: Tensor, *, gamma: float = 1.0) -> Tensor:
    """[7]: sum_t gamma^t table[state_t, action_t]."""
    steps = [[gamma**t * table[step] for t, step in enumerate(_steps(trajectory))] for trajectory in TRAJECTORIES]
    return torch.stack([torch.stack(row).sum() for row in steps])


def visits(logits: Tensor) -> Tensor:
    """[3]: probability that a row comes through each state."""
    first = logits[0].softmax(-1)
    return torch.stack([torch.ones_like(first[0]), first[1], first[2]])


def true_values(logits: Tensor, table: Tensor) -> Tensor:
    """[3]: expected rewards from each state on."""
    probability = logits.softmax(-1)
    later = (probability[1:] * table[1:]).sum(-1)
    return torch.cat([(probability[0] * (table[0] + torch.cat([later.new_zeros(1), later]))).sum()[None], later])


def expected_reward(logits: Tensor) -> Tensor:
    """The objective, exactly."""
    return (trajectory_probabilities(logits) * trajectory_returns(REWARDS)).sum()


def state_kl(logits: Tensor, other: Tensor) -> Tensor:
    """[3]: KL(policy || other) in every state [nats]."""
    logp, other_logp = logits.log_softmax(-1), other.log_softmax(-1)
    return (logp.exp() * (logp - other_logp)).sum(-1)


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor = LOGITS) -> Tensor:
    """Of a scalar of the logits."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def cosine(one: Tensor, other: Tensor) -> float:
    """One where two gradients agree up to a positive scale."""
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))
