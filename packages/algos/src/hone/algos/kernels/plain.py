"""GAE in plain torch, for any device and precision: always there, and what the other kernels are compared with.

The batch is walked from its end in blocks of tokens, small enough for a processor's cache whatever the batch; so nothing
temporary is larger than a few blocks. Arithmetic is fp64 throughout.
"""

import math
from collections.abc import Callable
from math import ceil, isqrt

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.masking import cleared, ones_where, upcast

BLOCK_TOKENS = 2**17
LONGEST_CHUNK = 64


def gae(
    rewards: Float[Tensor, " T"],
    values: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
    lambd: float | Float[Tensor, " N"],
    bootstrap: Float[Tensor, " N"],
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], bool]:
    """(advantages, returns, whether all advantages are finite) as `hone.algos.advantages.gae` defines them."""
    dtype = torch.promote_types(upcast(rewards).dtype, upcast(values).dtype)
    advantages = torch.empty(values.numel(), dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    lambdas = torch.repeat_interleave(lambd.double(), cu_seqlens.diff().long()) if isinstance(lambd, Tensor) else None
    recurrence = _Recurrence(cu_seqlens, bootstrap, tokens=values.numel())
    # Memory that is used again for every block: asking the system for new pages costs more than the arithmetic in them.
    scratch = torch.empty(3, recurrence.tokens, dtype=torch.float64, device=values.device)
    for stop in range(values.numel(), 0, -recurrence.tokens):
        here = slice(max(stop - recurrence.tokens, 0), stop)
        live = action_mask[here]
        ones = ones_where(live, dtype)
        reward, value, term = scratch[:, : live.numel()]
        for numbers, constants in ((reward, rewards), (value, values)):
            numbers.copy_(cleared(constants[here].to(dtype), ones))
        # With u_t = V_t + lambda A_t on an action token, and u_t = u_{t+1} on any other, A_t = r_t - V_t + gamma u_{t+1}, so
        # u_t = (1 - lambda) V_t + lambda r_t + gamma lambda u_{t+1}: one recurrence without gaps, its factor 1 off the mask.
        weight = lambd if lambdas is None else lambdas[here]
        after = recurrence.after(torch.lerp(value, reward, weight, out=term), live, gamma * weight)
        target = reward.add_(after, alpha=gamma)
        returns[here] = target
        advantages[here] = target.sub_(value)
        for numbers in (advantages, returns):
            numbers[here].view(ones.dtype).bitwise_and_(ones)
    finite = math.isfinite(advantages.sum())
    return advantages.to(upcast(values).dtype), returns.to(upcast(values).dtype), finite


class _Recurrence:
    """u_t = term_t + factor u_{t+1} on live tokens, u_{t+1} on others, over a batch, from its end, in equal blocks of `tokens`.

    A block is cut into chunks. First each chunk alone: what it adds, and what factor it leaves of what comes after it;
    then from those, by doubling, u at the start of every chunk; then, with the chunks side by side as the lanes of vector
    operations that step through time, all numbers. The working memory is that of one block.
    """

    def __init__(self, cu_seqlens: Int[Tensor, " N_plus_1"], bootstrap: Float[Tensor, " N"], *, tokens: int) -> None:
        blocks = max(1, ceil(tokens / BLOCK_TOKENS))
        self._chunk = min(LONGEST_CHUNK, isqrt(tokens) + 1)
        self._lanes = ceil(tokens / (blocks * self._chunk))
        self.tokens = max(1, self._chunk * self._lanes)
        table = torch.empty(3, self._chunk + 1, self._lanes, dtype=torch.float64, device=bootstrap.device)
        self._terms, self._factors, self._numbers = table[0, :-1], table[1, :-1], table[2]
        rows = (self._terms, self._factors, self._numbers[1:], self._numbers[:-1])
        self._steps = [*zip(*(row.unbind(0) for row in rows), strict=True)][::-1]
        self._after = torch.empty(self._lanes, self._chunk, dtype=table.dtype, device=table.device)
        self._carried, self._one = table.new_zeros(1), table.new_ones(())
        # Where rows end, as (step, lane) of their block, and the first of those in each block. Read back once for all.
        filled = cu_seqlens.diff() > 0
        last, self._after_ends = cu_seqlens[1:][filled].long() - 1, bootstrap[filled]
        place = (last - tokens) % self.tokens
        self._ends = torch.stack([place, place % self._chunk, place // self._chunk])
        stops = torch.tensor([*range(tokens, 0, -self.tokens), 0], device=last.device)
        self._edges = [int(edge) for edge in torch.searchsorted(last, stops).cpu()]
        longest = int(torch.cat([cu_seqlens.diff(), cu_seqlens.new_zeros(1)]).max())
        self._doublings = min(self._lanes, longest // self._chunk + 1).bit_length()

    def after(self, term: Float[Tensor, " B"], live: Bool[Tensor, " B"], factor: float | Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """u_{t+1} for every t of the next block towards the front; only the last block, at the very front, may be shorter."""
        padding = self.tokens - term.numel()

        def by_lane(per_token: Tensor) -> Tensor:
            padded = torch.cat([per_token.new_zeros(padding), per_token]) if padding else per_token
            return padded.view(self._lanes, self._chunk).t()

        self._terms.copy_(by_lane(term))
        self._factors.copy_(by_lane(live.view(torch.uint8)))
        if isinstance(factor, Tensor):
            self._factors.mul_(by_lane(factor - 1)).add_(1)
        else:
            torch.add(self._one, self._factors, alpha=factor - 1, out=self._factors)
        stop, start = self._edges.pop(0), self._edges[0]
        place, step, lane = self._ends[:, start:stop]
        after_ends = self._after_ends[start:stop]
        self._terms[step, lane] += self._factors[step, lane] * after_ends
        self._factors[step, lane] = 0.0
        add = torch.addcmul
        starts = self._starts(add)
        if not bool(starts.isfinite().all()):
            # Zero times infinity is NaN, so only finite numbers are stopped by a factor of zero alone.
            add = _guarded_addcmul
            starts = self._starts(add)
        self._numbers[-1] = starts[1:]
        for term_t, factor_t, later, now in self._steps:
            add(term_t, factor_t, later, out=now)
        self._carried = starts[:1].clone()
        after = self._after.copy_(self._numbers[1:].t()).view(-1)
        after[place] = after_ends
        return after[padding:]

    def _starts(self, add: Callable[..., Tensor]) -> Float[Tensor, " C_plus_1"]:
        """U at the first token of every chunk, and after the last one."""
        starts, products = torch.cat([torch.zeros_like(self._numbers[0]), self._carried]), F.pad(self._factors.prod(0), (0, 1))
        alone = starts[:-1]
        for term_t, factor_t, _, _ in self._steps:
            add(term_t, factor_t, alone, out=alone)
        for doubling in range(self._doublings):
            span = 2**doubling  # chunks whose terms each of `starts` holds
            starts[:-span] = add(starts[:-span], products[:-span], starts[span:])
            products[:-span] = products[:-span] * products[span:]
        return starts


def _guarded_addcmul(
    term: Float[Tensor, " B"], factor: Float[Tensor, " B"], later: Float[Tensor, " B"], *, out: Float[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    return torch.where(factor == 0, term, torch.addcmul(term, factor, later), out=out)
