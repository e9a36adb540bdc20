"""Batches that hypothesis invents: any rows, any masks, numbers from a drawn seed, and poison off the action mask."""

import dataclasses

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from hone.algos.batch import Scored
from hone.algos.reduce import Reduction, token_weights

law = settings(deadline=None, derandomize=True, max_examples=25)
"""Twenty-five examples, the same ones every time; no deadline, since the machine's speed is no property of the code."""

POISON = (float("nan"), float("inf"), float("-inf"), 1e38)
PER_TOKEN = ("rollout_logp", "rewards", "old_logp", "ref_logp", "values", "advantages", "weights", "returns")

reductions = st.sampled_from([Reduction(), Reduction(over="sequence"), Reduction(over="constant", length=7)])
masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=5)


@st.composite
def scored_batches(draw: st.DrawFn, *, spread: float = 0.5) -> Scored:
    """A scored batch in fp64. `rollout_logp` plays the current policy's log-probabilities, so that `select` carries them."""
    return scored_batch(draw(masks), draw(reductions), seed=draw(st.integers(0, 2**31)), spread=spread)


def scored_batch(rows: list[list[bool]], reduction: Reduction, *, seed: int, spread: float = 0.5) -> Scored:
    """Numbers from the seed on the given masks; entries off the mask are zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([live for row in rows for live in row])
    tokens = mask.numel()
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()], dtype=torch.int32)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.where(mask, scale * torch.randn(tokens, generator=generator, dtype=torch.float64), 0.0)

    old_logp = torch.where(mask, -normal().abs() - 0.1, 0.0)
    values = normal()
    return Scored(
        tokens=torch.randint(0, 100, (tokens,), generator=generator),
        cu_seqlens=cu_seqlens,
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]),
        action_mask=mask,
        rollout_logp=old_logp + normal(spread),
        rewards=normal(),
        version=torch.zeros(tokens, dtype=torch.long),
        group=torch.randint(0, 3, (len(rows),), generator=generator),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        old_logp=old_logp,
        ref_logp=old_logp + normal(spread),
        values=values,
        advantages=normal(),
        weights=token_weights(mask, cu_seqlens, reduction).double(),
        returns=values + normal(),
    )


def poisoned(batch: Scored) -> Scored:
    """The same batch with NaN, infinities and huge numbers in every entry off the action mask."""
    filler = torch.tensor(POISON, dtype=torch.float64).repeat(batch.tokens.numel())[: batch.tokens.numel()]
    return dataclasses.replace(batch, **{name: torch.where(batch.action_mask, batch.require(name), filler) for name in PER_TOKEN})


# The type checker compiles its checks at the first batch and uses `random` for it, which hypothesis would take for a draw.
scored_batch([[True]], Reduction(), seed=0)
