"""Entries off the action mask carry no meaning: replace them before arithmetic, so that no value and no gradient sees them.

Selecting only the output of an operation is not enough: the backward pass multiplies its zero by exp(garbage) and gets NaN.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def upcast(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in fp32, or in fp64 where they are that already: half precision is for storage, not for differences."""
    return values if values.dtype == torch.float64 else values.float()


def on_mask(values: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The values in at least fp32, exactly zero (with zero gradient) off the mask whatever stood there."""
    return torch.where(action_mask, upcast(values), 0.0)


def ones_where(mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Int[Tensor, "..."]:
    """For `cleared`: integers as wide as `dtype` (fp32 or fp64), all bits one where the mask is True, all zero elsewhere."""
    return mask.view(torch.int8).neg().to(torch.int64 if dtype == torch.float64 else torch.int32)


def cleared(constants: Float[Tensor, "..."], ones: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What `on_mask` answers, without its gradient: +0.0 where `ones` is zero, whatever stood there, NaN included.

    Clearing bits is several times faster on a CPU than choosing, which torch does one number at a time.
    """
    return (constants.view(ones.dtype) & ones).view(constants.dtype)


def known_exp(exponents: Float[Tensor, "..."], exps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`exps`, with the gradient of exp(exponents) wherever they are that; where an entry is zero, so is its gradient.

    It saves computing exp again where the numbers are at hand, and leaves out tokens whose exp might overflow.
    """
    return cast(Tensor, _KnownExp.apply(exponents, exps.detach()))  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped


class _KnownExp(torch.autograd.Function):
    # Its derivative holds itself, so it can be derived at any order and in either direction.
    generate_vmap_rule = True

    @staticmethod
    def forward(exponents: Tensor, exps: Tensor) -> Tensor:
        return exps.view_as(exps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * known_exp(*ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return grad_inputs[0] * known_exp(*ctx.saved_tensors)
