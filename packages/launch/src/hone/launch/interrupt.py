"""Ctrl-C: once, and the run ends after the step it is in; twice, and it ends now.

Before the loop has begun there is no step to finish, so once is enough.
"""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupt:
    """A context in which Ctrl-C sets `asked` first and raises KeyboardInterrupt second; SIGTERM counts as Ctrl-C.

    `notice(text)` tells the person what will happen. Until `patient` is True the first one raises at once.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.asked = False
        self.patient = False
        self._notice = notice

    def __enter__(self) -> "Interrupt":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.patient:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True
        self._notice("stopping after this step and saving the model; press Ctrl-C again to stop now")
