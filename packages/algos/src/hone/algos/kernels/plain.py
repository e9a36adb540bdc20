"""GAE in plain torch, for any device and precision: always there, and what the other kernels are compared with.

The batch is walked from its end in blocks of tokens, small enough for a processor's cache whatever the batch; so nothing
temporary is larger than a few blocks. Arithmetic is fp64 throughout.
"""

from math import ceil, isqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.masking import cleared, ones_where, upcast

BLOCK_TOKENS = 2**18
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
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """(advantages, returns) as `hone.algos.advantages.gae` defines them."""
    dtype = torch.promote_types(upcast(rewards).dtype, upcast(values).dtype)
    advantages = torch.empty(values.numel(), dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    lambdas = torch.repeat_interleave(lambd.double(), cu_seqlens.diff().long()) if isinstance(lambd, Tensor) else None
    recurrence = _Recurrence(values.numel(), device=values.device)
    filled = cu_seqlens.diff() > 0
    row_ends, after_rows = cu_seqlens[1:][filled].long() - 1, bootstrap[filled]
    stops = list(range(values.numel(), 0, -recurrence.tokens))
    # Row ends before each block, read back once for all blocks.
    ends_before = torch.searchsorted(row_ends, torch.tensor([*stops, 0], device=row_ends.device)).cpu()
    for block, stop in enumerate(stops):
        here = slice(max(stop - recurrence.tokens, 0), stop)
        ends = slice(int(ends_before[block + 1]), int(ends_before[block]))
        live, last, after_last = action_mask[here], row_ends[ends] - here.start, after_rows[ends]
        ones = ones_where(live, dtype)
        reward, value = (cleared(numbers[here].to(dtype), ones).double() for numbers in (rewards, values))
        # With u_t = V_t + lambda A_t on an action token, and u_t = u_{t+1} on any other, A_t = r_t - V_t + gamma u_{t+1}, so
        # u_t = (1 - lambda) V_t + lambda r_t + gamma lambda u_{t+1}: one recurrence without gaps, its factor 1 off the mask.
        weight = lambd if lambdas is None else lambdas[here]
        after = recurrence.before(torch.lerp(value, reward, weight), live, gamma * weight, last, after_last)
        target = reward.add_(after, alpha=gamma)
        returns[here] = target
        torch.sub(target, value, out=advantages[here])
        for numbers in (advantages, returns):
            numbers[here].view(ones.dtype).bitwise_and_(ones)
    return advantages.to(upcast(values).dtype), returns.to(upcast(values).dtype)


class _Recurrence:
    """u_t = term_t + f u_{t+1} on live tokens, u_{t+1} on others, over a batch, from its end, in equal blocks of `tokens`.

    A block is cut into chunks. Side by side they are the lanes of vector operations that step through time: once from
    nothing, for what each chunk adds and what factor it leaves; then, that known for all later chunks, once more for the
    numbers themselves. The working memory is that of one block.
    """

    def __init__(self, batch_tokens: int, *, device: torch.device) -> None:
        blocks = max(1, ceil(batch_tokens / BLOCK_TOKENS))
        chunk = min(LONGEST_CHUNK, isqrt(batch_tokens) + 1)
        lanes = ceil(batch_tokens / (blocks * chunk))
        self.tokens = max(1, chunk * lanes)
        table = torch.empty(3, chunk + 1, lanes, dtype=torch.float64, device=device)
        self._terms, self._factors, self._numbers = table[0, :chunk], table[1, :chunk], table[2]
        rows = (self._terms, self._factors, self._numbers[1:], self._numbers[:chunk])
        self._steps = [*zip(*(row.unbind(0) for row in rows), strict=True)][::-1]
        self._carried = table.new_zeros(1)

    def before(
        self,
        term: Float[Tensor, " B"],
        live: Bool[Tensor, " B"],
        factor: float | Float[Tensor, " B"],
        last: Int[Tensor, " E"],
        after_last: Float[Tensor, " E"],
    ) -> Float[Tensor, " B"]:
        """u_{t+1} for every t of the next block towards the front; `after_last` at `last`, where rows end and nothing passes.

        Only the block at the batch's front may be shorter than `tokens`.
        """
        chunk, lanes = self._terms.shape
        padding = self.tokens - term.numel()

        def by_lane(per_token: Tensor) -> Tensor:
            padded = torch.cat([per_token, per_token.new_zeros(padding)]) if padding else per_token
            return padded.view(lanes, chunk).t()

        self._terms.copy_(by_lane(term))
        self._factors.copy_(by_lane(live.view(torch.uint8)))
        self._factors.mul_(by_lane(factor - 1) if isinstance(factor, Tensor) else factor - 1).add_(1)
        ends = (last % chunk, last // chunk)
        self._terms[ends] += self._factors[ends] * after_last
        self._factors[ends] = 0.0
        # Zero times infinity is NaN, so only finite numbers may be stopped by a factor of zero alone.
        step = torch.addcmul if bool(self._terms.sum().isfinite()) else _guarded_step
        starts = torch.cat([term.new_zeros(lanes), self._carried])  # u at the first token of each chunk, and after the last
        products = torch.cat([term.new_ones(lanes), term.new_zeros(1)])
        total, product = starts[:lanes], products[:lanes]
        for term_t, factor_t, _, _ in self._steps:
            step(term_t, factor_t, total, out=total)
            product.mul_(factor_t)
        span = 1  # chunks whose terms each of `starts` holds; it doubles
        while span <= lanes and bool(products.any()):
            starts[:-span] = _guarded_step(starts[:-span], products[:-span], starts[span:])
            products[:-span] = products[:-span] * products[span:]
            span *= 2
        self._numbers[chunk] = starts[1:]
        for term_t, factor_t, later, now in self._steps:
            step(term_t, factor_t, later, out=now)
        self._carried = starts[:1].clone()
        after = self._numbers[1:].t().reshape(-1)[: term.numel()]
        after[last] = after_last
        return after


def _guarded_step(
    term: Float[Tensor, " B"], factor: Float[Tensor, " B"], later: Float[Tensor, " B"], *, out: Float[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    return torch.where(factor == 0, term, torch.addcmul(term, factor, later), out=out)
