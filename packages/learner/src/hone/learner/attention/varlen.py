"""Causal attention over rows that lie end to end, entered into transformers' attention interface under the name `PACKED`.

A model loaded with `attn_implementation=PACKED` hands every layer's query [1, heads, T, dim] to `packed_attention`, with the
row bounds as the keyword arguments that `row_arguments` makes. No [T, T] mask exists anywhere. On CUDA in half precision it
is one call of torch's variable-length kernel; otherwise one scaled-dot-product call per row length, the fastest exact way on a CPU.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from hone.learner.attention.ring import Ring
from hone.learner.attention.ring_flash import FlashRing, flash_ring_attention
from hone.learner.attention.ring_forms import ring_attention

PACKED = "hone_packed"


# What depends on the rows' lengths is not compiled. Not by torch.compiler.disable, which imports the compiler there and then.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def row_arguments(cu_seqlens: Int[Tensor, " N_plus_1"]) -> dict[str, Any]:
    """Keyword arguments for a transformers model's forward: the row bounds, under the names its flash-attention path uses."""
    bounds = cu_seqlens.to(torch.int32)
    longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    ring: Ring | FlashRing | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row; query [1, heads, T, dim], key and value [1, key heads, T, dim] -> [1, T, heads, dim].

    `sliding_window` counts the tokens a query sees, itself included. With a `ring`, the row bounds end where its cut rows
    begin. Raises ValueError for what no kernel here computes.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            f"{type(module).__name__} was called without row bounds: its model does not hand keyword arguments on to attention"
        )
    beyond = [name for name in ("softcap", "s_aux", "position_bias") if unused.get(name) is not None]
    if beyond or dropout or attention_mask is not None:
        raise ValueError(f"{type(module).__name__} asks for {beyond or 'dropout or a mask'}, which packed attention does not compute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(ring, FlashRing):
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        return flash_ring_attention(query, key, value, ring, scale=scale, window=sliding_window)[None], None
    if ring is not None:
        cut = [states[0, :, ring.whole :].transpose(0, 1) for states in (query, key, value)]
        result = ring_attention(cut[0], cut[1], cut[2], ring, scale=scale, window=sliding_window)[None]
        if ring.whole:
            query, key, value = (states[:, :, : ring.whole] for states in (query, key, value))
            result = torch.cat([_packed(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), result], 1)
        return result, None
    return _packed(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def _packed(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None) -> Tensor:
    """Rows that are here as a whole; see `packed_attention`."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256:
        return _kernel(query, key, value, bounds, longest, scaling, window)
    return _by_length(query[0], key[0], value[0], bounds, scaling, window)[None]


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _by_length(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Rows of one length go through one call, side by side; query [heads, T, dim] -> [T, heads, dim].

    A call costs more than a short row's arithmetic, so a pack of many short rows is several times faster for it.
    """
    lengths = bounds.diff().long()
    order = torch.argsort(lengths, stable=True)
    # Tokens with equally long rows adjacent; the starts of sorted rows are where the running total of lengths has come.
    ends = lengths[order].cumsum(0)
    shift = torch.repeat_interleave(bounds[:-1].long()[order] - (ends - lengths[order]), lengths[order])
    tokens = torch.arange(query.shape[1], device=query.device) + shift
    query, key, value = query[:, tokens], key[:, tokens], value[:, tokens]
    results, start = [], 0
    for length, count in zip(*(counted.tolist() for counted in torch.unique(lengths, return_counts=True)), strict=True):
        end = start + length * count
        if length:
            sliced = (states[:, start:end].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value))
            results.append(_rows(*sliced, scaling, window).transpose(1, 2).flatten(0, 1))
        start = end
    back = torch.empty_like(tokens)
    back[tokens] = torch.arange(len(tokens), device=tokens.device)
    return torch.cat(results)[back]


def _rows(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of rows of one length; query [rows, heads, length, dim], result the same."""
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    ages = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)[None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=(ages >= 0) & (ages < window), scale=scaling, enable_gqa=grouped)


def _kernel(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None) -> Tensor:
    # Imported here: the module needs a CUDA build's kernels only when it is called.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]  # [T, heads, dim] now
    left = -1 if window is None else window - 1
    result = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=grouped)
    assert isinstance(result, Tensor)
    return result[None]


def _no_mask(*_: object, **__: object) -> None:
    """The row bounds say everything a mask would."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
