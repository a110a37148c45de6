# SPDX-License-Identifier: Apache-2.0
"""Where the intermediates of a call lie in scratch memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupy_moe import launches
from cupy_moe.launches import Maps, Matrix
from cupy_moe.workspace import Carver

if TYPE_CHECKING:
    from cupy_moe.pipeline import Layer

FINE_ELEMENTS = 1 << 20
"""Up to this many elements, 4 MB, GEMM 1's product costs nothing worth saving."""


class Buffers:
    """The intermediates of a call with ``rows`` (token, slot) pairs, laid out from an address on.

    What is never needed at the same time shares its place: ``a`` lies where ``x`` was, which GEMM 1 has read by then,
    and ``y`` behind ``a``, where the product was, which the activation has read by then. No kernel writes to any of
    these before the kernel in front is done, so overlapping launches are safe too.
    """

    def __init__(self, layer: Layer, rows: int, base: int = 0) -> None:
        carver = Carver(base)
        # GEMM 1's product is quantised again, which turns its rounding into flipped codes: small ones stay float32.
        dtype, itemsize = ("float32", 4) if rows * layer.product <= FINE_ELEMENTS else ("float16", 2)
        first, second = Carver(base), Carver(base)  # what is there until the activation is done, and after that
        first.take(rows * max(layer.hidden, layer.intermediate))
        self.x = Matrix(base, layer.hidden, "uint8")
        self.product = Matrix(first.take(rows * layer.product * itemsize), layer.product, dtype)
        self.a = Matrix(second.take(rows * layer.intermediate), layer.intermediate, "uint8")
        self.y = Matrix(second.take(rows * layer.hidden * 2), layer.hidden, "float16")
        carver.take(max(first.used, second.used))
        self.x_scales = carver.take(rows * 4)
        self.a_scales = carver.take(rows * 4)
        self.maps = Maps(
            layer.expert_offsets.data.ptr, layer.expert_counts.data.ptr, carver.take(rows * 4), carver.take(rows * 4),
            carver.take(rows * 4),
        )
        self.scratch = carver.take(launches.route_blocks(rows) * layer.spec.num_experts * 4)
        self.nbytes = carver.used
