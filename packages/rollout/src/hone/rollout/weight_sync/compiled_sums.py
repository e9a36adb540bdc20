# pyright: basic, reportCallIssue=false
# Compiled functions have numba's types, not Python's.
"""The sums of a fingerprint on a CPU, compiled by numba: one pass over the bytes, in torch's own threads.

The same whole numbers as plain torch, which makes a table of products first. Imported only where it runs (`source.py`).
"""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Int64
from numba import carray, njit
from torch import Tensor

from hone.algos.kernels.threads import entry, in_threads, number_of_thread, number_of_threads, pointer, shares_of_work

_compiled: Any = njit(nogil=True, error_model="numpy")


def sums_of_chunks(
    words: Int64[Tensor, " W"], multipliers: Int64[Tensor, " c"], target: Int64[Tensor, " W"] | None = None
) -> Int64[Tensor, " C"]:
    """sum_i w_i x_{c,i} mod 2^64 of every whole chunk of c words, which is copied to `target` while the cache holds it."""
    size = len(multipliers)
    result = torch.empty(len(words) // size, dtype=torch.int64)
    # Without a target the words are their own, which the loop knows by the address.
    arrays = (words.numpy(), multipliers.numpy(), result.numpy(), (words if target is None else target).numpy())
    shares = min(shares_of_work(), max(1, len(result)))
    in_threads(_sums, (len(result), size, shares), arrays, shares=shares)
    return result


@_compiled
@no_type_check
def _sum(words, multipliers):
    total = np.int64(0)
    for i in range(words.size):
        total += words[i] * multipliers[i]
    return total


@entry
@no_type_check
def _sums(data):
    job = carray(data, (7,), np.int64)
    chunks, size, shares = job[0], job[1], job[2]
    words, multipliers = carray(pointer(job[3]), (chunks, size), np.int64), carray(pointer(job[4]), (size,), np.int64)
    result, target = carray(pointer(job[5]), (chunks,), np.int64), carray(pointer(job[6]), (chunks, size), np.int64)
    share = np.int64(number_of_thread())
    while share < shares:
        for chunk in range(chunks * share // shares, chunks * (share + 1) // shares):
            if job[3] != job[6]:
                target[chunk] = words[chunk]
            result[chunk] = _sum(words[chunk], multipliers)
        share += np.int64(number_of_threads())
