"""Whether an algorithm compares the samples of a prompt, found out by asking it rather than by its name."""

import functools

import torch

from hone.algos.batch import Batch
from hone.algos.protocol import Algorithm


@functools.cache
def compares_samples(algo: Algorithm) -> bool:
    """Whether an advantage is what a sample is worth beside its prompt's others: such an algorithm tells of its groups."""
    return "groups" in algo.advantages(_one_token()).figures


def _one_token() -> Batch:
    """A batch of one row of one token with whatever an algorithm may need: asked for what is told of it, not for its numbers."""
    number, index = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    return Batch(
        tokens=index,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        position_ids=index,
        action_mask=torch.ones(1, dtype=torch.bool),
        temperature=1.0,
        rollout_logp=number,
        rewards=number,
        version=index,
        group=index,
        truncated=torch.zeros(1, dtype=torch.bool),
        old_logp=number,
        ref_logp=number,
        values=number,
        greedy_scores=number,
    )
