# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of a layer's weights through cuBLASLt: algorithm per number of rows, tables and workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupy_moe import driver
from cupy_moe.cublaslt import ALIGNMENT, Algorithm, Context, GroupedMatmul

Prepared = Callable[[int], None]
"""A prepared matmul: called with the stream."""


class GroupedGemm:
    """``(counts[e], k) x (n, k).T -> (counts[e], n)`` for each expert, e4m3 in, float16 in units of ``unit`` out.

    Parameters
    ----------
    context
        The cuBLASLt handle; its device has to be the current one.
    weights
        Address of the weights (experts, n, k), e4m3 codes, 16-byte aligned.
    experts, n, k
        Sizes, n and k multiples of 16.
    counts
        Address of the E row counts (int32), read when the matmul runs.
    """

    def __init__(self, context: Context, weights: int, experts: int, n: int, k: int, counts: int) -> None:
        import cupy

        self.matmul = GroupedMatmul(context, experts, n, k, counts)
        self.unit = self.matmul.unit
        self.weight_pointers = cupy.asarray(weights + np.arange(experts, dtype=np.int64) * (n * k))
        self._algorithms: dict[int, list[Algorithm]] = {}
        # One workspace per GEMM: two in one CUDA graph that share one have been seen to fault on replay (<= 13.7).
        self._workspaces: list[Any] = []

    def algorithms(self, rows: int) -> list[Algorithm]:
        """The heuristic's proposals for ``rows`` rows in all; the same list for numbers of rows close together."""
        average = -(-rows // len(self.weight_pointers))
        bucket = 1 << (average - 1).bit_length()
        if bucket not in self._algorithms:
            self._algorithms[bucket] = self.matmul.algorithms(bucket)
        return self._algorithms[bucket]

    def prepare(self, rows: int, row_pointers: int, result_pointers: int, choice: int = 0) -> Prepared:
        """The launch for ``rows`` rows in all, with the heuristic's algorithm number ``choice``.

        ``row_pointers`` and ``result_pointers`` are addresses of tables with the address of each expert's rows.
        """
        algorithm = self.algorithms(rows)[choice]
        workspace = self._workspace(algorithm.workspace_bytes)
        return self.matmul.launch(algorithm, self.weight_pointers.data.ptr, row_pointers, result_pointers, workspace)

    def _workspace(self, nbytes: int) -> int:
        import cupy

        if nbytes and (not self._workspaces or self._workspaces[-1].size < nbytes):
            # Outgrown ones stay: a CUDA graph may use them, and there are few sizes.
            with driver.allocation_allowed():
                self._workspaces.append(cupy.cuda.Memory(nbytes))
        return int(self._workspaces[-1].ptr) if nbytes else 0


def multiply(context: Context, a: Any, weights: Any, expert_offsets: Any, choice: int = 0) -> tuple[Any, float, Any]:
    """Multiply each expert's rows by its weights, on CuPy's current device and stream.

    Parameters
    ----------
    context
        The cuBLASLt handle of the device.
    a, weights, expert_offsets
        CuPy: (rows, k) and (E, n, k) codes, (E + 1,) int32. Where n or k is no multiple of 16, copies are padded.
    choice
        Which of the heuristic's algorithms runs.

    Returns
    -------
    product
        (rows, n, up to a multiple of 16) float16 in units of ``unit``.
    unit
        What 1 in ``product`` stands for.
    row_experts
        (rows,) int32, -1 from ``expert_offsets[E]`` on, where ``product`` is not written.
    """
    import cupy

    a, weights = _padded(a, (1, ALIGNMENT)), _padded(weights, (1, ALIGNMENT, ALIGNMENT))
    experts, n, k = weights.shape
    counts = cupy.diff(expert_offsets)
    first = expert_offsets[:-1].astype(cupy.int64)
    product = cupy.empty((len(a), n), cupy.float16)
    row_pointers = a.data.ptr + first * k
    result_pointers = product.data.ptr + first * (n * product.itemsize)
    gemm = GroupedGemm(context, weights.data.ptr, experts, n, k, counts.data.ptr)
    stream = cupy.cuda.get_current_stream()
    gemm.prepare(len(a), row_pointers.data.ptr, result_pointers.data.ptr, choice)(stream.ptr)
    owners = cupy.searchsorted(expert_offsets[1:], cupy.arange(len(a), dtype=cupy.int32), side="right")
    return product, gemm.unit, cupy.where(owners < experts, owners, -1).astype(cupy.int32)


def _padded(codes: Any, multiples: tuple[int, ...]) -> Any:
    """The codes with zeros appended along each axis up to a multiple; the same memory where nothing is missing."""
    import cupy

    codes = codes.view(cupy.uint8)
    widths = [(0, -size % multiple) for size, multiple in zip(codes.shape, multiples, strict=True)]
    return cupy.pad(codes, widths) if any(width for _, width in widths) else codes
