# SPDX-License-Identifier: Apache-2.0
"""Where the intermediates of a call lie in scratch memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cupy_moe import dispatch
from cupy_moe.launches import Maps, Matrix
from cupy_moe.workspace import Carver

if TYPE_CHECKING:
    from cupy_moe.pipeline import Layer


class Buffers:
    """The intermediates of a call with ``rows`` (token, slot) pairs, laid out from an address on.

    What is never needed at the same time shares its place: ``a`` lies where ``x`` was, which GEMM 1 has read by then,
    and ``y`` behind ``a``, where GEMM 1's result ``inner`` was, which the kernel behind has read by then. No kernel
    writes to any of these before the kernel in front is done, so overlapping launches are safe too. A GEMM 1 that makes
    ``a`` itself has no ``inner``, and ``a`` a place of its own. ``comparable``: ``inner`` holds numbers, one after
    another.
    """

    def __init__(self, layer: Layer, rows: int, base: int = 0, *, comparable: bool = False) -> None:
        carver = Carver(base)
        inner_rows, columns, dtype = layer.gemms.inner(layer, rows, comparable)
        inner = Matrix(0, columns, dtype)
        first, second = Carver(base), Carver(base)  # what is there until the activation is done, and after that
        first.take(rows * max(layer.hidden, layer.intermediate))
        if not columns:
            second.take(rows * layer.hidden)
        self.x = Matrix(base, layer.hidden, "uint8")
        self.inner = inner._replace(pointer=first.take(inner_rows * columns * inner.itemsize))
        self.a = Matrix(second.take(rows * layer.intermediate), layer.intermediate, "uint8")
        self.y = Matrix(second.take(rows * layer.hidden * 2), layer.hidden, "float16")
        carver.take(max(first.used, second.used))
        self.x_scales = carver.take(rows * 4)
        self.a_scales = carver.take(rows * 4)
        # Routing fills all of these; of a call, no kernel reads the offsets or the first map.
        self.maps = Maps(
            layer.expert_offsets.data.ptr, layer.expert_counts.data.ptr, carver.take(rows * 4), carver.take(rows * 4),
            carver.take(rows * 4), layer.spans.data.ptr,
        )
        self.scratch = carver.take(dispatch.route_blocks(rows) * layer.spec.num_experts * 4)
        self.nbytes = carver.used


def as_array(matrix: Matrix, rows: int) -> Any:
    """The first rows of a matrix in scratch memory as a CuPy array."""
    import cupy

    memory = cupy.cuda.UnownedMemory(matrix.pointer, rows * matrix.pitch * matrix.itemsize, None)
    return cupy.ndarray((rows, matrix.pitch), matrix.dtype, cupy.cuda.MemoryPointer(memory, 0))
