"""What the learner needs of an engine: it holds one role's model, sums gradients over micro-batches, and steps.

Losses are sums over the whole optimiser step, of all ranks: an engine adds gradients up, it never averages. Every method is
collective: all ranks call it the same number of times, in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hone.learner.checkpoint.pieces import Piece, Source
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.published import Layer


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Of one optimiser step: the gradient's global L2 norm before clipping, and the learning rate it was taken with."""

    grad_norm: float
    lr: float


@runtime_checkable
class Engine(Protocol):
    """One role's model, trainable or frozen."""

    module: PolicyModel | CriticModel
    steps: int
    """Optimiser steps taken."""

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        ...

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds the loss's gradient; `last` marks the last micro-batch of the optimiser step."""
        ...

    def step(self) -> StepInfo:
        """Clips by the global norm and updates.

        Raises NumericsError, on every rank alike, if a loss or the norm is not finite; the parameters are then untouched, and
        the engine takes no further step.
        """
        ...

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name, gathered layer by layer; a tensor lives until the next is asked for.

        Adapters are merged into the weights. With `layers`, what those hand out instead. All ranks must run it to its end.
        """
        ...

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, number format and full shape of every weight, in the order of `weights`; gathers nothing."""
        ...

    def pieces(self) -> list[Piece]:
        """The rank's share of all that training has changed, as views of live memory: over the ranks, every element once.

        No collective. A frozen model has none.
        """
        ...

    def restore(self, source: Source) -> None:
        """Takes up the state in `source`, whatever ranks, stage or engine it was saved with. Raises CheckpointError."""
        ...

    def close(self) -> None:
        """Gives up the engine's buffers and hooks."""
        ...
