# pyright: basic, reportCallIssue=false
# Compiled functions have Triton's types, not Python's.
"""Kernels for CUDA, compiled by Triton when first used: one pass over memory.

GAE takes one program per row, which walks back from the row's end in blocks and scans each block in parallel; the policy
loss one program per block of tokens. Under TRITON_INTERPRET=1 they run on CPU tensors too, slowly, for tests.
"""

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_TOKENS = 1024

_compiled: Any = triton.jit


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
    """`hone.algos.advantages.gae` in fp64, in another order of operations; within one rounding of fp32 of the plain path."""
    advantages, returns = torch.empty(values.numel(), device=values.device), torch.empty(values.numel(), device=values.device)
    lambdas = lambd.double() if isinstance(lambd, Tensor) else torch.full_like(bootstrap, lambd)
    # As a tensor: Triton would take a Python number in fp32.
    gammas = torch.full_like(bootstrap, gamma)
    per_token = (rewards.contiguous(), values.contiguous(), action_mask.contiguous().view(torch.uint8))
    per_row = (cu_seqlens.long().contiguous(), lambdas.contiguous(), bootstrap.contiguous(), gammas)
    if bootstrap.numel():
        _gae_of_row[(bootstrap.numel(),)](*per_token, *per_row, advantages, returns, BLOCK=BLOCK_TOKENS)
    return advantages, returns, math.isfinite(advantages.sum())


def surrogate(
    logp: Float[Tensor, " T"],
    old_logp: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    lowest: float,
    highest: float,
    dual_clip: float,
) -> tuple[Float[Tensor, " 3"], Float[Tensor, " T"]]:
    """The sums of `hone.algos.policy_losses.clipped_surrogate` and the gradient by logp, together.

    Ratios are within 4 units in the last place of fp32 of torch's; so a token that close to a bound can fall on its other
    side. A block's sums are taken in fp32, the sum over blocks in fp64.
    """
    tokens = logp.numel()
    blocks = -(-tokens // BLOCK_TOKENS)
    slope = torch.empty(tokens, device=logp.device)
    sums = torch.zeros(3, blocks, dtype=torch.float32, device=logp.device)
    per_token = [tensor.detach().contiguous() for tensor in (logp, old_logp, advantages, weights)]
    mask = action_mask.contiguous().view(torch.uint8)
    if tokens:
        _surrogate_of_block[(blocks,)](*per_token, mask, slope, sums, lowest, highest, dual_clip, tokens, blocks, BLOCK=BLOCK_TOKENS)
    return sums.double().sum(1), slope


@_compiled
@no_type_check
def _after(factor_later, term_later, factor, term):
    # u = term + factor u_next, composed with the map of the tokens after it.
    return factor_later * factor, term + factor * term_later


@_compiled
@no_type_check
def _gae_of_row(rewards, values, mask, cu_seqlens, lambd, bootstrap, gammas, advantages, returns, BLOCK: tl.constexpr):
    # With u_t = V_t + lambda A_t on an action token and u_t = u_{t+1} on any other, A_t = r_t - V_t + gamma u_{t+1}, so
    # u_t = (1 - lambda) V_t + lambda r_t + gamma lambda u_{t+1}. A lane holds token t and the map of token t + 1.
    row = tl.program_id(0)
    first = tl.load(cu_seqlens + row)
    end = tl.load(cu_seqlens + row + 1)
    lam = tl.load(lambd + row)
    gamma = tl.load(gammas + row)
    after_row = tl.load(bootstrap + row)
    carried = tl.zeros([], dtype=tl.float64)
    lanes = tl.arange(0, BLOCK)
    stop = end
    while stop > first:
        # The block of the row's first tokens may be a short one: lanes past its end are neutral.
        start = tl.maximum(stop - BLOCK, first)
        t = start + lanes
        inside = t < stop
        later = t + 1
        has_later = inside & (later < end)
        acts = tl.load(mask + later, mask=has_later, other=0) != 0
        value = tl.load(values + later, mask=acts, other=0.0).to(tl.float64)
        reward = tl.load(rewards + later, mask=acts, other=0.0).to(tl.float64)
        term = tl.where(acts, value + lam * (reward - value), 0.0)
        factor = tl.where(acts, gamma * lam, tl.full([BLOCK], 1.0, tl.float64))
        is_last = inside & (later == end)
        term = tl.where(is_last, after_row, term)
        factor = tl.where(is_last, 0.0, factor)
        factor, term = tl.associative_scan((factor, term), 0, _after, reverse=True)
        u_next = term + factor * carried
        carried = tl.sum(tl.where(lanes == 0, u_next, 0.0), 0)
        acts = tl.load(mask + t, mask=inside, other=0) != 0
        value = tl.load(values + t, mask=acts, other=0.0).to(tl.float64)
        reward = tl.load(rewards + t, mask=acts, other=0.0).to(tl.float64)
        target = tl.where(acts, reward + gamma * u_next, 0.0)
        tl.store(returns + t, target.to(tl.float32), mask=inside)
        tl.store(advantages + t, (target - value).to(tl.float32), mask=inside)
        stop = start


@_compiled
@no_type_check
def _surrogate_of_block(
    logp, old_logp, advantages, weights, mask, slope, sums, lowest, highest, dual_clip, tokens, blocks, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    live = tl.load(mask + t, mask=inside, other=0) != 0
    difference = tl.load(logp + t, mask=live, other=0.0) - tl.load(old_logp + t, mask=live, other=0.0)
    advantage = tl.load(advantages + t, mask=live, other=0.0)
    weight = tl.load(weights + t, mask=live, other=0.0)
    ratio = tl.exp(difference)
    upper = tl.where(advantage > 0, highest, tl.where(advantage < 0, dual_clip, float("inf")))
    lower = tl.where(advantage < 0, lowest, 0.0)
    above, below = ratio > upper, ratio < lower
    # Without an advantage nothing is owed, and an overflown ratio times zero would be NaN.
    bounded = tl.where(advantage == 0, 1.0, tl.where(above, upper, tl.where(below, lower, ratio)))
    moving = (above == 0) & (below == 0) & (advantage != 0)
    price = weight * advantage
    tl.store(slope + t, tl.where(moving, -(price * ratio), 0.0), mask=inside)
    tl.store(sums + block, -tl.sum(price * bounded, 0))
    tl.store(sums + blocks + block, tl.sum(tl.where(above | below, weight, 0.0), 0))
    tl.store(sums + 2 * blocks + block, -tl.sum(weight * difference, 0))
