# SPDX-License-Identifier: Apache-2.0
"""What each launch of the package asks for: files, constants, threads and arguments, recorded without a GPU."""

import itertools
import re
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import kernels_cu
from cupy_moe import compiler, dispatch, launches, mma, sm90, tiles
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.launches import Bias, Maps, Matrix, RowScale, Tables, WeightScale

FLOATS = ("float16", "bfloat16", "float32")
ALIGNED = tuple(itertools.product((True, False), repeat=2))
ADDRESS = 1 << 20
MAPS = Maps(*range(ADDRESS, ADDRESS + 5))
# From one vector per thread up to the most, with few rows and with many.
ROWS_TO_SCAN = (
    (1, 1024), (5000, 1024), (1, 8192), (1, 16384), (1, 32768), (5000, 24576), (5000, 28672), (5000, 131072),
)


class Recorded(NamedTuple):
    """What one launch asks for."""

    file: str
    name: str
    constants: tuple[tuple[str, Any], ...]
    threads: int
    arguments: dict[str, Any]


class FakeKernel:
    """A kernel that was never compiled; its parameters are those in the source."""

    def __init__(self, file, name, device, **constants):
        self.file, self.name, self.constants = file, name, tuple(constants.items())
        self.parameters = compiler.signature(file, name)

    def allow_shared_bytes(self, nbytes):
        # Beside what the kernel has without asking: struct Shared, or block_max.
        limit = (227 << 10) - 192 if self.file == "gemm_sm90.cu" else (99 << 10) - 128
        assert nbytes <= limit, "more than a block can have on some architecture"


def record(calls):
    """Run the functions, which prepare launches, and return what they ask for."""
    made = []

    def launch(kernel, grid, block, *, shared_bytes=0, **arguments):
        kernel.allow_shared_bytes(shared_bytes)
        made.append(Recorded(kernel.file, kernel.name, kernel.constants, block, arguments))
        return mock.Mock()

    patches = ((compiler, "kernel", FakeKernel), (launches, "Launch", launch), (dispatch, "Launch", launch),
               (sm90, "Launch", launch), (mma, "Launch", launch), (sm90, "tensor_map", lambda *_: (0,) * 16),
               (compiler, "multiprocessors", lambda _: 132), (compiler, "has_clusters", lambda _: True))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        for call in calls:
            call()
    return made


def enum(name):
    """The values of an enum of ``common.cuh``."""
    return tuple(re.search(rf"enum {name} {{ (.*?) }};", kernels_cu.source("common.cuh"))[1].split(", "))


def matrix(dtype, cols, aligned):
    return Matrix(ADDRESS, cols if aligned else cols + 1, dtype)


def pairs(ids, topk=2):
    return dispatch.Pairs(ADDRESS, ids, topk, 64, MAPS)


def quantize(
    dtype, mode, aligned, *, rows=9, cols=4096, weighted=False, per_expert=False, fresh=False, routing=None
):
    scale = RowScale(ADDRESS, expert_stride=int(per_expert)) if mode == "STATIC" else RowScale()
    x, out = matrix(dtype, cols, aligned[0]), matrix("uint8", cols, aligned[1])
    where = {"routing": routing} if routing else {"topk": 2, "src2dst": ADDRESS, "row_experts": ADDRESS}
    return lambda: dispatch.quantize(
        0, mode, x, rows, cols, out, cols, topk_weights=ADDRESS, weighted=weighted, scale=scale, fresh=fresh, **where
    )


def activate(act, dtype, mode, aligned, bias, per_channel, *, rows=9, cols=1024):
    x, out = matrix(dtype, 2 * cols, aligned[0]), matrix("uint8", cols, aligned[1])
    w_scale = WeightScale(ADDRESS, 2 * cols, cols, per_channel=per_channel)
    return lambda: launches.activation_quantize(
        0, mode, act, ACTIVATIONS[act].gated, x, rows, cols, cols, out, cols, w_scale=w_scale,
        bias=Bias(ADDRESS * (bias != "None"), bias), row_experts=ADDRESS, scale=RowScale(value=0.5),
    )


def grouped_gemm(
    kernel, tile, kind, out, act="silu", bias="None", per_channel=False, per_row=False, invariant=False, k=1024,
    **options,
):
    """One tile and end of a kernel of our own; the maximum is wanted where rows have no scales."""
    end = tiles.End(
        kind, act, bias=Bias(ADDRESS, bias), x_scale=RowScale(ADDRESS, row_stride=int(per_row)),
        w_scale=WeightScale(ADDRESS, 2, 1, per_channel=per_channel), partials=0 if per_row else ADDRESS,
    )
    x, y = Matrix(ADDRESS, k, "uint8"), Matrix(ADDRESS, 512, out)
    return lambda: kernel.grouped_gemm(
        0, kernel.Weights(ADDRESS, 8, 1024, k, paired=ACTIVATIONS[act].gated, batch_invariant=invariant), x, 99,
        tiles.Groups(ADDRESS, ADDRESS), y, end, tile, **options,
    )


def combine(dtype, out_dtype, topk, aligned, bias, per_channel, tokens):
    x, out = matrix(dtype, 4096, aligned[0]), matrix(out_dtype, 4096, aligned[1])
    w_scale = WeightScale(ADDRESS, 4096, per_channel=per_channel)
    return lambda: launches.combine(
        0, x, 9, tokens, topk, 4096, out, x_scale=RowScale(ADDRESS, 1), w_scale=w_scale,
        bias=Bias(ADDRESS * (bias != "None"), bias), src2dst=ADDRESS, row_experts=ADDRESS, topk_weights=ADDRESS,
    )


def calls():
    """Calls of every function of `launches` and `dispatch`: each value of each constant, in changing company."""
    biases = ("None", *FLOATS)
    made = [
        quantize(dtype, mode, ALIGNED[i % 4], weighted=bool(i % 2))
        for i, (mode, dtype) in enumerate(itertools.product(enum("Mode"), FLOATS))
    ]
    made += [quantize(dtype, "TENSOR", ALIGNED[i], rows=2) for i, dtype in enumerate(FLOATS)]
    made += [quantize("float16", "STATIC", ALIGNED[0], weighted=w, per_expert=True) for w in (False, True)]
    made += [quantize("uint8", "STATIC", aligned, weighted=aligned[0] is aligned[1]) for aligned in ALIGNED]
    made += [quantize("float32", "TOKEN", ALIGNED[0], rows=r, cols=c, weighted=True) for r, c in ROWS_TO_SCAN]
    made += [quantize("float32", mode, ALIGNED[0], rows=rows, fresh=True)
             for mode, rows in itertools.product(("TENSOR", "TOKEN"), (9, 5000))]
    made += [quantize("float16", "TOKEN", ALIGNED[0], rows=rows, cols=28672, fresh=True) for rows in (9, 5000)]
    for i, (mode, dtype) in enumerate(itertools.product(("STATIC", "TOKEN"), FLOATS)):
        routing = pairs(("int32", "int64")[i % 2])
        made.append(quantize(dtype, mode, ALIGNED[i % 4], weighted=i % 3 == 0, per_expert=i % 2 == 1, routing=routing))
    made += [quantize(dtype, "TENSOR", ALIGNED[i], rows=rows, routing=pairs("int32"))
             for i, dtype in enumerate(FLOATS) for rows in (2, 9)]
    for i, (mode, dtype, rows) in enumerate(itertools.product(enum("Mode"), FLOATS, (300, 2000))):
        routing = pairs(("int64", "int32")[i % 2])
        made.append(quantize(dtype, mode, ALIGNED[i % 4], rows=rows, cols=(1024, 4096)[i % 3 > 0], routing=routing))
    made += [quantize("uint8", "STATIC", aligned, routing=pairs("int64")) for aligned in ALIGNED]
    made += [quantize("float32", "TOKEN", ALIGNED[0], rows=1, cols=cols, routing=pairs("int32"))
             for _, cols in ROWS_TO_SCAN[:7]]
    packed, codes = Matrix(ADDRESS, 1024, launches.PACKED), matrix("uint8", 1024, True)
    made += [
        lambda m=mode: launches.requantize(0, m, packed, 999, ADDRESS, 8, codes, partials=ADDRESS, scale_out=ADDRESS)
        for mode in ("TENSOR", "TOKEN")
    ]
    made += [
        activate(act, FLOATS[(i + i // 3) % 3], mode, ALIGNED[i // 2 % 4], biases[i % 4], bool(i // 3 % 2))
        for i, (act, mode) in enumerate(itertools.product(ACTIVATIONS, enum("Mode")))
    ]
    made += [
        activate("gelu_tanh", "float16", "TOKEN", ALIGNED[3 * (i % 2)], "float32", True, rows=r, cols=c)
        for i, (r, c) in enumerate(ROWS_TO_SCAN)
    ]
    made += [activate("silu", "float16", "TOKEN", ALIGNED[0], "None", True, rows=r, cols=c) for r, c in ROWS_TO_SCAN]
    made += [
        combine(x, y, (1, 2, 6, 8)[i % 4], ALIGNED[i % 4], biases[i // 2 % 4], bool(i % 2), (9, 2000)[i // 3 % 2])
        for i, (x, y) in enumerate(itertools.product(FLOATS, FLOATS))
    ]
    made.append(combine("float16", "float16", 2, ALIGNED[0], "None", False, 2000))
    made += [lambda n=n: launches.shuffle_rows(0, ADDRESS, 48 * n, 9, ADDRESS, 18, 32 * n + n, ADDRESS)
             for n in (1, 2, 4, 8, 16)]
    made += [lambda d=d, e=e: launches.topk_softmax(0, matrix(d, e, True), 9, e, 2, True, ADDRESS, ADDRESS)
             for d, e in zip((*FLOATS, "float16"), (8, 64, 160, 1024), strict=True)]
    for tile in sm90.TILES:
        made += [grouped_gemm(sm90, tile, "PRODUCT", out, invariant=invariant)
                 for out, invariant in itertools.product(("float16", "float32"), (False, True))]
        in_step = {"k": sm90.IN_STEP_BYTES // 8}  # there are more than 8 rows per expert
        made += [grouped_gemm(sm90, tile, "PRODUCT", "float16", **in_step)]
        if tile.window == 0:
            continue
        for per in ({}, {"per_channel": True, "per_row": True}) if tile.cluster > 1 else ():
            made += [grouped_gemm(sm90, tile, "PACKED", launches.PACKED, **per, **in_step),
                     grouped_gemm(sm90, tile, "CODES", "uint8", bias="float16", **per, **in_step),
                     grouped_gemm(sm90, tile, "ACTIVATED", "float32", bias="float32", **per, **in_step)]
        made += [grouped_gemm(sm90, tile, "CODES", "uint8", bias=bias, per_channel=True, per_row=True)
                 for bias in biases]
        made += [grouped_gemm(sm90, tile, "ACTIVATED", "float32", per_channel=True, per_row=True)]
        made += [grouped_gemm(sm90, tile, "PACKED", launches.PACKED, act, per_channel=per_row, per_row=per_row)
                 for per_row, act in ((False, "silu"), (True, "silu"), (True, "gelu_no_mul"))]
        made += [
            grouped_gemm(sm90, tile, "ACTIVATED", "float32", act, biases[i % 4], i // 4 % 2 > 0, i % 2 > 0, i % 3 == 2)
            for i, act in enumerate(ACTIVATIONS)
        ]
    for (t, tile), fp8 in itertools.product(enumerate(mma.TILES), (True, False)):
        made += [grouped_gemm(mma, tile, "PRODUCT", out, fp8=fp8) for out in ("float16", "float32")]
        made += [grouped_gemm(mma, tile, "CODES", "uint8", bias=biases[t], per_channel=True, per_row=True, fp8=fp8)]
        made += [
            grouped_gemm(mma, tile, "ACTIVATED", "float32", act, biases[i % 4], i // 4 % 2 > 0, i % 2 > 0, fp8=fp8)
            for i, act in enumerate(ACTIVATIONS)
        ]
    for ids, tokens in itertools.product(("int32", "int64"), (9, 2000, 40000)):
        made.append(lambda i=ids, t=tokens: dispatch.route(0, t, pairs(i)))
        made.append(lambda i=ids, t=tokens: dispatch.route_padded(0, ADDRESS, i, 64, t, MAPS, Tables()))
    return made


RECORDED = record(calls())
VARIANTS: dict[tuple[str, tuple[tuple[str, Any], ...]], dict[str, int]] = {}
"""(file, constants) to the most threads of each kernel in it."""
for _launch in RECORDED:
    _threads = VARIANTS.setdefault((_launch.file, _launch.constants), {})
    _threads[_launch.name] = max(_threads.get(_launch.name, 0), _launch.threads)
