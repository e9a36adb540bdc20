"""fp16's loss scale, and how many steps may be left out: numbers that decide what becomes of a step that is not finite."""

from dataclasses import dataclass

from hone.learner.engines.protocol import StepInfo
from hone.learner.errors import NumericsError

INITIAL_POWER = 16
"""log2 of the first loss scale."""
WINDOW = 1000
"""Steps without overflow after which the scale is doubled."""


class LossScale:
    """Doubled after `WINDOW` steps in a row without overflow, halved at each, never below 1."""

    def __init__(self) -> None:
        self.scale, self.clean = 2**INITIAL_POWER, 0

    def update(self, *, overflow: bool) -> bool:
        """After a step; False for an overflow that lowering the scale cannot mend."""
        mendable = not overflow or self.scale > 1
        self.clean = 0 if overflow else self.clean + 1
        if overflow:
            self.scale = max(1, self.scale // 2)
        elif self.clean % WINDOW == 0:
            self.scale *= 2
        return mendable


@dataclass(kw_only=True)
class Skips:
    """Counts steps in a row that were left out for good reason, and ends the run at more than `bound`."""

    role: str
    bound: int
    in_a_row: int = 0

    def leave_out(self, what: str, *, step: int, norm: float, lr: float) -> StepInfo:
        """The result of a step that was left out. Raises NumericsError beyond the bound."""
        self.in_a_row += 1
        if self.in_a_row > self.bound:
            raise NumericsError(role=self.role, step=step, what=what, skipped=self.in_a_row)
        return StepInfo(grad_norm=norm, lr=lr, applied=False)
