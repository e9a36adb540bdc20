# pyright: basic
# Compiled functions have numba's types, not Python's.
"""Shares of a compiled function's work, given to the threads that torch itself computes with.

Threads of our own would compete with torch's, which stay awake for some milliseconds after each operation: two threads of
ours were then slower than one. numba's parallel loops end the process when entered from two threads, or from a fork.

No Python runs inside: a signal's handler (Ctrl-C) waits until all shares are done, and can lose none of them.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any, no_type_check

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

# void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags): what a compiler makes of
# `#pragma omp parallel`; GNU's and LLVM's OpenMP both have it, and torch has loaded whichever it was built for.
_parallel: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
if _parallel is not None:
    _parallel.argtypes, _parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
_forked = False

if _parallel is None:
    number_of_thread = njit(lambda: 0)
    number_of_threads = njit(lambda: 1)
else:
    number_of_thread: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
    number_of_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())

entry: Any = cfunc(types.void(types.voidptr))
"""Decorates what `in_threads` runs. It reads its arguments with `carray(data, ..., np.int64)` and `pointer`, and does the shares
`number_of_thread()`, that plus `number_of_threads()`, and so on: OpenMP may come with fewer threads than asked for."""


@intrinsic
@no_type_check
def pointer(_typing, address):
    """The address, an integer, as a pointer for `carray`."""

    def lower(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), lower


def shares_of_work() -> int:
    """As many as torch has threads; one in a forked child, since OpenMP's threads stayed with the parent."""
    return 1 if _forked else torch.get_num_threads()


def in_threads(work: Any, numbers: Sequence[int], arrays: Sequence[np.ndarray], *, shares: int) -> None:
    """Run an `entry` on `shares` threads at most; it is given `numbers` and then the arrays' addresses, as int64."""
    data = np.array([*numbers, *(array.ctypes.data for array in arrays)], dtype=np.int64)
    if shares == 1 or _parallel is None:
        work.ctypes(data.ctypes.data)  # outside of a parallel region there is one thread, which does all shares
    else:
        _parallel(work.address, data.ctypes.data, shares, 0)


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
