"""The live picture: redrawn in place four times a second, with notes and stray prints above it.

What this process prints meanwhile goes through `gate.py` and appears there as a note.
"""

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hone.launch.observe.ending import ending
from hone.launch.observe.frame import Canvas, frame
from hone.launch.observe.gate import gated
from hone.launch.observe.progress import Progress, RunInfo
from hone.launch.observe.summary import Summary
from hone.launch.observe.text import encodable, inert

_REDRAWS_PER_SECOND = 4


class LiveDisplay:
    """A picture of the run at the bottom of the terminal, for as long as the block runs."""

    def __init__(self, console: Console, info: RunInfo, *, clock: Callable[[], float]) -> None:
        self._console = console
        self._info = info
        self._progress = Progress(total_steps=info.total_steps, clock=clock)
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=_REDRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._restore = contextlib.ExitStack()

    def startup(self, role: str, state: str) -> None:
        """Show a role's state; once training has begun, as a note."""
        self._progress.startup(role, state)
        if self._progress.view().step:
            self.note(f"{role}: {state}")

    def phase(self, name: str, seconds: float | None) -> None:
        """Mark the phase in progress."""
        self._progress.phase(name, seconds)

    def step(self, metrics: Mapping[str, int | float]) -> None:
        """Show a step's figures."""
        self._progress.step(metrics)

    def note(self, text: str) -> None:
        """Print above the picture."""
        self._console.print(Text(encodable(inert(text, keep_newlines=True), self._canvas().encoding), "dim"))

    def done(self, summary: Summary) -> None:
        """Replace the picture by the outcome."""
        self._live.transient = True
        self._stop()
        self._console.print(Group(Text(), *ending(self._info, self._progress.view(), summary, self._canvas())))

    def __enter__(self) -> "LiveDisplay":
        with contextlib.ExitStack() as begun:
            begun.callback(self._live.stop)
            self._live.start(refresh=True)
            begun.enter_context(gated(self.note))
            self._restore = begun.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        """Put the streams and the cursor back; done once, however often it is asked for."""
        self._restore.close()

    def _canvas(self) -> Canvas:
        return Canvas(width=self._console.width, height=self._console.height, encoding=self._console.encoding)

    def _draw(self) -> Group:
        return Group(*frame(self._info, self._progress.view(), self._canvas()))
