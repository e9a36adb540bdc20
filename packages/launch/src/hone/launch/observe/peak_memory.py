"""Memory of all processes of the run together, sampled in the background.

A process's share is its PSS (shared pages divided among those that map them, so that the object store is counted once),
or its RSS where the system keeps PSS from us. Unit: GB of 10^9 bytes. Children of children count too.
"""

import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

INTERVAL_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at the process tree: memory [GB], processes seen, and processes that ended while being looked at."""

    gb: float
    processes: int
    gone: int


def sample(root: int) -> Sample:
    """Memory of the process `root` and all its descendants now. Raises psutil.NoSuchProcess where `root` itself is gone."""
    import psutil

    process = psutil.Process(root)
    total, seen, gone = 0, 0, 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += _bytes(member)
            seen += 1
        except psutil.NoSuchProcess:  # it ended between being listed and being read, and holds no memory any more
            gone += 1
    return Sample(gb=total / 1e9, processes=seen, gone=gone)


def _bytes(process: "psutil.Process") -> int:
    import psutil

    if sys.platform == "linux":
        try:
            return process.memory_full_info().pss
        except psutil.AccessDenied:  # another user's process, or one that forbids it: its resident size is public
            return process.memory_info().rss
    return process.memory_info().rss


class PeakMemory:
    """Samples the process tree of `root` every `INTERVAL_S` while the block runs; `now_gb` and `peak_gb` at any time."""

    def __init__(self, root: int, *, interval_s: float = INTERVAL_S) -> None:
        self._root = root
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hone-peak-memory", daemon=True)
        self._lock = threading.Lock()
        self._last = Sample(gb=0.0, processes=0, gone=0)
        self._peak_gb = 0.0

    def look(self) -> Sample:
        """Sample now."""
        seen = sample(self._root)
        with self._lock:
            self._last, self._peak_gb = seen, max(self._peak_gb, seen.gb)
        return seen

    @property
    def now_gb(self) -> float:
        """Memory [GB] when last looked at."""
        return self._last.gb

    @property
    def peak_gb(self) -> float:
        """The most [GB] seen so far."""
        return self._peak_gb

    def __enter__(self) -> "PeakMemory":
        self.look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            self.look()
