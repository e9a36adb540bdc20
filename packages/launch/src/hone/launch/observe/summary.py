"""How a run ended, for the display, the events and the report alike."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The outcome. `elapsed_s` from pressing enter; `model` is the exported model's path, where one was written.

    `error` is the complete message of what stopped the run; `next_commands` are what the user may type now.
    """

    outcome: Outcome
    elapsed_s: float
    peak_memory_gb: float
    model: str | None = None
    error: str | None = None
    next_commands: tuple[str, ...] = ()
