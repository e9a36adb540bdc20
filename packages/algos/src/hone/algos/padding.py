"""Between padded [B, L] tensors and packed [T]: B rows in L slots each, of which T hold a token; `...` any further axes.

`valid` is True where a slot holds a token, the tokenizer's attention mask as booleans; padding may stand left or right. It is not
the action mask: tokens of a prompt or of an environment are valid too, and are packed along.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hone.algos.checks import checked


@checked
def pack_padded(padded: Shaped[Tensor, "B L ..."], valid: Bool[Tensor, "B L"]) -> tuple[Shaped[Tensor, "T ..."], Int[Tensor, " B_plus_1"]]:
    """(packed, cu_seqlens): the rows' tokens end to end, row i at [cu_seqlens[i], cu_seqlens[i + 1]). Differentiable.

    Raises ValueError for a row whose valid slots are not side by side: that is an action mask, and packing it would join tokens
    that never were neighbours.
    """
    starts = valid.clone()
    starts[:, 1:] &= ~valid[:, :-1]
    torn = (starts.sum(1) > 1).nonzero().flatten()
    if torn.numel():
        raise ValueError(f"valid has a hole in row {int(torn[0])} ({torn.numel()} such rows); give the attention mask, not the action mask")
    cu_seqlens = torch.zeros(valid.shape[0] + 1, dtype=torch.int32, device=valid.device)
    cu_seqlens[1:] = valid.sum(1).cumsum(0)
    return padded[valid], cu_seqlens


@checked
def unpack_padded(packed: Shaped[Tensor, "T ..."], valid: Bool[Tensor, "B L"], *, fill: float = 0.0) -> Shaped[Tensor, "B L ..."]:
    """The inverse: packed tokens in the slots `valid` names, `fill` in all others. Differentiable.

    Raises ValueError if the slots are not as many as the tokens.
    """
    slots = int(valid.sum())
    if packed.shape[0] != slots:
        raise ValueError(f"packed has {packed.shape[0]} tokens, but valid has {slots} slots; build it with valid_slots(cu_seqlens)")
    padded = packed.new_full((*valid.shape, *packed.shape[1:]), fill)
    padded[valid] = packed
    return padded


@checked
def valid_slots(
    cu_seqlens: Int[Tensor, " B_plus_1"], *, width: int | None = None, side: Literal["right", "left"] = "right"
) -> Bool[Tensor, "B L"]:
    """Where packed rows go in [B, width] slots, padding on the given side; without a width, that of the longest row.

    Raises ValueError if a row is longer than the width.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row of {longest} tokens does not fit a width of {width}; raise width")
    slots = torch.arange(width, device=cu_seqlens.device)
    return slots < lengths[:, None] if side == "right" else slots >= width - lengths[:, None]
