"""Attention of queries to some of their keys, with what it takes to join it with the rest: results, log-sum-exps and gradients.

Tq, Tk packed query and key tokens of the same N rows, h query heads, g key heads (h a multiple of g), d head size.
A softmax over keys K1 and K2 is the mean of the softmaxes over K1 and over K2, weighted by exp(log-sum-exp): `merge`. Its
gradient splits as well: given the whole softmax's results and log-sum-exps, `block_backward` yields one block's share of it.
Reference: arXiv 2310.01889 (RingAttention), 2205.14135 section 3.1 (the two identities).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FOR_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Which keys the queries see: row i has `query_lengths[i]` queries and `key_lengths[i]` keys [tokens], none of them 0.

    `causal` puts a row's last query and last key at the same position, and no query sees a later key; else all see all. With
    a `window`, which needs `causal`, a query sees that many tokens, itself included.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool
    window: int | None = None


def block_forward(
    query: Float[Tensor, "Tq h d"], key: Float[Tensor, "Tk g d"], value: Float[Tensor, "Tk g d"], block: Block, *, scale: float
) -> tuple[Float[Tensor, "Tq h d"], Float[Tensor, "h Tq"]]:
    """Softmax attention within the block, and the log-sum-exp of each query's scores (fp32, or fp64 for fp64 inputs)."""
    if query.is_cuda:
        out, log_sums, _ = _kernels()._varlen_attn(query, key, value, *_kernel_bounds(query, block), scale, _kernel_window(block))
        return out, log_sums
    results = [
        FOR_CPU(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale) for q, k, v, is_causal, mask, *_ in _rows(query, key, value, block)
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in results]), torch.cat([log_sums[0] for _, log_sums in results], 1)


def block_backward(
    out_gradient: Float[Tensor, "Tq h d"],
    query: Float[Tensor, "Tq h d"],
    key: Float[Tensor, "Tk g d"],
    value: Float[Tensor, "Tk g d"],
    out: Float[Tensor, "Tq h d"],
    log_sums: Float[Tensor, "h Tq"],
    block: Block,
    *,
    scale: float,
) -> tuple[Float[Tensor, "Tq h d"], Float[Tensor, "Tk g d"], Float[Tensor, "Tk g d"]]:
    """The block's share of the gradients of query, key and value; `out` and `log_sums` are those of all of a query's keys."""
    if query.is_cuda:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        *bounds, causal = _kernel_bounds(query, block)
        states = (out_gradient.contiguous(), query, key, value, out.contiguous(), log_sums.contiguous())
        return _kernels()._varlen_attn_backward(*states, *bounds, causal, no_dropout, scale, _kernel_window(block))
    groups, gradients = query.shape[1] // key.shape[1], []
    for q, k, v, is_causal, mask, here, _ in _rows(query, key, value, block):
        pull, result = (states[here].transpose(0, 1)[None] for states in (out_gradient, out))
        dq, dk, dv = FOR_CPU_BACKWARD(pull, q, k, v, result, log_sums[None, :, here], 0.0, is_causal, attn_mask=mask, scale=scale)
        # The heads that share a key head sit side by side.
        shared = (gradient[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1) for gradient in (dk, dv))
        gradients.append((dq[0].transpose(0, 1), *shared))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    return dq, dk, dv


def merge(
    out: Float[Tensor, "Tq h d"], log_sums: Float[Tensor, "h Tq"], more: Float[Tensor, "Tq h d"], more_log_sums: Float[Tensor, "h Tq"]
) -> None:
    """Adds a block's attention to what `out` and `log_sums` hold of others, in place and in their own format (fp32 at least)."""
    together = torch.logaddexp(log_sums, more_log_sums)
    kept, added = ((part - together).exp().T[..., None] for part in (log_sums, more_log_sums))
    out.mul_(kept).add_(more * added)
    log_sums.copy_(together)


def check_states(query: Float[Tensor, "Tq h d"], value: Float[Tensor, "Tk g e"]) -> None:
    """Raises ValueError for what no kernel here computes with its log-sum-exps."""
    if query.is_cuda and (query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256):
        raise ValueError(
            f"ring attention on CUDA has no kernel for heads of {query.shape[-1]} numbers in {query.dtype}; "
            "it takes up to 256 in bf16: --ds.param-dtype bf16, or --ds.ring-attn-size 1"
        )
    if query.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"ring attention wants keys and values of one size, not {query.shape[-1]} and {value.shape[-1]}; --ds.ring-attn-size 1"
        )


def _rows(query: Tensor, key: Tensor, value: Tensor, block: Block) -> Iterator[tuple[Any, ...]]:
    """Row by row: its states [1, h, length, d], key heads repeated to h, how they are masked, and where they stand."""
    groups = query.shape[1] // key.shape[1]
    bounds = (pairwise(accumulate(lengths, initial=0)) for lengths in (block.query_lengths, block.key_lengths))
    for (query_start, query_end), (key_start, key_end) in zip(*bounds, strict=True):
        here, there = slice(query_start, query_end), slice(key_start, key_end)
        mask, square = None, query_end - query_start == key_end - key_start
        if block.causal and not (square and (block.window is None or key_end - key_start <= block.window)):
            positions = torch.arange(query_start - query_end, 0)[:, None], torch.arange(key_start - key_end, 0)[None, :]
            age = positions[0] - positions[1]
            seen = (age >= 0) & (age < (block.window or key_end))
            mask = torch.zeros(age.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        repeated = (states[there].repeat_interleave(groups, 1).transpose(0, 1)[None] for states in (key, value))
        yield query[here].transpose(0, 1)[None], *repeated, block.causal and mask is None, mask, here, there


def _kernels() -> Any:
    """Torch's variable-length kernels as operators; the function it offers over them takes no log-sum-exps in its backward."""
    # Imported here: the module needs a CUDA build's kernels only when one is called.
    import torch.nn.attention.varlen

    return torch.ops.torch_attn


def _kernel_bounds(query: Tensor, block: Block) -> tuple[Tensor, Tensor, int, int, bool]:
    """Row bounds, longest rows and causality, as torch's variable-length kernels take them."""
    queries, keys = (_bounds(lengths, query.device) for lengths in (block.query_lengths, block.key_lengths))
    return queries, keys, max(block.query_lengths), max(block.key_lengths), block.causal and block.window is None


def _kernel_window(block: Block) -> list[int]:
    return [-1 if block.window is None else block.window - 1, 0] if block.causal else [-1, -1]


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
