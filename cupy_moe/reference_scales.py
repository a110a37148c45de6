# SPDX-License-Identifier: Apache-2.0
"""The scales of the reference: what one belongs to is told by its shape.

Of activations: ``(1,)`` the tensor, ``(E,)`` the expert of the row, ``(rows, 1)`` the row. Of weights:
``(E,)``, ``(E, 1)`` and ``(E, 1, 1)`` the expert, ``(E, 2)`` its gate and its up half, ``(E, n)`` and
``(E, n, 1)`` the channel.
"""

from typing import Any

import numpy as np

from cupy_moe import e4m3
from cupy_moe.e4m3 import Array, array_namespace

TINY_AMAX = 1e-30  # a tensor of zeros still gets a usable scale


def dynamic_scale(x: Array, per_token: bool) -> Array:
    """Return max(amax, 1e-30) / 448 of float32 (rows, C): per row (rows, 1), else over all of them (1,).

    The maximum is over the finite values.
    """
    xp = array_namespace(x)
    if not x.shape[1]:
        x = xp.zeros((len(x), 1), np.float32)
    amax = xp.max(xp.where(xp.isfinite(x), xp.abs(x), 0), axis=1, keepdims=True)
    if not per_token:
        amax = xp.concatenate([amax, xp.zeros((1, 1), np.float32)]).max(axis=0)  # no rows at all: zero
    return xp.maximum(amax, TINY_AMAX) / e4m3.MAX


def rescale(
    x: Array, x_scale: Any, w_scale: Array | None, bias: Array | None, row_experts: Array | None
) -> Array:
    """Return x * (x_scale * w_scale) + bias in float32, any of them None. Rows of no expert hold anything."""
    xp = array_namespace(x)
    row_scale = xp.ones((1, 1), np.float32)
    if x_scale is not None:
        row_scale = per_row(as_scale(x_scale, xp), row_experts)
    if w_scale is not None:
        row_scale = row_scale * _per_row_and_column(w_scale, x.shape[1], row_experts)
    y = x.astype(np.float32, copy=False) * row_scale
    return y if bias is None else y + _per_row_and_column(bias, x.shape[1], row_experts)


def as_scale(scale: Any, xp: Any) -> Array:
    """Make a scale that may be a Python number an array of at least one dimension."""
    return xp.atleast_1d(xp.asarray(scale, dtype=np.float32))


def per_row(scale: Array, row_experts: Array | None) -> Array:
    """Broadcast a scale (1,), per expert (E,) or per row (rows, 1) over rows: (1, 1) or (rows, 1)."""
    if scale.size == 1 or scale.ndim == 2:
        return scale.reshape(-1, 1)
    return scale[row_experts][:, None]


def _per_row_and_column(table: Array, columns: int, row_experts: Array | None) -> Array:
    """Gather what each expert has once, per half or per column, as float32 (rows, 1) or (rows, columns)."""
    xp = array_namespace(table)
    table = table.reshape(len(table), -1).astype(np.float32)
    if table.shape[1] == 2 and columns > 2:  # gate and up apart
        table = xp.repeat(table, columns // 2, axis=1)
    return table[:1] if row_experts is None else table[row_experts]
