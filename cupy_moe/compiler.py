# SPDX-License-Identifier: Apache-2.0
"""The one place that turns the CUDA sources into kernels.

A variant of a kernel is its source with constants in front: ``common.cuh``, then one line per constant, then the file.
CuPy compiles it with NVRTC for the current device and caches the result on disk under a hash of the text.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

import kernels_cu
from cupy_moe.driver import Kernel, Tables

OPTIONS = ("--std=c++17",)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
"""What the kernels are checked to compile for."""

CUDA_TYPES = {"float16": "Half", "bfloat16": "Bfloat16", "float32": "float", "float8_e4m3fn": "Fp8", "uint8": "Fp8"}
"""Element types by dtype name; uint8 holds the bits of e4m3."""

_SCALARS = {"int": ctypes.c_int32, "long long": ctypes.c_int64, "float": ctypes.c_float, "Tables": Tables}


def variant_source(file: str, constants: dict[str, Any]) -> str:
    """The text to compile for ``file`` with ``constants``: types by CamelCase name, values by UPPER_CASE name."""
    lines = []
    for name, value in constants.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        lines.append(f"constexpr auto {name} = {text};" if name.isupper() else f"using {name} = {text};")
    return "\n".join([kernels_cu.source("common.cuh"), *lines, kernels_cu.source(file)])


@cache
def signature(file: str, name: str) -> dict[str, type]:
    """Parameter names and ctypes types of the kernel ``name`` in ``file``, in order, read from its declaration."""
    text = re.sub(r"//[^\n]*", "", kernels_cu.source(file))
    found = re.search(rf'extern "C" __global__ void\s+(?:__launch_bounds__\(\w+\)\s+)?{name}\((.*?)\)\s*{{', text, re.S)
    if not found:
        raise LookupError(f"{file} declares no kernel {name!r}")
    parameters: dict[str, type] = {}
    for declaration in found[1].split(","):
        words = re.sub(r"\b(const|__restrict__)\b", "", declaration).replace("*", " * ").split()
        kind, parameter = " ".join(words[:-1]), words[-1]
        parameters[parameter] = ctypes.c_void_p if "*" in kind else _SCALARS[kind]
    return parameters


@cache
def _module(file: str, constants: tuple[tuple[str, Any], ...], device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=variant_source(file, dict(constants)), options=OPTIONS)
        module.compile()
    return module


@cache
def _kernel(file: str, name: str, constants: tuple[tuple[str, Any], ...], device: int) -> Kernel:
    import cupy

    function = _module(file, constants, device).get_function(name)
    overlaps = int(cupy.cuda.Device(device).compute_capability) >= 90
    with cupy.cuda.Device(device):
        return Kernel(function, signature(file, name), overlaps=overlaps)


def kernel(file: str, name: str, device: int, **constants: Any) -> Kernel:
    """The kernel ``name`` of ``file`` with ``constants``, compiled and loaded on ``device`` at its first use."""
    return _kernel(file, name, tuple(constants.items()), device)
