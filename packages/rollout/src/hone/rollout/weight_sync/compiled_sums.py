# pyright: basic, reportCallIssue=false
# Compiled functions have numba's types, not Python's.
"""The sums of a fingerprint on a CPU, compiled by numba: one pass over the bytes, in torch's own threads.

The same whole numbers as plain torch, which makes a table of products first. Imported only where it runs (`source.py`).
"""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Int64
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from hone.algos.kernels.threads import entry, in_threads, number_of_thread, number_of_threads, pointer, shares_of_work

_compiled: Any = njit(nogil=True, error_model="numpy")
_LANES = 8
_SHARE = 1 << 17  # words that are worth waking a thread for: 1 MiB


def sums_of_chunks(
    words: Int64[Tensor, " W"], multipliers: Int64[Tensor, " c"], target: Int64[Tensor, " W"] | None = None
) -> Int64[Tensor, " C"]:
    """sum_i w_i x_{c,i} mod 2^64 of every chunk of c words, the last perhaps short; copied to `target` on the way."""
    size = len(multipliers)
    result = torch.empty(-(-len(words) // size), dtype=torch.int64)
    # Without a target the words are their own, which the loop knows by the address.
    addresses = (words, multipliers, result, words if target is None else target)
    shares = min(shares_of_work(), max(1, len(words) // _SHARE))
    in_threads(_sums, (len(words), size, shares, *(one.data_ptr() for one in addresses)), (), shares=shares)
    return result


@_compiled
@no_type_check
def _sum(words, multipliers):
    total = np.int64(0)
    for i in range(words.size):
        total += words[i] * multipliers[i]
    return total


@intrinsic
@no_type_check
def _streamed(_typing, words, multipliers, target, count):
    """The same of `count` words at an address, each written past the caches to an address that 64 divides as it is read.

    What is written is read next by another process: a plain store would first fetch the old bytes and then push others out, which
    costs a third of the memory's speed. In vectors of eight words, since LLVM makes no vectors of such stores itself; `count` is a
    multiple of eight.
    """

    def lower(_context, builder, _signature, arguments):
        word, index = ir.IntType(64), ir.Constant(ir.IntType(64), 0)
        vector = ir.VectorType(word, _LANES)
        source, factors, sink = (builder.inttoptr(address, vector.as_pointer()) for address in arguments[:3])
        steps = builder.udiv(arguments[3], ir.Constant(word, _LANES))
        before, loop, after = builder.block, builder.append_basic_block("stream"), builder.append_basic_block("streamed")
        builder.cbranch(builder.icmp_unsigned("!=", steps, index), loop, after)
        with builder.goto_block(loop):
            at, sums = builder.phi(word), builder.phi(vector)
            read = builder.load(builder.gep(source, [at]), align=8)
            written = builder.store(read, builder.gep(sink, [at]), align=8 * _LANES)
            written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            added = builder.add(sums, builder.mul(read, builder.load(builder.gep(factors, [at]), align=8)))
            following = builder.add(at, ir.Constant(word, 1))
            at.add_incoming(index, before)
            at.add_incoming(following, loop)
            sums.add_incoming(ir.Constant(vector, None), before)
            sums.add_incoming(added, loop)
            builder.cbranch(builder.icmp_unsigned("<", following, steps), loop, after)
        builder.position_at_end(after)
        lanes = builder.phi(vector)
        lanes.add_incoming(ir.Constant(vector, None), before)
        lanes.add_incoming(added, loop)
        total = builder.extract_element(lanes, ir.Constant(ir.IntType(32), 0))
        for lane in range(1, _LANES):
            total = builder.add(total, builder.extract_element(lanes, ir.Constant(ir.IntType(32), lane)))
        return total

    return types.int64(types.int64, types.int64, types.int64, types.int64), lower


@intrinsic
@no_type_check
def _fence(_typing):
    """Until what was streamed has arrived: nobody may be told of bytes that are still on their way."""

    def lower(_context, builder, _signature, _arguments):
        builder.fence("seq_cst")

    return types.void(), lower


@entry
@no_type_check
def _sums(data):
    job = carray(data, (7,), np.int64)
    count, size, shares = job[0], job[1], job[2]
    chunks = (count + size - 1) // size
    words, multipliers = carray(pointer(job[3]), (count,), np.int64), carray(pointer(job[4]), (size,), np.int64)
    result, target = carray(pointer(job[5]), (chunks,), np.int64), carray(pointer(job[6]), (count,), np.int64)
    streamed = job[6] % (8 * _LANES) == 0 and size % _LANES == 0
    share = np.int64(number_of_thread())
    while share < shares:
        for chunk in range(chunks * share // shares, chunks * (share + 1) // shares):
            begin, end = chunk * size, min(count, (chunk + 1) * size)
            if job[3] == job[6]:
                result[chunk] = _sum(words[begin:end], multipliers)
                continue
            whole = (end - begin) // _LANES * _LANES if streamed else 0
            result[chunk] = _streamed(job[3] + 8 * begin, job[4], job[6] + 8 * begin, whole) + _sum(
                words[begin + whole : end], multipliers[whole:]
            )
            target[begin + whole : end] = words[begin + whole : end]
        _fence()
        share += np.int64(number_of_threads())
