"""How far a command has come that is no training: a bar at a terminal, a line every few seconds elsewhere; on stderr, as output is not."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0
"""Seconds between two lines where there is no terminal."""


class Bar:
    """`advance` hears of what is done; `say` tells what is being waited for."""

    def __init__(self, console: Console, progress: Progress, *, unit: str, total: int, done: int) -> None:
        self._console, self._progress, self._unit = console, progress, unit
        self._total, self._done = total, done
        self._task = progress.add_task("", total=total, completed=done)
        self._began, self._told = time.monotonic(), time.monotonic()
        self._first = done

    def say(self, text: str) -> None:
        """Something else is being done now."""
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal:
            self._line(text)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        self._progress.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._told >= LINE_EVERY_S or self._done == self._total):
            self._told = now
            left_s = (now - self._began) * (self._total - self._done) / max(1, self._done - self._first)
            self._line(f"{self._done} of {self._total} {self._unit}, about {left_s:.0f} s left")

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(*, unit: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar for as long as the block runs; gone afterwards."""
    console = Console(stderr=True, highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(console, progress, unit=unit, total=total, done=done)
