"""What this process prints while a display stands: sent through the same escape as every foreign text, line by line.

A library's warning or a user's reward function writes to sys.stdout or sys.stderr and knows of no display; no control
character of it reaches the terminal or the log. Child processes are not reached from here: their output goes to logs/.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def gated(show: Callable[[str], None]) -> Iterator[None]:
    """Hand every line printed within the block to `show`."""
    out, err = Gate(show, sys.stdout), Gate(show, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.finish()
            err.finish()


class Gate(io.TextIOBase):
    """A text stream that hands whole lines to `show`; `behind` is the real one, by the name under which Rich looks for it."""

    def __init__(self, show: Callable[[str], None], behind: Any) -> None:
        self.rich_proxied_file = behind
        self._show = show
        self._line = ""

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - the stubs call a read-only name a variable
        """The real stream's."""
        return self.rich_proxied_file.encoding

    def fileno(self) -> int:
        """The real stream's: child processes are given it."""
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Show the lines that are complete, keep the rest."""
        *complete, self._line = (self._line + text).split("\n")
        for line in complete:
            # A progress bar redraws its line with carriage returns; only what it left standing is worth a line.
            self._show(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def finish(self) -> None:
        """Show a last line that was never ended."""
        if self._line:
            self._show(self._line)
            self._line = ""
