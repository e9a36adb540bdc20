"""Entries off the action mask carry no meaning: replace them before arithmetic, so that no value and no gradient sees them.

Selecting only the output of an operation is not enough: the backward pass multiplies its zero by exp(garbage) and gets NaN.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def upcast(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in fp32, or in fp64 where they are that already: half precision is for storage, not for differences."""
    return values if values.dtype == torch.float64 else values.float()


def on_mask(values: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The values in at least fp32, exactly zero (with zero gradient) off the mask whatever stood there."""
    return torch.where(action_mask, upcast(values), 0.0)
