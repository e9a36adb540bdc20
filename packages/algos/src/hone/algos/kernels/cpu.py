# pyright: basic, reportCallIssue=false
# Compiled functions have numba's types, not Python's.
"""Kernels for the CPU, compiled by numba when first used (about a second): one pass over memory, in torch's own threads."""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numba import carray, njit
from torch import Tensor

from hone.algos.kernels.exponential import compiled, exp
from hone.algos.kernels.threads import entry, in_threads, number_of_thread, number_of_threads, pointer, shares_of_work

# Sums over tokens may also be reordered, so that they run in vector lanes.
_compiled_sums: Any = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


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
    """`hone.algos.advantages.gae`, row by row and token by token in fp64; within one rounding of fp32 of the plain path."""
    advantages, returns = torch.empty(values.numel()), torch.empty(values.numel())
    lambdas = lambd.double() if isinstance(lambd, Tensor) else torch.full_like(bootstrap, lambd)
    per_row = _arrays(cu_seqlens.long(), lambdas, bootstrap)
    shares = shares_of_work()
    edges = np.searchsorted(per_row[0], [values.numel() * i // shares for i in range(shares + 1)])
    broken = np.zeros(shares, dtype=np.int64)
    outputs = (advantages.numpy(), returns.numpy(), broken)
    settings = (edges.astype(np.int64), np.array([gamma]))
    arrays = (*_arrays(rewards, values, action_mask.view(torch.uint8)), *per_row, *settings, *outputs)
    in_threads(_gae, (values.numel(), bootstrap.numel(), shares), arrays, shares=shares)
    return advantages, returns, not broken.any()


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

    Ratios are within 2 units in the last place of fp32 of torch's; so a token that close to a bound can fall on its other
    side. Sums are accumulated in fp64.
    """
    slope = torch.empty(logp.numel())
    shares = shares_of_work()
    sums = np.zeros((shares, 3))
    per_token = _arrays(logp, old_logp, advantages, weights, action_mask.view(torch.uint8))
    bounds = np.array([lowest, highest, dual_clip], dtype=np.float32)
    in_threads(_surrogate, (logp.numel(), shares), (*per_token, bounds, slope.numpy(), sums), shares=shares)
    return torch.from_numpy(sums.sum(0)), slope


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """The tensors' own memory; contiguous, so that one compiled version serves."""
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


_ZERO, _ONE, _INFINITE = np.float32(0), np.float32(1), np.float32(np.inf)
_BLOCK = 128  # tokens whose intermediate numbers stay in the first-level cache


@compiled
@no_type_check
def _gae_of_rows(rewards, values, mask, cu_seqlens, lambd, bootstrap, gamma, first_row, end_row, advantages, returns):
    # Backwards through rows as well as through tokens: the processor then fetches ahead across the ends of rows.
    # Positions are unsigned: a signed one would be checked for Python's negative indices at every access.
    deltas, values_after, broken = np.empty(_BLOCK), np.empty(_BLOCK + 1), 0
    for rows_done in range(end_row - first_row):
        row = end_row - 1 - rows_done
        discount = gamma * lambd[row]
        value_after, advantage = bootstrap[row], 0.0
        end = cu_seqlens[row + 1]
        while end > cu_seqlens[row]:
            tokens = min(_BLOCK, end - cu_seqlens[row])
            last = np.uint64(end - 1)
            live = 0
            for k in range(tokens):
                live += mask[last - np.uint64(k)]
            if live == tokens:
                values_after[0] = value_after
                advantage, infinite = _gae_of_run(
                    rewards, values, last, tokens, gamma, discount, advantage, deltas, values_after, advantages, returns
                )
                broken += infinite
                value_after = values_after[tokens]
            else:
                for k in range(tokens):
                    t = last - np.uint64(k)
                    if mask[t]:
                        value = np.float64(values[t])
                        advantage = (np.float64(rewards[t]) + gamma * value_after - value) + discount * advantage
                        value_after = value
                        advantages[t] = advantage
                        returns[t] = advantage + value
                        broken += not np.isfinite(np.float32(advantage))
                    else:
                        advantages[t] = 0.0
                        returns[t] = 0.0
            end -= tokens
    return broken


@compiled
@no_type_check
def _gae_of_run(rewards, values, last, tokens, gamma, discount, advantage, deltas, values_after, advantages, returns):
    # The run's tokens from its end, k = 0 the last. All but the middle loop becomes vector instructions; the middle one
    # takes four tokens at a time, so that each four wait for one product of the four before, not for four.
    for k in range(tokens):
        values_after[np.uint64(k + 1)] = values[last - np.uint64(k)]
    for k in range(tokens):
        deltas[k] = np.float64(rewards[last - np.uint64(k)]) + gamma * values_after[k] - values_after[np.uint64(k + 1)]
    discount_2, discount_3, discount_4 = discount**2, discount**3, discount**4
    for four in range(tokens // 4):
        k0 = np.uint64(4 * four)
        k1, k2, k3 = k0 + np.uint64(1), k0 + np.uint64(2), k0 + np.uint64(3)
        alone_1 = deltas[k1] + discount * deltas[k0]
        alone_2 = deltas[k2] + discount * alone_1
        alone_3 = deltas[k3] + discount * alone_2
        deltas[k0] += discount * advantage
        deltas[k1] = alone_1 + discount_2 * advantage
        deltas[k2] = alone_2 + discount_3 * advantage
        advantage = alone_3 + discount_4 * advantage
        deltas[k3] = advantage
    for k in range(4 * (tokens // 4), tokens):
        advantage = deltas[np.uint64(k)] + discount * advantage
        deltas[np.uint64(k)] = advantage
    infinite = 0
    for k in range(tokens):
        found = np.float32(deltas[k])
        advantages[last - np.uint64(k)] = found
        returns[last - np.uint64(k)] = deltas[k] + values_after[np.uint64(k + 1)]
        infinite += found - found != _ZERO
    return advantage, infinite


@_compiled_sums
@no_type_check
def _surrogate_of_tokens(logp, old_logp, advantages, weights, mask, slope, lowest, highest, dual_clip, first, end, sums):
    # Slices, and no branches: so that the loop becomes vector instructions.
    logp, old_logp, advantages, weights = logp[first:end], old_logp[first:end], advantages[first:end], weights[first:end]
    mask, slope = mask[first:end], slope[first:end]
    total, clipped, kl = 0.0, 0.0, 0.0
    for t in range(logp.size):
        live = mask[t] != 0
        difference = logp[t] - old_logp[t]
        difference = difference if live else _ZERO
        advantage = advantages[t] if live else _ZERO
        weight = weights[t] if live else _ZERO
        ratio = exp(difference)
        upper = highest if advantage > _ZERO else dual_clip
        upper = upper if advantage != _ZERO else _INFINITE
        lower = lowest if advantage < _ZERO else _ZERO
        at_bound = (ratio > upper) | (ratio < lower)
        bounded = upper if ratio > upper else ratio
        bounded = lower if ratio < lower else bounded
        # Without an advantage nothing is owed, and an overflown ratio times zero would be NaN.
        bounded = bounded if advantage != _ZERO else _ONE
        moving = (not at_bound) & (advantage != _ZERO)
        price = weight * advantage
        slope[t] = -(price * ratio) if moving else _ZERO
        total -= np.float64(price * bounded)
        clipped += np.float64(weight if at_bound else _ZERO)
        kl -= np.float64(weight * difference)
    sums[0], sums[1], sums[2] = total, clipped, kl


@entry
@no_type_check
def _gae(data):
    job = carray(data, (14,), np.int64)
    tokens, rows, shares = job[0], job[1], job[2]
    rewards, values = carray(pointer(job[3]), (tokens,), np.float32), carray(pointer(job[4]), (tokens,), np.float32)
    mask = carray(pointer(job[5]), (tokens,), np.uint8)
    cu_seqlens = carray(pointer(job[6]), (rows + 1,), np.int64)
    lambd, bootstrap = carray(pointer(job[7]), (rows,), np.float64), carray(pointer(job[8]), (rows,), np.float64)
    edges, gamma = carray(pointer(job[9]), (shares + 1,), np.int64), carray(pointer(job[10]), (1,), np.float64)[0]
    advantages, returns = carray(pointer(job[11]), (tokens,), np.float32), carray(pointer(job[12]), (tokens,), np.float32)
    broken = carray(pointer(job[13]), (shares,), np.int64)
    share = np.int64(number_of_thread())
    while share < shares:
        first, end = edges[share], edges[share + 1]
        broken[share] = _gae_of_rows(rewards, values, mask, cu_seqlens, lambd, bootstrap, gamma, first, end, advantages, returns)
        share += np.int64(number_of_threads())


@entry
@no_type_check
def _surrogate(data):
    job = carray(data, (10,), np.int64)
    tokens, shares = job[0], job[1]
    logp, old_logp = carray(pointer(job[2]), (tokens,), np.float32), carray(pointer(job[3]), (tokens,), np.float32)
    advantages, weights = carray(pointer(job[4]), (tokens,), np.float32), carray(pointer(job[5]), (tokens,), np.float32)
    mask = carray(pointer(job[6]), (tokens,), np.uint8)
    bounds = carray(pointer(job[7]), (3,), np.float32)
    slope, sums = carray(pointer(job[8]), (tokens,), np.float32), carray(pointer(job[9]), (shares, 3), np.float64)
    share = np.int64(number_of_thread())
    while share < shares:
        first, end = tokens * share // shares, tokens * (share + 1) // shares
        per_token = (logp, old_logp, advantages, weights, mask, slope)
        _surrogate_of_tokens(*per_token, bounds[0], bounds[1], bounds[2], first, end, sums[share])
        share += np.int64(number_of_threads())
