"""Exact attention of rows that are cut over a ring (RingAttention), in two forms, forward and backward.

- zigzag: one owner's keys at a time, the next ones under way meanwhile; joined by log-sum-exp in fp32.
- all-gather: all keys at once, for some key heads at a time, the next heads' under way; also windowed.
Backward fetches the keys again and sends their gradients home. T tokens of this rank, h query heads, g key heads, d head size.
Reference: arXiv 2310.01889 (ring), 2311.09431 (causal work made even), 2407.21783 section 3.3.2 (all-gather).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from hone.learner.attention.blocks import block_backward, block_forward, check_states, merge
from hone.learner.attention.ring import Ring


@torch._disable_dynamo  # see `varlen.row_arguments` # pyright: ignore[reportPrivateImportUsage]
def ring_attention(
    query: Float[Tensor, "T h d"],
    key: Float[Tensor, "T g d"],
    value: Float[Tensor, "T g e"],
    ring: Ring,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "T h d"]:
    """Causal attention of this rank's share of the cut rows, collective over the ring.

    A `window` takes the all-gather form in any case. Raises ValueError as `check_states`, and for a `head_stride` that does
    not divide the key heads.
    """
    check_states(query, value)
    states = [one.contiguous() for one in (query, key, value)]
    if window is None and ring.head_stride is None:
        return _Zigzag.apply(*states, ring, scale)
    return _Gathered.apply(*states, ring, scale, window, key_heads_at_once(key.shape[1], ring.head_stride))


def key_heads_at_once(heads: int, head_stride: int | None) -> int:
    """Key heads that are gathered together: `head_stride`, or all. Raises ValueError for a stride that does not divide them."""
    stride = heads if head_stride is None else head_stride
    if heads % stride:
        raise ValueError(f"--ds.ring-attn-head-stride {stride} does not divide the {heads} key heads; choose a divisor of {heads}")
    return stride


class _Zigzag(torch.autograd.Function):
    """One owner's keys at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring, scale: float) -> Tensor:
        ctx.ring, ctx.scale, exact = ring, scale, _exact(query)
        out = torch.zeros(query.shape, dtype=exact, device=query.device)
        log_sums = torch.full((query.shape[1], query.shape[0]), -torch.inf, dtype=exact, device=query.device)
        for owner, (keys, values) in ring.fetch(torch.stack([key, value])):
            for here, there, block in ring.pairs(owner):
                more = block_forward(query[here], keys[there], values[there], block, scale=scale)
                merge(out[here], log_sums[:, here], *more)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        (pull,), ring, (query, key, value, out, log_sums) = gradients, ctx.ring, ctx.saved_tensors
        held, exact, arriving = torch.stack([key, value]), _exact(query), []
        query_gradient, own = torch.zeros_like(query, dtype=exact), torch.zeros_like(held, dtype=exact)
        for owner, states in ring.fetch(held):
            theirs = own if owner == ring.wire.rank else torch.zeros_like(states, dtype=exact)
            for here, there, block in ring.pairs(owner):
                inputs = (query[here], states[0, there], states[1, there], out[here], log_sums[:, here])
                dq, dk, dv = block_backward(pull[here], *inputs, block, scale=ctx.scale)
                query_gradient[here] += dq
                theirs[0, there] += dk
                theirs[1, there] += dv
            if owner != ring.wire.rank:
                arriving.append(ring.send_home({owner: theirs.to(held.dtype)}, own))
        for finish in arriving:
            finish()
        return query_gradient.to(query.dtype), *own.to(key.dtype), None, None


class _Gathered(torch.autograd.Function):
    """All keys at once, some key heads at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring, scale: float, window: int | None, stride: int) -> Tensor:
        ctx.ring, ctx.scale, ctx.window, ctx.stride = ring, scale, window, stride
        out = torch.empty_like(query)
        log_sums = torch.empty(query.shape[1], query.shape[0], dtype=_exact(query), device=query.device)
        for heads, _, pool in _by_heads(ring, query, key, value, stride):
            for here, seen, block in ring.views:
                states = (query[here, heads].contiguous(), pool[0, seen], pool[1, seen])
                out[here, heads], log_sums[heads, here] = block_forward(*states, block._replace(window=window), scale=scale)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        (pull,), ring, (query, key, value, out, log_sums) = gradients, ctx.ring, ctx.saved_tensors
        exact, rank, arriving = _exact(query), ring.wire.rank, []
        query_gradient, own = torch.empty_like(query), torch.zeros(2, *key.shape, dtype=exact, device=key.device)
        for heads, key_heads, pool in _by_heads(ring, query, key, value, ctx.stride):
            pool_gradient = torch.zeros_like(pool, dtype=exact)
            for here, seen, block in ring.views:
                inputs = (query[here, heads].contiguous(), pool[0, seen], pool[1, seen], out[here, heads], log_sums[heads, here])
                block = block._replace(window=ctx.window)
                query_gradient[here, heads], dk, dv = block_backward(pull[here, heads], *inputs, block, scale=ctx.scale)
                pool_gradient[0].index_add_(0, seen, dk.to(exact))
                pool_gradient[1].index_add_(0, seen, dv.to(exact))
            theirs: dict[int, list[Tensor]] = {}
            lengths = [tokens.stop - tokens.start for _, tokens in ring.pool]
            for (owner, _), part in zip(ring.pool, pool_gradient.split(lengths, 1), strict=True):
                theirs.setdefault(owner, []).append(part)
            home = own[:, :, key_heads]
            home += torch.cat(theirs.pop(rank), 1)
            arriving.append(ring.send_home({owner: torch.cat(parts, 1).to(key.dtype) for owner, parts in theirs.items()}, home))
        for finish in arriving:
            finish()
        return query_gradient, *own.to(key.dtype), None, None, None, None


def _by_heads(ring: Ring, query: Tensor, key: Tensor, value: Tensor, stride: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(query heads, their key heads, all keys and values of these [2, S, stride, d]); the next heads travel meanwhile."""
    held, groups = torch.stack([key, value]), query.shape[1] // key.shape[1]
    parts = [slice(start, start + stride) for start in range(0, key.shape[1], stride)]
    under_way = ring.fetch_all(held[:, :, parts[0]])
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        pool = under_way()
        if after is not None:
            under_way = ring.fetch_all(held[:, :, after])
        yield slice(part.start * groups, part.stop * groups), part, pool


def _exact(states: Tensor) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 for states that are."""
    return torch.promote_types(states.dtype, torch.float32)
