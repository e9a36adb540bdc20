"""Shares of a compiled function's work, given to the threads that torch itself computes with.

Threads of our own would compete with torch's, which stay awake for some milliseconds after each operation: two threads of
ours were then slower than one. numba's parallel loops end the process when entered from two threads, or from a fork.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags): what a compiler makes of
# `#pragma omp parallel`; GNU's and LLVM's OpenMP both have it, and torch has loaded whichever it was built for.
_parallel: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
_forked = False


def shares_of_work() -> int:
    """As many as torch has threads; one in a forked child, since OpenMP's threads stayed with the parent."""
    return 1 if _forked else torch.get_num_threads()


def in_threads(share: Callable[[int], object], shares: int) -> None:
    """Call `share(i)` once for each i below `shares`, at the same time; raises what one of them raised.

    Of use only to functions that release the interpreter's lock.
    """
    if shares == 1:
        share(0)
    elif _parallel is None:
        with ThreadPoolExecutor(shares) as pool:
            list(pool.map(share, range(shares)))
    else:
        _in_openmp(share, shares)


def _in_openmp(share: Callable[[int], object], shares: int) -> None:
    left = list(range(shares))
    failures: list[BaseException] = []

    # OpenMP may come with fewer threads than asked for; so each takes shares until none is left.
    def work(_data: object) -> None:
        with suppress(IndexError):
            while True:
                mine = left.pop()
                try:
                    share(mine)
                except BaseException as failure:  # an exception cannot pass through OpenMP; it is raised below
                    failures.append(failure)

    _parallel(_Work(work), None, shares, 0)
    if failures:
        raise failures[0]


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
