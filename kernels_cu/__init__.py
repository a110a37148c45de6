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
