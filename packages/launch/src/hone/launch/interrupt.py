"""Ctrl-C: once, and the run ends after the step it is in; twice, and it ends now.

Before the loop has begun there is no step to finish, so once is enough.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

SAME_PRESS_S = 0.3
"""A signal this soon after the last [s] is the same press: the terminal sends Ctrl-C to all, and `uv run` passes it on once more."""


class Preempted(KeyboardInterrupt):
    """SIGTERM: somebody else wants the machine. Ends a run as Ctrl-C does, with an exit code of its own."""


class Interrupt:
    """A context in which Ctrl-C or SIGTERM sets `asked` first and raises KeyboardInterrupt or Preempted second.

    `notice(text)` tells the person what will happen. Until `patient` is True the first one raises at once. `preempted` says
    that it was SIGTERM that asked.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.asked = False
        self.preempted = False
        self._last = -math.inf
        self.patient = False
        self._notice = notice

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        since, self._last = now - self._last, now
        if since < SAME_PRESS_S:
            return
        again, self.asked, self.preempted = self.asked, True, number == signal.SIGTERM
        if again or not self.patient:
            raise Preempted if self.preempted else KeyboardInterrupt
        # Not from the handler itself: the main thread may be in the middle of printing.
        text = "stopping after this step and saving the model; press Ctrl-C again to stop now"
        threading.Thread(target=self._notice, args=(text,), name="hone-notice").start()
