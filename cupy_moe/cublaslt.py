# SPDX-License-Identifier: Apache-2.0
"""cuBLASLt grouped fp8 matmul: finding a library that has it, and the calls.

The library is opened by absolute path with ``RTLD_LOCAL | RTLD_DEEPBIND``, so that a recent copy lives beside the older
one that torch has already loaded. Shapes, pointers and group sizes are read from device memory when the matmul runs:
the host never needs to know the routing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_moe import e4m3
from cupy_moe.driver import Step
from cupy_moe.workspace import dedicated

ENVIRONMENT = "CUPY_MOE_CUBLASLT"
GET_IT = (
    "pip install --target DIR --no-deps 'nvidia-cublas>=13.5' and set "
    f"{ENVIRONMENT}=DIR/nvidia/cu13/lib/libcublasLt.so.13"
)
ALIGNMENT = 16
"""K and the rows of the weights have to be multiples of this."""
WORKSPACE_BYTES = 32 << 20
"""Upper limit of the workspace of one matmul."""

_MINIMUM = {(9, 0): (13, 5), (10, 0): (13, 3), (10, 3): (13, 3), (11, 0): (13, 3)}
_REFUSED = {((10, 3), (13, 7)): "cuBLAS 13.7 has reported silent corruption on compute capability 10.3"}
_R_32F, _R_16F, _R_8F_E4M3, _COMPUTE_32F = 0, 2, 28, 68
_RESULTS = {"float16": _R_16F, "float32": _R_32F}
_DESC_TRANSA, _DESC_FAST_ACCUM = 3, 25
_CONFIG_TILE, _CONFIG_CUSTOM_OPTION = 1, 5
_PREF_WORKSPACE, _PREF_AVERAGE_K, _PREF_AVERAGE_D_ROWS, _PREF_AVERAGE_D_COLS = 1, 13, 14, 15


class CublasError(RuntimeError):
    """A cuBLASLt call failed; the message names the call and the status."""


class Algorithm(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``: an algorithm and the workspace it needs."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Found(NamedTuple):
    """A copy of the library: where, through what it was found, and its version or why it cannot be used."""

    path: str
    through: str
    version: tuple[int, int, int] | None
    problem: str | None
    library: ctypes.CDLL | None


def _candidates() -> Iterator[tuple[str, str]]:
    configured = os.environ.get(ENVIRONMENT)
    if configured:  # an explicit choice is not second-guessed
        yield configured, ENVIRONMENT
        return
    for folder in dict.fromkeys(sys.path):
        path = Path(folder or ".").resolve() / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
        if path.is_file():
            yield str(path), "the installed nvidia-cublas wheel"
    yield "libcublasLt.so.13", "the system"


def _open(path: str, through: str) -> Found:
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0))
    except OSError as error:
        return Found(path, through, None, f"cannot be opened: {error}", None)
    if not hasattr(library, "cublasLtGetVersion"):
        return Found(path, through, None, "is no cuBLASLt", None)
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    number = int(library.cublasLtGetVersion())
    version = (number // 10000, number // 100 % 100, number % 100)
    if not hasattr(library, "cublasLtGroupedMatrixLayoutCreate"):
        return Found(path, through, version, "has no grouped matmul", None)
    return Found(path, through, version, None, library)


@cache
def search(capability: tuple[int, int]) -> tuple[Found | None, str]:
    """The first usable copy for a compute capability and, if there is none, the reason with what was found where."""
    needed = _MINIMUM.get(capability)
    if needed is None:
        return None, (
            f"cuBLASLt has no grouped fp8 matmul for compute capability {capability[0]}.{capability[1]}; "
            f"it has for {', '.join(f'{a}.{b}' for a, b in _MINIMUM)}"
        )
    seen = []
    for path, through in _candidates():
        found = _open(path, through)
        problem = found.problem
        if problem is None and found.version is not None:
            refused = _REFUSED.get((capability, found.version[:2]))
            problem = "is too old" if found.version < needed else refused
        if problem is None:
            return found, ""
        version = "cuBLAS " + ".".join(map(str, found.version)) if found.version else "cuBLAS"
        seen.append(f"{version} at {path} (through {through}) {problem}")
    need = f"cuBLAS >= {needed[0]}.{needed[1]} is needed on compute capability {capability[0]}.{capability[1]}"
    return None, f"{need}; {'; '.join(seen)}. To get it: {GET_IT}"


class Context:
    """A cuBLASLt handle on one device."""

    def __init__(self, found: Found, device: int) -> None:
        assert found.library is not None
        self.found = found
        self.device = device
        self.library = found.library
        self.library.cublasLtGetStatusName.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(self.handle))

    @property
    def version(self) -> str:
        """Version of the library."""
        return ".".join(map(str, self.found.version or ()))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library and raise `CublasError` unless it succeeds."""
        status = getattr(self.library, name)(*arguments)
        if status:
            self.fail(name, status)

    def fail(self, name: str, status: int) -> None:
        """Raise the error of a failed call."""
        text = self.library.cublasLtGetStatusName(status)
        raise CublasError(f"{name} failed: {text.decode()} ({status}), with {self.found.path} {self.found.version}")


class GroupedMatmul:
    """``D[g] * unit = A[g] @ W[g].T`` for ``groups`` groups, e4m3 in, float16 or float32 out.

    Group ``g`` has ``counts[g]`` rows (an int32 array in device memory, read when the matmul runs); ``A[g]`` is
    ``(counts[g], k)``, ``W[g]`` ``(n, k)`` and ``D[g]`` ``(counts[g], n)``, all row-major and contiguous. cuBLAS sees
    column-major matrices, so the weights are its A (transposed), the activations its B.

    ``unit`` is the power of two that keeps the largest possible sum of ``k`` products of codes below float16's limit.
    Sums of codes that use their range are then normal numbers of float16, whose 11 bits flip far fewer codes in the
    quantisation that follows than bfloat16's 8 bits would.

    Parameters
    ----------
    context
        The handle.
    groups, n, k
        Sizes; ``n`` and ``k`` multiples of 16.
    counts
        Address of the group sizes.
    result
        "float16" or "float32".
    fast_accumulation
        Sums stay in the tensor cores' own format, which is too coarse for the quantisation behind: each rounding of a
        product may flip a code there. Without it, partial sums are promoted to float32.
    """

    def __init__(
        self, context: Context, groups: int, n: int, k: int, counts: int, result: str = "float16", *,
        fast_accumulation: bool = False,
    ) -> None:
        self.context = context
        self._made: list[tuple[str, ctypes.c_void_p]] = []  # to be destroyed: by which function, and what
        self.groups, self.n, self.k = groups, n, k
        self.unit = e4m3.half_unit(k)
        self._sizes = dedicated((2, groups), np.int32)
        self._sizes.set(np.array([[k] * groups, [n] * groups], np.int32))
        all_k, all_n = (row.data.ptr for row in self._sizes)
        self.description = ctypes.c_void_p()
        context.call("cublasLtMatmulDescCreate", ctypes.byref(self.description), _COMPUTE_32F, _R_32F)
        self._made.append(("cublasLtMatmulDescDestroy", self.description))
        self._set(_DESC_TRANSA, ctypes.c_int32(1))
        self._set(_DESC_FAST_ACCUM, ctypes.c_int8(fast_accumulation))
        self.weights = self._layout(_R_8F_E4M3, all_k, all_n, all_k)
        self.rows = self._layout(_R_8F_E4M3, all_k, counts, all_k)
        self.result = self._layout(_RESULTS[result], all_n, counts, all_n)

    def _set(self, attribute: int, value: Any) -> None:
        self.context.call(
            "cublasLtMatmulDescSetAttribute", self.description, attribute, ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )

    def _layout(self, dtype: int, rows: int, cols: int, pitch: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self.context.call(
            "cublasLtGroupedMatrixLayoutCreate", ctypes.byref(layout), dtype, self.groups, ctypes.c_void_p(rows),
            ctypes.c_void_p(cols), ctypes.c_void_p(pitch),
        )
        self._made.append(("cublasLtMatrixLayoutDestroy", layout))
        return layout

    def algorithms(self, average_rows: int, limit: int = 8) -> list[Algorithm]:
        """What the library's heuristic proposes, best guess first, for ``average_rows`` rows per group."""
        context = self.context
        preference = ctypes.c_void_p()
        context.call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        results, count = (Algorithm * limit)(), ctypes.c_int()
        try:
            # The averages are 8-byte integers, although the header says uint32.
            for attribute, value in (
                (_PREF_WORKSPACE, WORKSPACE_BYTES), (_PREF_AVERAGE_K, self.k), (_PREF_AVERAGE_D_ROWS, self.n),
                (_PREF_AVERAGE_D_COLS, max(average_rows, 1)),
            ):
                context.call(
                    "cublasLtMatmulPreferenceSetAttribute", preference, attribute,
                    ctypes.byref(ctypes.c_uint64(value)), ctypes.c_size_t(8),
                )
            context.call(
                "cublasLtMatmulAlgoGetHeuristic", context.handle, self.description, self.weights, self.rows,
                self.result, self.result, preference, limit, results, ctypes.byref(count),
            )
        finally:
            context.call("cublasLtMatmulPreferenceDestroy", preference)
        return [results[i] for i in range(count.value) if results[i].state == 0]

    def configuration(self, algorithm: Algorithm) -> tuple[int, int]:
        """Tile (a ``cublasLtMatmulTile_t``) and custom option of an algorithm: what tells its kernels apart."""
        values = []
        for attribute in (_CONFIG_TILE, _CONFIG_CUSTOM_OPTION):
            value, written = ctypes.c_uint32(), ctypes.c_size_t()
            self.context.call(
                "cublasLtMatmulAlgoConfigGetAttribute", ctypes.byref(algorithm), attribute, ctypes.byref(value),
                ctypes.c_size_t(4), ctypes.byref(written),
            )
            values.append(value.value)
        return values[0], values[1]

    def launch(
        self, algorithm: Algorithm, weights: int, rows: int, result: int, workspace: int
    ) -> Step:
        """The prepared call: takes the stream. The operands are addresses of tables of ``groups`` addresses."""
        function = self.context.library.cublasLtMatmul
        stream = ctypes.c_void_p()
        alpha, zero = ctypes.c_float(1.0 / self.unit), ctypes.c_float(0.0)
        arguments = (
            self.context.handle, self.description, ctypes.byref(alpha), ctypes.c_void_p(weights), self.weights,
            ctypes.c_void_p(rows), self.rows, ctypes.byref(zero), ctypes.c_void_p(result), self.result,
            ctypes.c_void_p(result), self.result, ctypes.byref(algorithm), ctypes.c_void_p(workspace),
            ctypes.c_size_t(algorithm.workspace_bytes), stream,
        )

        def call(on: int) -> None:
            stream.value = on
            status = function(*arguments)
            if status:
                self.context.fail("cublasLtMatmul", status)

        return call

    def __del__(self) -> None:
        for function, handle in self._made:
            getattr(self.context.library, function)(handle)
