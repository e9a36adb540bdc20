"""Optimisers and their parameter groups, and the learning rate as a pure function of the step.

Optimiser steps are numbered from 0; a schedule spans `total_steps`, and what comes after stays at the floor.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hone.learner.config import ActorConfig, AdamConfig, CriticConfig, Schedule
from hone.learner.muon import Muon, hidden_matrix

MakeAdamW = Callable[..., torch.optim.Optimizer]
"""AdamW as torch's class has it: parameter groups, then lr, betas, eps."""


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: Schedule, warmup_ratio: float, min_ratio: float) -> float:
    """Learning rate of optimiser step `step`.

    Warm-up over w = ceil(warmup_ratio total_steps) steps: peak (step + 1) / w, so no step is wasted at 0. Then, with
    p = (step - w) / (total_steps - 1 - w) clipped to [0, 1]: constant peak | linear peak + p (floor - peak) |
    cosine floor + (peak - floor) (1 + cos(pi p)) / 2, floor = min_ratio peak; the last step is at the floor.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    floor = min_ratio * peak
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak + progress * (floor - peak)
        case "cosine_with_min_lr":
            return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def adamw(named: Iterable[tuple[str, nn.Parameter]], adam: AdamConfig, make: MakeAdamW = torch.optim.AdamW) -> torch.optim.Optimizer:
    """AdamW over the given parameters, as `make` has it; biases and norms, which are vectors, are exempt from weight decay."""
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    return make(_adamw_groups(parameters, adam), lr=adam.lr, betas=adam.betas, eps=adam.eps)


def _adamw_groups(parameters: Sequence[nn.Parameter], adam: AdamConfig) -> list[dict[str, Any]]:
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": adam.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimiser(
    named: Iterable[tuple[str, nn.Parameter]], config: ActorConfig | CriticConfig, make_adamw: MakeAdamW = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """What `config.optim` names, over the given parameters; AdamW for all of them is made by `make_adamw`."""
    if config.optim == "adam":
        return adamw(named, config.adam, make_adamw)
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    settings = {"betas": config.adam.betas, "eps": config.adam.eps, "use_muon": False, "lr": config.adam.lr}
    others = [parameter for name, parameter in trained if not hidden_matrix(name, parameter)]
    groups = [{**group, **settings} for group in _adamw_groups(others, config.adam)]
    if matrices := [parameter for name, parameter in trained if hidden_matrix(name, parameter)]:
        groups.append({"params": matrices, "use_muon": True, **dataclasses.asdict(config.muon)})
    return Muon(groups)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a role's model is trained: its settings, over `total_steps` optimiser steps; `ema_beta` asks for a moving average of it."""

    config: ActorConfig | CriticConfig
    total_steps: int
    ema_beta: float | None = None

    def lr(self, step: int) -> float:
        """AdamW's learning rate of optimiser step `step`."""
        return self._scheduled(step, self.config.adam.lr)

    def set_lr(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """The learning rate of every group at optimiser step `step`: Muon's and AdamW's follow one schedule from their own peaks."""
        for group in optimiser.param_groups:
            group["lr"] = self._scheduled(step, self.config.muon.lr if group.get("use_muon") else self.config.adam.lr)

    def _scheduled(self, step: int, peak: float) -> float:
        return learning_rate(
            step,
            peak=peak,
            total_steps=self.total_steps,
            schedule=self.config.lr_scheduler,
            warmup_ratio=self.config.lr_warmup_ratio,
            min_ratio=self.config.min_lr_ratio,
        )
