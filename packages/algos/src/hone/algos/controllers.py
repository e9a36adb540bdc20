"""Coefficients that follow what was measured: a frozen state in, a new one out, nothing but numbers to save.

`after(...)` is called once per optimiser step, on one process, with figures over all ranks; the loss only ever sees `coef`.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from hone.algos.ranges import Range, require_valid

LARGEST_KL_ERROR = 0.2
"""Relative distance from the target beyond which the adaptive KL coefficient moves no faster."""


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """The KL coefficient as it was set."""

    coef: Annotated[float, Range(low=0)] = 0.01
    """Weight of the KL penalty [reward per nat], at least 0."""

    def __post_init__(self) -> None:
        require_valid(self)

    def after(self, *, kl: float, sequences: int) -> "FixedKL":
        """The same state, whatever was measured."""
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """A KL coefficient that keeps KL(policy || reference) of a sequence near a target. Reference: arXiv 1909.08593 section 2.2;
    the share n / horizon, the horizon and the target as in its code.
    """

    coef: Annotated[float, Range(low=0)] = 0.01
    """Weight of the KL penalty now [reward per nat], at least 0; at 0 it stays there."""
    target: Annotated[float, Range(low=0, open_low=True)] = 6.0
    """KL aimed at [nats per sequence], above 0."""
    horizon: Annotated[int, Range(low=1)] = 10000
    """Sequences over which an error of one would double the coefficient, at least 1."""

    def __post_init__(self) -> None:
        require_valid(self)

    def after(self, *, kl: float, sequences: int) -> "AdaptiveKL":
        """Coef (1 + clip(kl / target - 1, -0.2, 0.2) sequences / horizon).

        `kl` is the mean over sequences of the sum over their tokens [nats]; verl and ROLL put the mean over tokens here,
        which asks for another target. Raises ValueError for a kl that is not finite, and for so many sequences at once
        (5 horizons) that the coefficient could turn negative.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}; the adaptive coefficient needs a finite mean over sequences")
        if sequences < 0 or sequences * LARGEST_KL_ERROR >= self.horizon:
            raise ValueError(f"{sequences} sequences at once with a horizon of {self.horizon}; raise the horizon above a fifth of them")
        error = min(max(kl / self.target - 1, -LARGEST_KL_ERROR), LARGEST_KL_ERROR)
        return replace(self, coef=self.coef * (1 + error * sequences / self.horizon))


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """An entropy coefficient that rises while the policy's entropy is too low. Reference: arXiv 2505.22312 eq 3.2."""

    level: Annotated[float, Range(low=0, high=1)] = 0.0
    """Coefficient held ready [per nat], in [0, 1]."""
    target: Annotated[float, Range(low=0)] = 0.2
    """Entropy per token the policy shall keep [nats], at least 0."""
    step: Annotated[float, Range(low=0, open_low=True)] = 0.005
    """How far the level moves after each optimiser step [per nat], above 0."""
    active: bool = False
    """Whether the entropy last measured was at or below the target."""

    def __post_init__(self) -> None:
        require_valid(self)

    @property
    def coef(self) -> float:
        """Weight of the entropy bonus now [per nat]: the level while the entropy is too low, otherwise zero."""
        return self.level if self.active else 0.0

    def after(self, *, entropy: float) -> "AdaptiveEntropy":
        """Level + step if entropy <= target, level - step otherwise, within [0, 1]. Raises ValueError for a NaN or infinite entropy."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy is {entropy}; the adaptive coefficient needs a finite mean over action tokens")
        low = entropy <= self.target
        return replace(self, level=min(max(self.level + (self.step if low else -self.step), 0.0), 1.0), active=low)
