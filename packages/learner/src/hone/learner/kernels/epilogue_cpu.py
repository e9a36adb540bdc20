# pyright: basic, reportCallIssue=false
# Compiled functions have numba's types, not Python's.
"""What follows the head's product on a CPU, compiled by numba: a tile's statistics in two passes over each row, its gradients in one.

The same as `tiles` has in plain torch, which takes a pass over the tile for every operation; within a few units in the last
place of it. A row's results depend on that row alone. Shares of rows run in torch's own threads. Of bf16 a row at a time is
widened to fp32, and rounded again to where it stood. Imported only where it runs: `hone-algos[fast]` brings numba, and compiling
takes two seconds when a process first asks.
"""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import carray, njit
from torch import Tensor

from hone.algos.kernels.exponential import bits_of, exp, from_bits
from hone.algos.kernels.threads import entry, in_threads, number_of_thread, number_of_threads, pointer, shares_of_work

# Sums over the vocabulary may be reordered, so that they run in vector lanes.
_compiled: Any = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
# With a NaN among them the maximum may be any of the numbers, and the sums are NaN all the same.
_compiled_maximum: Any = njit(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})
_compiled_bits: Any = njit(nogil=True, error_model="numpy")
_ZERO, _LEAST = np.float32(0), np.float32(-np.inf)


def reduce(
    logits: Float[Tensor, "c b"], column: Int[Tensor, " c"], *, temperature: float, with_entropy: bool
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Per token: max z, sum exp(z - max), sum exp(z - max) (z - max) (0 unless asked for), and z of `column`; z = logits / temperature."""
    rows, width = logits.shape
    results = torch.empty(4, rows)
    numbers = (rows, width, shares := shares_of_work(), int(with_entropy), int(logits.dtype == torch.bfloat16))
    arrays = (column.contiguous().numpy(), np.array([temperature], dtype=np.float32), results.numpy())
    in_threads(_reduce, numbers, (*_bits_and_room(logits, shares), *arrays), shares=shares)
    top, added, product, gathered = results
    return top, added, product, gathered


def pull_(
    logits: Float[Tensor, "c b"],
    column: Int[Tensor, " c"],
    at_target: Float[Tensor, " c"],
    log_norm: Float[Tensor, " c"],
    slope: Float[Tensor, " c"],
    entropy: Float[Tensor, " c"] | None,
    entropy_slope: Float[Tensor, " c"] | None,
    *,
    temperature: float,
) -> Float[Tensor, "c b"]:
    """`logits` overwritten by d loss / d logits: `at_target` / temperature at `column`, unless that is -1; else by the slopes."""
    rows, width = logits.shape
    spread, push = (slope, slope) if entropy is None or entropy_slope is None else (entropy, entropy_slope)
    numbers = (rows, width, shares := shares_of_work(), int(entropy_slope is not None), int(logits.dtype == torch.bfloat16))
    per_row = [tensor.detach().contiguous().numpy() for tensor in (column, at_target, log_norm, slope, spread, push)]
    arrays = (*per_row, np.array([temperature], dtype=np.float32))
    in_threads(_pull, numbers, (*_bits_and_room(logits, shares), *arrays), shares=shares)
    return logits


def _bits_and_room(logits: Tensor, shares: int) -> tuple[np.ndarray, np.ndarray]:
    """The logits as compiled loops take them, and where each share widens a row of bf16."""
    if logits.dtype == torch.bfloat16:
        return logits.detach().view(torch.int16).numpy(), np.empty((shares, logits.shape[1]), dtype=np.float32)
    return logits.detach().numpy(), np.empty((shares, 1), dtype=np.float32)


@_compiled_bits
@no_type_check
def _widen(halves, row):
    for v in range(row.size):
        row[v] = from_bits(np.int32(halves[v]) << np.int32(16))


@_compiled_bits
@no_type_check
def _narrow(row, halves):
    # To the nearest, halves to even; a NaN stays one.
    for v in range(row.size):
        bits = bits_of(row[v])
        rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1)))
        halves[v] = np.int16((rounded if row[v] == row[v] else np.int32(0x7FC00000)) >> np.int32(16))


@_compiled_maximum
@no_type_check
def _highest(row):
    top = _LEAST
    for v in range(row.size):
        top = row[v] if row[v] > top else top
    return top


@_compiled
@no_type_check
def _sum(row, top, per_temperature):
    total = _ZERO
    for v in range(row.size):
        total += exp((row[v] - top) * per_temperature)
    return total


@_compiled
@no_type_check
def _sums(row, top, per_temperature):
    total, weighted = _ZERO, _ZERO
    for v in range(row.size):
        exponent = (row[v] - top) * per_temperature
        exponential = exp(exponent)
        total += exponential
        weighted += exponential * exponent
    return total, weighted


@_compiled
@no_type_check
def _pull_row(row, per_temperature, log_norm, slope):
    push = -slope * per_temperature
    for v in range(row.size):
        row[v] = push * exp(row[v] * per_temperature - log_norm)


@_compiled
@no_type_check
def _pull_row_with_entropy(row, per_temperature, log_norm, slope, entropy, entropy_slope):
    for v in range(row.size):
        log_probability = row[v] * per_temperature - log_norm
        row[v] = -per_temperature * exp(log_probability) * (slope + entropy_slope * (log_probability + entropy))


@entry
@no_type_check
def _reduce(data):
    job = carray(data, (10,), np.int64)
    rows, width, shares, with_entropy, halved = job[0], job[1], job[2], job[3], job[4]
    logits, halves = carray(pointer(job[5]), (rows, width), np.float32), carray(pointer(job[5]), (rows, width), np.int16)
    room, column = carray(pointer(job[6]), (shares, width if halved else 1), np.float32), carray(pointer(job[7]), (rows,), np.int64)
    temperature = carray(pointer(job[8]), (1,), np.float32)[0]
    results = carray(pointer(job[9]), (4, rows), np.float32)
    per_temperature = np.float32(np.float32(1) / temperature)
    share = np.int64(number_of_thread())
    while share < shares:
        for token in range(rows * share // shares, rows * (share + 1) // shares):
            row = room[share] if halved else logits[token]
            if halved:
                _widen(halves[token], row)
            top = _highest(row)
            results[0, token] = top * per_temperature
            if with_entropy:
                total, weighted = _sums(row, top, per_temperature)
                results[1, token] = total
                results[2, token] = weighted
            else:
                results[1, token] = _sum(row, top, per_temperature)
                results[2, token] = _ZERO
            results[3, token] = row[column[token]] * per_temperature
        share += np.int64(number_of_threads())


@entry
@no_type_check
def _pull(data):
    job = carray(data, (14,), np.int64)
    rows, width, shares, with_entropy, halved = job[0], job[1], job[2], job[3], job[4]
    logits, halves = carray(pointer(job[5]), (rows, width), np.float32), carray(pointer(job[5]), (rows, width), np.int16)
    room, column = carray(pointer(job[6]), (shares, width if halved else 1), np.float32), carray(pointer(job[7]), (rows,), np.int64)
    at_target, log_norm = carray(pointer(job[8]), (rows,), np.float32), carray(pointer(job[9]), (rows,), np.float32)
    slope, entropy = carray(pointer(job[10]), (rows,), np.float32), carray(pointer(job[11]), (rows,), np.float32)
    entropy_slope = carray(pointer(job[12]), (rows,), np.float32)
    temperature = carray(pointer(job[13]), (1,), np.float32)[0]
    per_temperature = np.float32(np.float32(1) / temperature)
    share = np.int64(number_of_thread())
    while share < shares:
        for token in range(rows * share // shares, rows * (share + 1) // shares):
            row = room[share] if halved else logits[token]
            if halved:
                _widen(halves[token], row)
            if with_entropy:
                _pull_row_with_entropy(row, per_temperature, log_norm[token], slope[token], entropy[token], entropy_slope[token])
            else:
                _pull_row(row, per_temperature, log_norm[token], slope[token])
            if column[token] >= 0:
                row[column[token]] = at_target[token] * per_temperature
            if halved:
                _narrow(row, halves[token])
        share += np.int64(number_of_threads())
