# SPDX-License-Identifier: Apache-2.0
"""The fp8 format e4m3fn over NumPy or CuPy arrays: sign, 4 exponent bits (bias 7), 3 mantissa bits.

There is no infinity; 0x7f and 0xff are NaN; the largest finite value is 448 (0x7e), the smallest normal one
2**-6 and the smallest subnormal one 2**-9.
"""

import math
import sys
from typing import Any

import ml_dtypes
import numpy as np

Array = Any  # a NumPy or a CuPy array

MAX = 448.0
HALF_MAX = 65504.0  # of float16
EXACT_TERMS = 1 << 17  # products, multiples of 2^-18 up to 448^2, whose sum fits into the 53 bits of a float64
NAN_CODE = 0x7F
MIN_EXPONENT = -6  # of a normal number; subnormal ones share its spacing
MANTISSA_BITS = 3
DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)


def half_unit(terms: int) -> float:
    """The power of two that keeps the largest possible sum of ``terms`` products of codes, divided by it, a float16."""
    return 2.0 ** math.ceil(math.log2(terms * MAX**2 / HALF_MAX))


def array_namespace(x: Array) -> Any:
    """Return the module (numpy or cupy) whose functions take `x`, without importing CuPy."""
    for base in type(x).__mro__:
        package = base.__module__.partition(".")[0]
        if package in ("numpy", "cupy"):
            return sys.modules[package]
    raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__module__}.{type(x).__qualname__}")


def is_fp8(x: Array) -> bool:
    """Whether `x` holds e4m3 values: float8_e4m3fn, or uint8 with its bits."""
    return bool(x.dtype == np.uint8 or x.dtype == DTYPE)


def as_codes(x: Array) -> Array:
    """View e4m3 values as their uint8 bits."""
    return x if x.dtype == np.uint8 else x.view(np.uint8)


def as_fp8(codes: Array) -> Array:
    """View uint8 bits as fp8: float8_e4m3fn in NumPy, still uint8 in CuPy, which has no such type."""
    return codes.view(DTYPE) if array_namespace(codes) is np else codes


def encode(x: Array) -> Array:
    """Round float32 to e4m3.

    Parameters
    ----------
    x : float32 array of any shape
        Another floating type is converted to float32 first.

    Returns
    -------
    uint8 array of the same shape
        The nearest code, ties to even. Magnitudes beyond 448, infinity included, saturate; NaN of either sign
        is 0x7f.
    """
    xp = array_namespace(x)
    x = x.astype(np.float32, copy=False)
    magnitude = xp.fmin(xp.abs(x), MAX)  # fmin: a NaN must not reach the cast to integers
    exponent = xp.frexp(xp.maximum(magnitude, 2.0**MIN_EXPONENT))[1] - 1
    steps = xp.rint(xp.ldexp(magnitude, MANTISSA_BITS - exponent)).astype(np.int32)
    # A normal number has 8 to 16 steps (16 carries into the next exponent) and a subnormal one 0 to 8.
    codes = ((exponent - MIN_EXPONENT) << MANTISSA_BITS) + steps + (xp.signbit(x).astype(np.int32) << 7)
    return xp.where(xp.isnan(x), NAN_CODE, codes).astype(np.uint8)


def decode(codes: Array) -> Array:
    """Return the float32 values of e4m3 codes (uint8, or float8_e4m3fn), exactly."""
    xp = array_namespace(codes)
    return xp.asarray(_VALUES)[as_codes(codes)]


def exact_matmul(a: Array, b: Array) -> Array:
    """Multiply matrices of e4m3 values in float64: sums are exact up to `EXACT_TERMS`, in whatever order they are made.

    The order of libraries may depend on the number of rows; of longer sums, the exact parts are added in turn.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return sum(a[:, k : k + EXACT_TERMS] @ b[k : k + EXACT_TERMS] for k in range(0, len(b), EXACT_TERMS))


def _values() -> np.ndarray[Any, np.dtype[np.float32]]:
    code = np.arange(256)
    exponent, mantissa = code >> MANTISSA_BITS & 0xF, code & 0x7
    steps = np.where(exponent == 0, mantissa, 8 + mantissa)
    magnitude = np.ldexp(steps.astype(np.float32), np.maximum(exponent, 1) - 7 - MANTISSA_BITS)
    values = np.where(code < 0x80, magnitude, -magnitude)
    values[code & 0x7F == NAN_CODE] = np.nan
    return np.asarray(values, np.float32)


_VALUES = _values()
