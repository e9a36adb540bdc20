"""What the learner needs of an engine: it holds one role's model, sums gradients over micro-batches, and steps.

Losses are sums over the whole optimiser step, of all ranks: an engine adds gradients up, it never averages. Every method is
collective: all ranks call it the same number of times, in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
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
    """Of one optimiser step: the gradient's global L2 norm before clipping, and the learning rate it was taken with.

    `applied` is False for a step that was left out, because a loss or the norm was not finite (in fp16, at this loss scale).
    """

    grad_norm: float
    lr: float
    applied: bool = True


@runtime_checkable
class Engine(Protocol):
    """One role's model, trainable or frozen."""

    module: PolicyModel | CriticModel
    steps: int
    """Optimiser steps taken."""

    @property
    def counters(self) -> dict[str, int]:
        """Numbers a run goes on from beside its tensors: `steps`, and what decides on the next step that is not finite."""
        ...

    def __call__(self, *inputs: object) -> Any:
        """The module's forward."""
        ...

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds the loss's gradient; `last` marks the last micro-batch of the optimiser step."""
        ...

    def step(self) -> StepInfo:
        """Clips by the global norm and updates.

        If a loss or the norm is not finite, on any rank, no rank changes anything: the step is left out. Raises NumericsError,
        on every rank alike, when that happens more than `max_skipped_steps` times in a row. In fp16 an overflow lowers the loss
        scale, and counts only once that cannot be lowered any more.
        """
        ...

    def weights(self, layers: Sequence[Layer] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full under its checkpoint name, gathered layer by layer; a tensor lives until the next is asked for.

        Adapters are merged into the weights. With `layers`, what those hand out instead. All ranks must run it to its end.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, `weights` and the forward pass are of the moving average (`Training.ema_beta`). Raises ValueError without one."""
        ...

    def sleep(self) -> int:
        """Gives up the device's memory of parameters, gradients, optimiser states and averages; returns the bytes that were moved.

        Asleep, an engine can be saved and woken, nothing else.
        """
        ...

    def wake(self, *, training: bool) -> int:
        """The parameters, and with `training` all else, as they were, bit for bit; returns the bytes that were moved."""
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
