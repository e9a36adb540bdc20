"""Times of the phases of a step, for whoever shows them and for the step's metrics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """`on_phase(name, seconds)` hears of every phase as it begins (None) and ends (seconds)."""

    def __init__(self, on_phase: Callable[[str, float | None], None]) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self._on_phase(name, None)
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = time.monotonic() - start
            self._on_phase(name, self._seconds[name])

    def taken(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
