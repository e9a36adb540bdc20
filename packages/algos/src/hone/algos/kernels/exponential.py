# pyright: basic, reportCallIssue=false
# Compiled functions have numba's types, not Python's.
"""exp of an fp32 number for compiled loops, in vector lanes; within 2 units in the last place."""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

compiled: Any = njit(nogil=True, error_model="numpy", fastmath={"contract"})
"""Decorates a compiled function; fused multiply-adds everywhere."""
_ONE = np.float32(1)


@intrinsic
@no_type_check
def bits_of(_typing, number):
    """The bits of an fp32 number, as int32."""

    def lower(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), lower


@intrinsic
@no_type_check
def from_bits(_typing, bits):
    """The fp32 number of these bits."""

    def lower(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), lower


_LOWEST, _HIGHEST = np.float32(-104.0), np.float32(89.0)  # beyond these exp is 0 and inf in fp32
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2; multiples of the first are exact
_ROUNDER = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_ROUNDER_BITS, _BIAS = np.int32(0x4B400000), np.int32(127)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720, 5040))


@compiled
@no_type_check
def exp(x):
    """The exponential of an fp32 number; NaN stays NaN."""
    # exp(x) = 2^n exp(r), n the integer nearest to x / ln 2, |r| <= ln 2 / 2: there the series to r^7 is exact to fp32. The
    # C library's is called number by number, which takes several times as long. NaN stays NaN: it passes both comparisons.
    x = _HIGHEST if x > _HIGHEST else x
    x = _LOWEST if x < _LOWEST else x
    rounded = x * _LOG2_E + _ROUNDER
    n = rounded - _ROUNDER
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    tail = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))
    # In two factors, since 2^n itself overflows, or is no normal number, before the product does.
    exponent = np.int32(bits_of(rounded) - _ROUNDER_BITS)
    half = np.int32(exponent >> np.int32(1))
    first = from_bits(np.int32((half + _BIAS) << np.int32(23)))
    second = from_bits(np.int32((exponent - half + _BIAS) << np.int32(23)))
    return (_ONE + (r + r * r * tail)) * first * second
