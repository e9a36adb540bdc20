"""What a learner is asked to host, and what it answers of a step."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Scored
from hone.algos.offline import Demonstrations, Judgements, Pairs, Steps, Taught
from hone.algos.protocol import Loss
from hone.algos.ranges import Range
from hone.learner.checkpoint import role_files
from hone.learner.config import ActorConfig, CriticConfig, DeepSpeedConfig, RefConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Our names of number formats."""
LABELLED = (Scored, Demonstrations, Pairs, Judgements, Steps, Taught)
"""What can be trained on: rows that carry weights."""


@runtime_checkable
class ValueLoss(Protocol):
    """The part of an algorithm that trains a critic."""

    def value_loss(self, values: Float[Tensor, " T"], scored: Scored) -> Loss:
        """Loss over any part of an optimiser step."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """A model to host: what it is for, where it comes from, and how it is trained over `total_steps` optimiser steps."""

    kind: Literal["policy", "critic", "reference", "reward", "process"]
    model: str
    config: ActorConfig | CriticConfig | RefConfig
    total_steps: int
    ema_beta: Annotated[float, Range(low=0, high=1, open_high=True)] | None = None
    """Decay of an exponential moving average of the weights; None keeps none."""
    labels: int = 2
    """Labels of a process model's head."""

    @property
    def trained(self) -> bool:
        """Whether the role learns; else its model is frozen."""
        return not isinstance(self.config, RefConfig)


def made_of(spec: RoleSpec, *, model: Path, ds: DeepSpeedConfig) -> dict[str, Any]:
    """How a role is made, as JSON has it: what `checkpoint.export` makes it from again."""
    settings = {"config": dataclasses.asdict(spec.config), "config_type": type(spec.config).__name__, "ds": dataclasses.asdict(ds)}
    known = {"kind": spec.kind, "labels": spec.labels, "model": str(model.absolute()), "architecture": role_files.architecture(model)}
    return {**known, "total_steps": spec.total_steps, **settings}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one optimiser step: this rank's share of every metric (shares add up over ranks), gradient norm, learning rate."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    applied: bool = True
    """False for a step that was left out because a loss or the norm was not finite; see `Engine.step`."""


@dataclass(kw_only=True)
class Figures:
    """The figures of a step, added up over this rank's micro-batches, on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss, *, filler: bool) -> None:
        """A micro-batch's; a filler has none."""
        for name, value in {} if filler else loss.metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def told(self) -> dict[str, float]:
        """As numbers."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))  # waits for the device once
