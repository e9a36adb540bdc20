"""What the person at the keyboard sees: a live picture on a terminal, plain lines anywhere else.

The loop's caller feeds it: startup(role, state) -> phase(name, None) ... phase(name, seconds) -> step(metrics) -> done(summary).
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console

from hone.launch.observe.live_display import LiveDisplay
from hone.launch.observe.plain_display import PlainDisplay
from hone.launch.observe.progress import RunInfo
from hone.launch.observe.summary import Summary


@runtime_checkable
class Display(Protocol):
    """Shows a run; a context manager, so that the terminal is as it was whatever ends the run."""

    def startup(self, role: str, state: str) -> None:
        """A role is being started: "loading weights", ... and at last READY or FAILED (progress.py)."""
        ...

    def phase(self, name: str, seconds: float | None) -> None:
        """A phase of the step began (None), or ended after `seconds`."""
        ...

    def step(self, metrics: Mapping[str, int | float]) -> None:
        """A step is done; "step" among its metrics is its number from 1."""
        ...

    def note(self, text: str) -> None:
        """One thing worth telling, shown once."""
        ...

    def done(self, summary: Summary) -> None:
        """The run is over."""
        ...

    def __enter__(self) -> "Display":
        """Begin to show."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the terminal as it was found."""
        ...


def make_display(console: Console, info: RunInfo, *, clock: Callable[[], float] = time.monotonic) -> Display:
    """A LiveDisplay where a person watches (a terminal that can move its cursor), else a PlainDisplay."""
    # FORCE_COLOR makes Rich call a pipe a terminal; colours are harmless there, moving the cursor is not.
    watched = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
    return LiveDisplay(console, info, clock=clock) if watched else PlainDisplay(console, info, clock=clock)
