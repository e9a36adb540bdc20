"""A parameter of which every rank of a tensor-parallel group holds a part, and the two places where the ranks' values meet.

Reference: arXiv 1909.08053, section 3: `add_over_ring` is its g (a sum forward, nothing backward), `entered` its f, the conjugate.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hone.learner.attention.wire import TensorWire


def bounds(size: int, ranks: int) -> tuple[int, ...]:
    """Where each rank's part of `size` entries begins, and where the last one ends; parts differ by at most one entry."""
    return tuple(size * rank // ranks for rank in range(ranks + 1))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which entries of dimension `dim` (0 or 1) of a tensor of `shape` the calling rank holds: its own part of `bounds`."""

    wire: TensorWire
    shape: tuple[int, ...]
    dim: int

    @property
    def low(self) -> int:
        """The first entry of this rank's part."""
        return bounds(self.shape[self.dim], self.wire.size)[self.wire.rank]

    @property
    def high(self) -> int:
        """The first entry after this rank's part."""
        return bounds(self.shape[self.dim], self.wire.size)[self.wire.rank + 1]

    def own(self, whole: Tensor) -> Tensor:
        """The calling rank's part, in memory of its own."""
        return whole.detach().narrow(self.dim, self.low, self.high - self.low).clone(memory_format=torch.contiguous_format)

    def whole(self, part: Tensor) -> Tensor:
        """All parts together, bit for bit; collective over the group."""
        edges = bounds(self.shape[self.dim], self.wire.size)
        sizes = [after - before for before, after in itertools.pairwise(edges)]
        padding = list(part.shape)
        padding[self.dim] = max(sizes) - part.shape[self.dim]  # parts that travel are of one shape
        padded = torch.cat([part, part.new_zeros(padding)], self.dim)
        parts = self.wire.gather(padded)
        return torch.cat([one.narrow(self.dim, 0, size) for one, size in zip(parts, sizes, strict=True)], self.dim)


def cut_of(parameter: Tensor) -> Cut | None:
    """How a parameter is cut; None for one that every rank has in full."""
    return vars(parameter).get("hone_cut")


def cut_parameter(whole: Tensor, wire: TensorWire, *, dim: int) -> nn.Parameter:
    """The calling rank's part of a parameter, which knows its `Cut`."""
    cut = Cut(wire=wire, shape=tuple(whole.shape), dim=dim)
    part: Any = nn.Parameter(cut.own(whole), requires_grad=whole.requires_grad)
    part.hone_cut = cut
    part.tensor_model_parallel = True  # by this DeepSpeed knows that the ranks' parts of its gradient's norm add up
    return part


def entered(states: Tensor, wire: TensorWire) -> Tensor:
    """States that every rank has, on their way into something cut; backward adds up what the ranks have of their gradient."""
    return _Enter.apply(states, wire) if torch.is_grad_enabled() and states.requires_grad else states


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, wire: TensorWire) -> Tensor:
        ctx.wire = wire
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        return summed(gradients[0], ctx.wire), None


def summed(part: Tensor, wire: TensorWire) -> Tensor:
    """The sum over the ranks, as a new tensor."""
    whole = part.clone(memory_format=torch.contiguous_format)
    wire.add_up(whole)
    return whole
