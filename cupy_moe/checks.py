# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Every message names the argument, what is allowed and what came."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from cupy_moe import arrays
from cupy_moe.arrays import Array, Library

FLOATS = ("float16", "bfloat16", "float32")
FP8 = ("float8_e4m3fn", "uint8")
INDICES = ("int32", "int64")

Shape = tuple[int | str, ...]
"""A shape to match: sizes, or the names of sizes that may be anything."""
ONE: tuple[Shape, ...] = ((), (1,), (1, 1))
"""Shapes of one scale for all."""
MOST_SLOTS = 1024
"""Experts per token on a GPU, where `combine` has what it knows of them in shared memory."""


def library_of(name: str, x: Any) -> Library:
    """The library of the array argument ``name``; TypeError if it is no array."""
    library = arrays.library_of(x)
    if library is None:
        raise TypeError(f"{name}: expected a NumPy, CuPy or torch array; got {type(x).__name__}")
    return library


def info(name: str, x: Any, library: Library) -> Array:
    """Describe an array of ``library``; TypeError if it has no address (a torch tensor that is sparse or on 'meta')."""
    try:
        return library.describe(x)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a dense array in memory; got: {error}") from None


def describe(name: str, x: Any, library: Library, device: int) -> Array:
    """Describe an array that has to be of the kind ``library`` and on ``device``."""
    kind = arrays.library_of(x)
    if kind is not library:
        came = type(x).__name__ if kind is None else f"a {kind.name} array"
        raise TypeError(f"{name}: expected a {library.name} array like the other arguments; got {came}")
    array = info(name, x, library)
    if array.device != device:
        raise TypeError(f"{name}: expected an array on {place(device)}; got one on {place(array.device)}")
    return array


def expect(
    name: str, array: Array, dtypes: Iterable[str], *shapes: Shape, rows_only: bool = False, since: str = ""
) -> Array:
    """Check dtype, shape and contiguity; ``rows_only`` allows any distance between the rows of a matrix.

    ``since`` says in the message what the shape follows from.
    """
    dtypes = tuple(dtypes)
    if array.dtype not in dtypes:
        how = " (quantize_fp8 makes codes and their scales)" if dtypes == FP8 else ""
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}; got {array.dtype}{how}")
    if not any(_matches(array.shape, shape) for shape in shapes):
        allowed = " or ".join(_text(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {allowed}{since}; got {_text(array.shape)}")
    rows_only = rows_only and len(array.shape) == 2
    if rows_only:
        rows, cols = array.shape
        dense = ((cols <= 1 or array.strides[1] == 1) and (rows <= 1 or array.strides[0] >= cols)) or not rows * cols
    else:
        dense = array.contiguous
    if not dense:
        kind = "contiguous rows" if rows_only else "a C-contiguous array"
        raise ValueError(
            f"{name}: expected {kind}; got strides {array.strides} for shape {_text(array.shape)} "
            "(make a copy with .contiguous() in torch, ascontiguousarray() in NumPy and CuPy)"
        )
    return array


def option(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """``value`` if it is one of ``allowed``; ValueError with the choices otherwise."""
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def float_dtype(name: str, value: Any) -> str:
    """Name of the dtype ``value`` (a dtype of any library, or a name) if it is one of `FLOATS`."""
    try:
        found = None if value is None else arrays.dtype_name(value)
    except (TypeError, ValueError):
        found = None
    if found not in FLOATS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, FLOATS))}; got {value!r}")
    return found


def writable(name: str, x: Any) -> None:
    """Raise ValueError for a NumPy array that is read-only; the other kinds have no such thing."""
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name}: expected an array that can be written to; got a read-only one")


def flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False; got {value!r}")
    return value


def count(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer; got {value!r}")
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected {limit}; got {number}")
    return number


def number(name: str, x: Any) -> float | None:
    """``x`` as a float if it is a Python or NumPy number that can be a scale, None if it is an array."""
    if arrays.library_of(x) is not None:
        return None
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name}: expected a number or an array; got {x!r}, {type(x).__name__}")
    if not 2.0**-126 <= float(x) <= 2.0**126:  # as a float32, it and its reciprocal are normal numbers
        raise ValueError(f"{name}: expected a positive scale, from 2**-126 to 2**126; got {x!r}")
    return float(x)


def weight_scale_shapes(experts: int, channels: int, halves: bool) -> list[Shape]:
    """The shapes that a weight's scale may have: per tensor, gate and up apart (if ``halves``), per channel."""
    shapes: list[Shape] = [(experts,), (experts, 1), (experts, 1, 1), (experts, channels), (experts, channels, 1)]
    if halves:
        shapes.insert(3, (experts, 2))
    return shapes


def not_empty(name: str, array: Array) -> None:
    """Raise ValueError for an array without elements."""
    if 0 in array.shape:
        raise ValueError(f"{name}: expected at least one element; got shape {_text(array.shape)}")


def _matches(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )


def _text(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def place(device: int) -> str:
    """What a device is called in messages."""
    return "the CPU" if device == arrays.CPU else f"cuda:{device}"
