# SPDX-License-Identifier: Apache-2.0
"""One grouped product of CuPy arrays by itself, through any fast backend: what `grouped_gemm_fp8` calls."""

from __future__ import annotations

import threading
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cupy_moe import backend as backend_choice
from cupy_moe import driver, e4m3, mma, sm90, tuning
from cupy_moe.cublaslt import ALIGNMENT, Context
from cupy_moe.grouped_gemm import GroupedGemm
from cupy_moe.launches import Matrix
from cupy_moe.tiles import End, Groups
from cupy_moe.workspace import dedicated


class Product(NamedTuple):
    """What `multiply` returns, CuPy arrays."""

    product: Any  # (rows, n, up to a multiple of 16) float16 in units of `unit`
    unit: float  # what 1 in `product` stands for
    row_experts: Any  # (rows,) int32; -1 in front of expert_offsets[0] and from expert_offsets[E] on


def multiply(device: int, backend: str, a: Any, weights: Any, expert_offsets: Any, choice: int = 0) -> Product:
    """Multiply each expert's rows by its weights, on CuPy's current device and stream.

    Parameters
    ----------
    device, backend
        The current device; "cublaslt", "sm90" or "mma".
    a, weights, expert_offsets
        CuPy: (rows, k) and (E, n, k) codes, (E + 1,) int32. Where n or k is no multiple of 16, copies are padded.
    choice
        Which of the algorithms of cuBLASLt's heuristic runs.
    """
    import cupy

    tuning.CACHE.load()
    a, weights = _padded(a, (1, ALIGNMENT)), _padded(weights, (1, ALIGNMENT, ALIGNMENT))
    experts, n, k = weights.shape
    product = cupy.zeros((len(a), n), cupy.float16)  # rows in front of the first expert's are not written
    # Whatever the offsets are, there is no row behind the last one, and no count is negative.
    bounds = cupy.clip(expert_offsets, 0, len(a))
    spans = bounds[:-1], cupy.maximum(cupy.diff(bounds), 0)
    if backend == "cublaslt":
        _multiply_cublaslt(device, a, weights, *spans, product, choice)
    else:
        _multiply_own({"sm90": sm90, "mma": mma}[backend], device, a, weights, *spans, product)
    owners = cupy.searchsorted(expert_offsets, cupy.arange(len(a), dtype=cupy.int32), side="right") - 1
    return Product(product, e4m3.half_unit(k), cupy.where(owners < experts, owners, -1).astype(cupy.int32))


def _multiply_own(
    kernel: ModuleType, device: int, a: Any, weights: Any, first: Any, counts: Any, product: Any
) -> None:
    import cupy

    (rows, k), (experts, n, _) = a.shape, weights.shape
    spans = cupy.stack([first, counts], axis=1)
    claims = cupy.zeros(2, np.int32)
    kernel.grouped_gemm(
        device, kernel.Weights(weights.data.ptr, experts, n, k, paired=False), Matrix(a.data.ptr, k, "uint8"), rows,
        Groups(spans.data.ptr, claims.data.ptr), Matrix(product.data.ptr, n, "float16"),
        End("PRODUCT", unit=e4m3.half_unit(k)),
    )(int(cupy.cuda.get_current_stream().ptr))


def _multiply_cublaslt(
    device: int, a: Any, weights: Any, first: Any, counts: Any, product: Any, choice: int
) -> None:
    import cupy

    stream = int(cupy.cuda.get_current_stream().ptr)
    context, identity = backend_choice.cublaslt_context(device), driver.stream_identity(stream)
    gemm, sizes, pointers = _gemm_of(context, identity, weights.data.ptr, *weights.shape)
    with _tables_in_use:
        sizes[...] = counts
        for table, matrix in zip(pointers, (a, product), strict=True):
            cupy.multiply(first, matrix.shape[1] * matrix.itemsize, out=table, dtype=cupy.int64)
            table += matrix.data.ptr
        gemm.prepare(len(a), pointers[0].data.ptr, pointers[1].data.ptr, choice=choice)(stream)


_tables_in_use = threading.Lock()  # from what fills them to what reads them, where threads share a stream


@lru_cache(maxsize=64)
def _gemm_of(
    context: Context, stream: tuple[int, int], weights: int, experts: int, n: int, k: int
) -> tuple[GroupedGemm, Any, Any]:
    """A GEMM with its tables, found again for the same addresses; one per stream, whose calls do not overlap."""
    counts, pointers = dedicated((experts,), np.int32), dedicated((2, experts), np.int64)
    return GroupedGemm(context, weights, experts, n, k, counts.data.ptr), counts, pointers


def _padded(codes: Any, multiples: tuple[int, ...]) -> Any:
    """The codes with zeros appended along each axis up to a multiple; the same memory where that is aligned already."""
    import cupy

    codes = codes.view(cupy.uint8)
    widths = [(0, -size % multiple) for size, multiple in zip(codes.shape, multiples, strict=True)]
    if any(width for _, width in widths):
        return cupy.pad(codes, widths)
    return codes.copy() if codes.data.ptr % ALIGNMENT else codes
