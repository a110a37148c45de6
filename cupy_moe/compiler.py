# SPDX-License-Identifier: Apache-2.0
"""The one place that turns the CUDA sources into kernels.

A variant of a kernel is its source with constants in front: ``common.cuh``, then one line per constant, then the file
with its own headers.
CuPy compiles it with NVRTC for the current device and caches the result on disk under a hash of the text.
"""

from __future__ import annotations

import ctypes
import re
import threading
from functools import cache
from typing import Any

import kernels_cu
from cupy_moe import driver
from cupy_moe.driver import Kernel

OPTIONS = ("--std=c++17",)
TARGETS = {"gemm_sm90.cu": "sm_90a"}
"""Files that use instructions of one architecture alone, and that architecture."""
HEADERS = {
    "gemm_sm90.cu": ("hopper.cuh", "packed.cuh", "schedule.cuh", "ring.cuh", "activations.cuh", "ends.cuh"),
    "gemm_mma.cu": ("packed.cuh", "schedule.cuh", "activations.cuh", "ends.cuh"),
    "activation.cu": ("activations.cuh",), "requantize.cu": ("packed.cuh",), "quantize.cu": ("quantize.cuh",),
    "route.cu": ("hopper.cuh", "routing.cuh"), "route_quantize.cu": ("routing.cuh", "quantize.cuh"),
}
"""What a file needs beside ``common.cuh``; it may use the constants."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
"""What the kernels are checked to compile for."""

CUDA_TYPES = {"float16": "Half", "bfloat16": "Bfloat16", "float32": "float", "float8_e4m3fn": "Fp8", "uint8": "Fp8"}
"""Element types by dtype name; uint8 holds the bits of e4m3."""

_ATTRIBUTES = r"(?:__\w+__\([\w, ]+\) |IN_CLUSTER )*"
_SCALARS = {"int": ctypes.c_int32, "long long": ctypes.c_int64, "float": ctypes.c_float}


def variant_source(file: str, constants: dict[str, Any]) -> str:
    """The text to compile for ``file`` with ``constants``: types by CamelCase name, values by UPPER_CASE name."""
    lines = []
    for name, value in constants.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        lines.append(f"constexpr auto {name} = {text};" if name.isupper() else f"using {name} = {text};")
    if file in TARGETS:
        lines += [kernels_cu.wgmma(columns) for columns in range(8, constants["ROWS"] + 1, 8)]
    return "\n".join([kernels_cu.source("common.cuh"), *lines, _with_headers(file)])


def _with_headers(file: str) -> str:
    return "\n".join(kernels_cu.source(name) for name in (*HEADERS.get(file, ()), file))


@cache
def signature(file: str, name: str) -> dict[str, Any]:
    """Parameter names and ctypes types of the kernel ``name`` in ``file``, in order, read from its declaration."""
    text = re.sub(r"//[^\n]*", "", _with_headers(file))
    found = re.search(rf'extern "C" __global__ void {_ATTRIBUTES}{name}\((.*?)\)\s*{{', text, re.S)
    if not found:
        raise LookupError(f"{file} declares no kernel {name!r}")
    return dict(field for declaration in found[1].split(",") for field in _fields(declaration, text))


def _fields(declaration: str, text: str) -> list[tuple[str, Any]]:
    """Names and types of ``type a, b[4]``; a struct is looked up in ``text``."""
    bare = re.sub(r"\b(const|__restrict__|__grid_constant__)\b", " ", declaration).replace("*", " * ").strip()
    first, *others = bare.split(",")
    kind, _, name = first.strip().rpartition(" ")
    kind = " ".join(kind.split())
    if "*" in kind:
        base: Any = ctypes.c_void_p
    else:
        base = _SCALARS.get(kind) or _structure(kind, text)
    fields = []
    for declarator in (name, *others):
        label, _, size = declarator.strip().rstrip("]").partition("[")
        fields.append((label, base * int(size) if size else base))
    return fields


def _structure(name: str, text: str) -> type:
    """The ctypes mirror of ``struct name`` in ``text``."""
    found = re.search(rf"struct (?:alignas\(\d+\) )?{name} {{(.*?)}};", text, re.S)
    if not found:
        raise LookupError(f"no struct {name!r} in the source")
    declarations = (declaration for declaration in found[1].split(";") if declaration.strip())
    fields = [field for declaration in declarations for field in _fields(declaration, text)]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@cache
def has_clusters(device: int) -> bool:
    """Whether the device knows clusters and programmatic dependent launch: compute capability 9.0 and later."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 90


@cache
def multiprocessors(device: int) -> int:
    """How many the device has."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@cache
def _module(file: str, constants: tuple[tuple[str, Any], ...], device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        # CuPy names the device's architecture too; the more specific one wins.
        target = (f"-arch={TARGETS[file]}",) if file in TARGETS else ()
        module = cupy.RawModule(code=variant_source(file, dict(constants)), options=OPTIONS + target)
        with driver.relaxed_capture():
            module.compile()
    return module


_making = threading.Lock()  # one `Kernel` of a function, which knows what its limits are


@cache
def _kernel(file: str, name: str, constants: tuple[tuple[str, Any], ...], device: int) -> Kernel:
    import cupy

    function = _module(file, constants, device).get_function(name)
    with cupy.cuda.Device(device):
        return Kernel(function, signature(file, name), can_overlap=has_clusters(device))


def kernel(file: str, name: str, device: int, **constants: Any) -> Kernel:
    """The kernel ``name`` of ``file`` with ``constants``, compiled and loaded on ``device`` at its first use."""
    variant = tuple(constants.items())
    _module(file, variant, device)  # threads may compile side by side
    with _making:
        return _kernel(file, name, variant, device)
