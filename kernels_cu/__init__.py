# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources of cupy_moe, handed out as strings."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """Text of ``name`` (for example ``"route.cu"``), a file of this package.

    Raises
    ------
    FileNotFoundError
        If there is no such file; the message lists those there are.
    """
    if name not in names():
        raise FileNotFoundError(f"kernels_cu has no {name!r}; it has {', '.join(names())}")
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


@cache
def names() -> tuple[str, ...]:
    """Names of all source files, sorted."""
    return tuple(sorted(f.name for f in files(__name__).iterdir() if f.name.endswith((".cu", ".cuh"))))


def wgmma(columns: int) -> str:
    """The function ``wgmma`` for ``columns`` columns: 64 x ``columns`` x 32, e4m3 to float32.

    ``sum`` is added to where ``add`` is not 0 and replaced where it is. An instruction names each of its accumulators,
    so its text depends on their number; the length of ``sum`` tells the functions apart.
    """
    count = columns // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma(float (&sum)[{count}], u64 a, u64 b, int add) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "
        "wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 "
        "{{{accumulators}}}, %{count}, %{count + 1}, p, 1, 1; }}"
        : {operands} : "l"(a), "l"(b), "r"(add));
}}
"""
