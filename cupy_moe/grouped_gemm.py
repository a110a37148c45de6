# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of a layer's weights through cuBLASLt: algorithm per number of rows, tables and workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_moe import driver
from cupy_moe.cublaslt import ALIGNMENT, Algorithm, Context, GroupedMatmul

Prepared = Callable[[int], None]
"""A prepared matmul: called with the stream."""


class Preference(NamedTuple):
    """An algorithm for a range of rows per expert: what to ask the heuristic, and which proposal to take."""

    below: float  # rows per expert, on average over all experts
    average: int  # what the heuristic is told
    tile: int  # cublasLtMatmulTile_t
    option: int  # custom option of the algorithm


# The heuristic's own first proposal is up to 1.5 times slower than its best. These lost least over the layers of
# benchmarks/cases.py on an H100 with cuBLAS 13.10 (benchmarks/algorithms.py, results/algorithms_h100.json). Where the
# heuristic does not propose them (another library or device), its first proposal runs.
PREFERRED = (
    Preference(12, 8, 312, 1),  # 64 x 16
    Preference(24, 32, 13, 1),  # 64 x 32
    Preference(46, 64, 18, 1),  # 128 x 64
    Preference(182, 128, 21, 6),  # 256 x 64
    Preference(float("inf"), 128, 20, 5),  # 128 x 128
)


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
        self._algorithms: dict[Preference, list[Algorithm]] = {}
        # One workspace per GEMM: two in one CUDA graph that share one have been seen to fault on replay (<= 13.7).
        self._workspaces: list[Any] = []

    def algorithms(self, rows: int) -> list[Algorithm]:
        """The heuristic's proposals for ``rows`` rows in all, the one of `PREFERRED` first if it is among them."""
        average = rows / len(self.weight_pointers)
        preferred = next(entry for entry in PREFERRED if average < entry.below)
        if preferred not in self._algorithms:
            found = self.matmul.algorithms(preferred.average)
            wanted = (preferred.tile, preferred.option)
            self._algorithms[preferred] = sorted(found, key=lambda one: self.matmul.configuration(one) != wanted)
        return self._algorithms[preferred]

    def prepare(self, rows: int, row_pointers: int, result_pointers: int, choice: int = 0) -> Prepared:
        """The launch for ``rows`` rows in all, with number ``choice`` of `algorithms`.

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
