# SPDX-License-Identifier: Apache-2.0
"""Every kernel, in the variants that `cupy_moe.launches` asks for, through NVRTC for every architecture."""

import ctypes
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from typing import Any

import pytest
from kernel_variants import RECORDED, VARIANTS, FakeKernel, enum, pairs, quantize, record

import kernels_cu
from cupy_moe import compiler, dispatch, driver, grids, mma, sm90
from cupy_moe.activations import ACTIVATIONS

TYPES = {"Half", "Bfloat16", "float"}
VALUES = {
    "quantize.cu": {
        "In": TYPES | {"Fp8"}, "MODE": set(enum("Mode")), "VECS": {1, 2, 4, 6, 7, 8}, "IN_ALIGNED": {True, False},
        "OUT_ALIGNED": {True, False}, "WEIGHTED": {True, False}, "PER_EXPERT": {True, False}, "ALONE": {True, False},
        "FRESH": {True, False}, "ROW_THREADS": {grids.MAX_ROW_THREADS, grids.MORE_ROW_THREADS},
    },
    "route_quantize.cu": {
        "Id": {"int", "long long"}, "In": TYPES | {"Fp8"}, "MODE": set(enum("Mode")), "VECS": {1, 2, 4, 6, 7, 8},
        "IN_ALIGNED": {True, False}, "OUT_ALIGNED": {True, False}, "WEIGHTED": {True, False},
        "PER_EXPERT": {True, False}, "ALONE": {True, False}, "IDS": {1, dispatch.IDS_IN_FLIGHT},
    },
    "requantize.cu": {"MODE": {"TENSOR", "TOKEN"}},
    "activation.cu": {
        "In": TYPES, "Bias": TYPES | {"None"}, "MODE": set(enum("Mode")), "ACT": set(enum("Act")),
        "VECS": {1, 2, 4, 6, 7, 8}, "IN_SHARED": {0, 2, 4, 5, grids.MOST_IN_SHARED}, "IN_ALIGNED": {True, False},
        "OUT_ALIGNED": {True, False}, "PER_CHANNEL": {True, False},
        "ROW_THREADS": {grids.STRETCH_THREADS, grids.MAX_ROW_THREADS, grids.MORE_ROW_THREADS},
    },
    "combine.cu": {
        "In": TYPES, "Out": TYPES, "Bias": TYPES | {"None"}, "TOPK": {1, 2, 6, 8}, "IN_ALIGNED": {True, False},
        "OUT_ALIGNED": {True, False}, "PER_CHANNEL": {True, False}, "MOST": {2, 4, 8}, "TOKENS": {1, 4, 8},
    },
    "gemm_sm90.cu": {
        "ROWS": {tile.rows for tile in sm90.TILES}, "CHANNELS": {64, 128},
        "STAGES": {tile.stages for tile in sm90.TILES}, "EARLY": {sm90.EARLY}, "CLUSTER": {1, 2}, "WINDOW": {0, 1, 2},
        "BOX": {tile.box for tile in sm90.TILES},
        "END": set(enum("End")), "Out": {"Half", "float"}, "Bias": TYPES | {"None"}, "ACT": set(enum("Act")),
        "ROW_SCALES": {True, False}, "PER_CHANNEL": {True, False}, "MEASURED": {True, False}, "IN_STEP": {True, False},
    },
    "gemm_mma.cu": {
        "ROWS": {tile.rows for tile in mma.TILES}, "STAGES": {tile.stages for tile in mma.TILES}, "FP8": {True, False},
        "END": {"PRODUCT", "ACTIVATED", "CODES"}, "Out": {"Half", "float"}, "Bias": TYPES | {"None"},
        "ACT": set(enum("Act")), "ROW_SCALES": {True, False}, "PER_CHANNEL": {True, False}, "MEASURED": {True, False},
    },
    "shuffle.cu": {"Word": {"u8", "u16", "u32", "u64", "uint4"}},
    "topk_softmax.cu": {"In": TYPES, "VALUES": {1, 2, 5, 32}},
    "route.cu": {"Id": {"int", "long long"}, "CLUSTER": {1, dispatch.ROUTE_CLUSTER}},
}


@pytest.mark.parametrize("file", VALUES)
def test_the_variants_have_every_value_of_every_constant(file):
    seen: dict[str, set[Any]] = {}
    for other, constants in VARIANTS:
        for name, value in constants:
            if other == file:
                seen.setdefault(name, set()).add(value)
    assert seen.keys() == VALUES[file].keys()
    missing = {name: values - seen[name] for name, values in VALUES[file].items() if values - seen[name]}
    assert not missing


def test_every_kernel_is_launched():
    declared = {
        (file, name)
        for file in kernels_cu.names()
        for name in re.findall(rf"__global__ void {compiler._ATTRIBUTES}(\w+)\(", kernels_cu.source(file))
    }
    assert declared == {(launch.file, launch.name) for launch in RECORDED}
    assert {act.upper() for act in ACTIVATIONS} == set(enum("Act"))


@pytest.mark.parametrize("name", sorted({(launch.file, launch.name) for launch in RECORDED}), ids=" ".join)
def test_arguments_are_the_kernels_parameters(name):
    parameters = compiler.signature(*name)
    for launch in RECORDED:
        if (launch.file, launch.name) == name:
            assert launch.arguments.keys() == parameters.keys()
            for argument, kind in parameters.items():
                value = launch.arguments[argument]
                if isinstance(value, dict):
                    assert value.keys() == {field for field, *_ in kind._fields_}
                else:
                    assert kind(value).value == (value or None if kind is ctypes.c_void_p else value), argument


def test_wrong_arguments_of_a_launch():
    kernel = FakeKernel("shuffle.cu", "shuffle_rows", 0)
    with pytest.raises(TypeError, match=r"^shuffle_rows takes .*'words'.*; missing or unknown: \['word'\]"):
        driver.Launch(kernel, (1, 1), 32, **dict.fromkeys(kernel.parameters, 1), word=1)


def test_unknown_kernel():
    with pytest.raises(LookupError, match=r"^shuffle\.cu declares no kernel 'shuffle'"):
        compiler.signature("shuffle.cu", "shuffle")


def compile_for(arch, file, constants):
    """Compile as CuPy does; return the log, with what ptxas has to tell."""
    from cuda.core import Program, ProgramOptions

    assert compiler.OPTIONS == ("--std=c++17",)
    options = ProgramOptions(std="c++17", arch=arch, ftz=True, ptxas_options=["-v"])
    log = StringIO()
    Program(compiler.variant_source(file, dict(constants)), "c++", options).compile("cubin", logs=log)
    return log.getvalue().replace("\0", "")


PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(.*?(?P<constants>\d+) bytes cmem\[0\])?",
    re.S,
)
REGISTERS = 65536
"""Of a block at most, on every architecture."""
MMA_ON = {True: ("sm_89", "sm_90", "sm_100", "sm_120"), False: ("sm_80", "sm_86", "sm_90")}
PARAMETERS_AT = 352
"""Where sm_80's constant bank 0 has the parameters of the kernel."""


def size_of_parameters(file, name):
    fields = list(compiler.signature(file, name).items())
    mirror = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
    last, kind = fields[-1]
    return getattr(mirror, last).offset + ctypes.sizeof(kind)


def architectures_of(file, constants):
    """Those that a variant is for."""
    if file in compiler.TARGETS:
        return [compiler.TARGETS[file]]
    if file == "gemm_mma.cu":  # the tests force float16 on 9.0
        return [arch for arch in compiler.ARCHITECTURES if arch in MMA_ON[constants["FP8"]]]
    if constants.get("CLUSTER", 1) > 1:
        return [arch for arch in compiler.ARCHITECTURES if int(re.sub(r"\D", "", arch)) >= 90]
    return compiler.ARCHITECTURES


class Compilers:
    """Processes that compile a few variants ahead of the tests; NVRTC takes one program at a time in each.

    Most variants are for one architecture: the other processes would have nothing to do until the next test.
    """

    def __init__(self, pool, processes, variants):
        self._pool, self._ahead, self._variants, self._pending = pool, 2 * processes, variants, {}

    def logs(self, variant):
        """Of a variant, one for each of its architectures."""
        at = self._variants.index(variant)
        for file, constants in self._variants[at : at + self._ahead]:
            if (file, constants) not in self._pending:
                self._pending[file, constants] = [
                    self._pool.submit(compile_for, arch, file, constants)
                    for arch in architectures_of(file, dict(constants))
                ]
        return [future.result(timeout=300) for future in self._pending[variant]]


@pytest.fixture(scope="module")
def compilers(request):
    pytest.importorskip("cuda.core", reason="NVRTC is called through cuda.core")
    processes = min(os.cpu_count() or 1, len(compiler.ARCHITECTURES))
    of_tests = (item for item in request.session.items if getattr(item, "originalname", None) == "test_variant")
    chosen = [(item.callspec.params["file"], item.callspec.params["constants"]) for item in of_tests]
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield Compilers(pool, processes, chosen)
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    ("file", "constants"), VARIANTS, ids=[f"{file} {' '.join(str(v) for _, v in c)}" for file, c in VARIANTS]
)
def test_variant(compilers, file, constants):
    """No warning, no spills, no products one by one, small enough, and parameters as wide as the launch has them."""
    for arch, log in zip(architectures_of(file, dict(constants)), compilers.logs((file, constants)), strict=True):
        other = [line for line in log.splitlines() if not re.match(r"ptxas (info +:| +\.)|\s*$", line)]
        assert not other, f"{arch}: {log}"
        assert "serialized" not in log, f"{arch}: the products of a tile wait for one another: {log}"
        kernels = {found["name"]: found for found in PROPERTIES.finditer(log)}
        for name, threads in VARIANTS[file, constants].items():
            found = kernels[name]
            # Neither on Hopper nor in a GEMM; elsewhere ptxas may give up a value for occupancy. Rows wider than 28672
            # columns may spill, and those wider than 16384 that are encoded for each slot.
            allowed = 0 if arch == "sm_90a" or file.startswith("gemm_") else 8
            if dict(constants).get("VECS", 1) <= (4 if dict(constants).get("WEIGHTED") else 7):
                assert max(int(found[kind]) for kind in ("stack", "stores", "loads")) <= allowed, f"{arch}: {log}"
            per_thread = -(-int(found["registers"]) // 8) * 8
            assert per_thread * threads <= REGISTERS, f"{arch}: {threads} threads cannot have {per_thread} registers"
            if arch == "sm_80":
                assert int(found["constants"]) - PARAMETERS_AT == size_of_parameters(file, name)


@pytest.mark.parametrize("tokens", [300, 3000])
def test_the_first_kernel_of_a_call_waits(tokens):
    """For what makes the hidden states; behind routing, the maximum is looked for without waiting for that."""
    made = record([quantize("float16", "TENSOR", (True, True), rows=tokens, routing=pairs("int32"))])
    of = {launch.name: launch.arguments for launch in made}
    assert of["amax_tokens"]["in_front"] == ("route_quantize" in of) == (tokens == 300)
