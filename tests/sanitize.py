# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, at small odd sizes, against the reference on the host: a program for compute-sanitizer.

    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py
    done

The grouped GEMMs run with every fast backend that is available, the layer too; the program says which those are.
Exits with 1 if a result is wrong. ``--no-gemm`` leaves out what needs a fast backend, ``--backend NAME`` all other fast
ones: racecheck takes minutes for all of them. Each array is an allocation of
its own, so that memcheck sees where it ends.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from unittest import mock

import cupy
import ml_dtypes
import numpy as np

import cupy_moe
from cupy_moe import Workspace, backend, compiler, dispatch, e4m3, grids, reference

EXPERTS, TOPK = 5, 3
CHECKS: list[tuple[str, float]] = []


def fill_what_the_library_writes():
    """Fill new memory with NaN: initcheck does not see the bulk stores of cuBLASLt's kernels.

    What our kernels read without having written it is then found by the comparison with the reference.
    """
    reserve, empty = Workspace.reserve, cupy.empty

    def filled_reserve(self, nbytes, on):
        old = self.generation
        address = reserve(self, nbytes, on)
        if self.generation != old:
            cupy.cuda.runtime.memset(address, 0xFF, self.nbytes)
        return address

    def filled_empty(*args, **options):
        array = empty(*args, **options)
        if array.nbytes:
            cupy.cuda.runtime.memset(array.data.ptr, 0xFF, array.nbytes)
        return array

    Workspace.reserve, cupy.empty = filled_reserve, filled_empty


def device(x):
    if not isinstance(x, np.ndarray):
        return x
    return cupy.asarray(x.view(np.uint8) if x.dtype == e4m3.DTYPE else x)


def values(x):
    """An array as float32 on the host; codes stand for their values."""
    x = x.get() if isinstance(x, cupy.ndarray) else x
    return e4m3.decode(x) if e4m3.is_fp8(x) else x.astype(np.float32)


def check(label, got, want, limit):
    got, want = values(got), values(want)
    assert got.shape == want.shape, f"{label}: {got.shape} instead of {want.shape}"
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / (norm or 1.0)
    CHECKS.append((label, error))
    if not error <= limit:  # also NaN
        sys.exit(f"{label}: relative error {error:.2e}, at most {limit:.0e} is right")


def compare(label, name, *args, limit=0.0, out_dtype=None, on_gpu=None, **options):
    """One step on the GPU, with the options ``on_gpu`` too, and on the host; returns the host's result, as a tuple."""
    given = {**(on_gpu or {}), **({} if out_dtype is None else {"out_dtype": out_dtype})}
    given.update((key, device(value)) for key, value in options.items())
    got = getattr(cupy_moe, name)(*map(device, args), **given)
    wanted = {"out_dtype": "float32"} if out_dtype else {}
    want = getattr(reference, name)(*args, **options, **wanted)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        check(f"{name} {label} [{i}]", a, b, limit)
    return want


def draw(rng, shape, dtype=np.float32):
    return rng.normal(0, 1, shape).astype(dtype)


def codes(rng, shape):
    return e4m3.encode(draw(rng, shape) * 100)


def route_and_shuffle(rng):
    routing = None
    for tokens, id_type in ((3000, np.int64), (600, np.int64), (7, np.int32)):  # two launches, a cluster, a block
        ids = rng.integers(-1, EXPERTS + 1, (tokens, TOPK)).astype(id_type)
        compare(f"{tokens} tokens, mapped", "route", ids, 4, expert_map=np.array([2, -1, 0, 3, 1], np.int32))
        routing = reference.Routing(*compare(f"{tokens} tokens", "route", ids, EXPERTS))
    for dtype, cols in ((np.uint8, 13), (np.float16, 9), (np.float32, 7), (np.uint8, 24), (np.float32, 12)):
        x = codes(rng, (7, cols)) if dtype is np.uint8 else draw(rng, (7, cols), dtype)
        compare(f"{x.dtype} {cols}", "shuffle_rows", x, routing.dst2src_map)
    compare("", "gather_scales", draw(rng, (7, 1)), routing.dst2src_map)
    return routing


def quantize(rng):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        for cols in (37, 48):
            x = draw(rng, (11, cols), dtype)
            compare(f"{x.dtype} {cols} tensor", "quantize_fp8", x)
            with mock.patch.object(dispatch, "ALONE_ELEMENTS", 0):
                compare(f"{x.dtype} {cols} tensor, many elements", "quantize_fp8", x)
            compare(f"{x.dtype} {cols} token", "quantize_fp8", x, per_token=True)
            compare(f"{x.dtype} {cols} static", "quantize_fp8", x, np.float32(0.01))
    compare("wide token", "quantize_fp8", draw(rng, (2, 9001)), per_token=True)


def activate(rng, routing):
    rows = len(routing.row_experts)
    for activation, gated in (("silu", 2), ("gelu", 2), ("gelu_tanh", 2), ("swigluoai", 2), ("relu2_no_mul", 1)):
        for cols in (19, 32):
            x = draw(rng, (rows, gated * cols), np.float16)
            options = {
                "w_scale": rng.uniform(0.5, 1, (EXPERTS, gated * cols)).astype(np.float32),
                "bias": draw(rng, (EXPERTS, gated * cols)), "row_experts": routing.row_experts, "limit": 2e-2,
            }
            for many in (grids.MANY_ROWS, 1):  # one vector to a thread, or two
                with mock.patch.object(grids, "MANY_ROWS", many):
                    compare(f"{activation} {cols} tensor", "activation_quantize", x, activation, **options)
                    compare(f"{activation} {cols} static", "activation_quantize", x, activation, scale=0.01, **options)
            options["row_experts"] = np.maximum(routing.row_experts, 0)  # the scales of rows without an expert are free
            compare(f"{activation} {cols} token", "activation_quantize", x, activation, per_token=True, **options)
    for rows in (3, 1):  # more than multiprocessors, or not: a part of a row in registers, or all
        with mock.patch.object(compiler, "multiprocessors", return_value=2):
            x = draw(rng, (rows, 2 * 12296), np.float16)
            compare(f"{rows} wide token", "activation_quantize", x, per_token=True, limit=2e-2)


def combine_and_choose(rng, routing):
    rows = len(routing.row_experts)
    for cols, many in itertools.product((21, 40), (grids.MANY_ROWS, 1)):
        options = {
            "w_scale": rng.uniform(0.5, 1, (EXPERTS, cols)).astype(np.float32), "bias": draw(rng, (EXPERTS, cols)),
            "row_experts": routing.row_experts, "topk_weights": rng.uniform(0, 1, (7, TOPK)).astype(np.float32),
            "out_dtype": "bfloat16", "limit": 3e-3,
        }
        x = draw(rng, (rows, cols), np.float16)
        with mock.patch.object(grids, "MANY_ROWS", many):  # a block takes one token, or some of them
            compare(f"{cols}", "combine", x, routing.src2dst_map, **options)
            for name in ("w_scale", "bias"):
                del options[name]
            compare(f"{cols}, bare", "combine", x, routing.src2dst_map, **options)
    for experts in (5, 70):
        compare(f"{experts}", "topk_softmax", draw(rng, (9, experts)), 3, renormalize=True, limit=1e-5)


def own_gemms(only):
    """Every end of the kernels of our own, in the first tile, the largest, the narrow and those for bare products.

    Rows are cut off and experts empty.
    """
    from own_gemm_cases import TILES, Case, Layer, problem

    from cupy_moe import sm90

    kernels = [kernel for kernel in TILES if only in (None, kernel.split()[0]) and not problem(kernel)]
    chosen = [
        (of[0], max(of, key=lambda one: tuple(one.tile)), *(one for one in of if one.bare or one.tile == sm90.NARROW))
        for of in map(TILES.get, kernels)
    ]
    for tile in dict.fromkeys(itertools.chain(*chosen)):
        counts = [0, 3, 0, tile.rows + 5, 1]
        for padded in (0, tile.rows + 7):
            # The longer one has more steps than a tile has stages.
            case, longer = (Case(1, counts, 48, k, max_tokens=padded) for k in (144, 1040))
            wider = Case(1, counts, 528, 144, max_tokens=padded)  # for one cluster more tiles than places for claims
            for dtype in ("float16", "float32"):
                got = case.product(tile, dtype)[1]
                check(f"{tile} {dtype}, {padded} padded rows", got, case.exact(on_host=True), 1e-3)
            with mock.patch.object(sm90, "IN_STEP_BYTES", 0):
                got = case.product(tile)[1]
                check(f"{tile} in step, {padded} padded rows", got, case.exact(on_host=True), 1e-3)
            with mock.patch.object(compiler, "multiprocessors", return_value=2):  # several tiles for a block
                for some in (case, longer, wider) if getattr(tile.tile, "cluster", 1) > 1 else (case, longer):
                    got = some.product(tile)[1]
                    label = f"{tile} on few blocks, {padded} padded rows, {some.n} x {some.k} weights"
                    check(label, got, some.exact(on_host=True), 1e-3)
            if tile.bare:
                continue
            layer = Layer(2, counts, 19, 144, kind="(E, 2)", max_tokens=padded)
            layer.check(tile, per_expert=True, want=layer.want(on_host=True))


def gemm_and_layers(rng, routing, backend):
    rows = len(routing.row_experts)
    for n, k in ((16, 32), (23, 37)):
        a, b = codes(rng, (rows, k)), codes(rng, (EXPERTS, n, k))
        options = {"out_dtype": "float32", "limit": 3e-3, "on_gpu": {"backend": backend}}
        compare(f"{backend} {n} {k}", "grouped_gemm_fp8", a, b, routing.expert_offsets, **options)
    for hidden, inner in ((48, 32), (50, 35), (16, 4112)):  # the last: a thread has several vectors of a row
        layer = {
            "w1": codes(rng, (EXPERTS, 2 * inner, hidden)), "w2": codes(rng, (EXPERTS, hidden, inner)),
            "w1_scale": rng.uniform(1e-3, 2e-3, (EXPERTS, 2)).astype(np.float32),
            "w2_scale": rng.uniform(1e-3, 2e-3, (EXPERTS, hidden)).astype(np.float32),
            "w1_bias": draw(rng, (EXPERTS, 2 * inner)),
        }
        modes = {
            "tensor": {}, "token": {"per_act_token": True}, "static": {"a1_scale": 0.01, "a2_scale": 0.02},
            "weight on input": {"apply_router_weight_on_input": True},
            "weight on input, per token": {"apply_router_weight_on_input": True, "per_act_token": True},
        }
        if inner > grids.MAX_ROW_THREADS * grids.VECTOR:
            modes = {"token": modes["token"]}
        for mode, options in modes.items():
            run_layer(rng, f"{backend} layer {hidden} {inner} {mode}", {**layer, **options}, backend)


def run_layer(rng, label, layer, backend):
    experts = cupy_moe.Experts(**{name: device(x) for name, x in layer.items()}, backend=backend)
    hidden_size = layer["w2"].shape[1]
    for tokens in (40, 300, 1500):  # each finds its own rows, among few pairs or many; or routing is in front
        hidden, ids = draw(rng, (tokens, hidden_size)), rng.integers(-1, EXPERTS + 1, (tokens, TOPK))
        weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
        for _ in range(4):  # the later ones replay a graph
            got = experts(*map(device, (hidden, weights, ids)))
        want = reference.fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer)
        check(f"{label} {tokens}", got, want, 3e-2)
    if not layer.get("apply_router_weight_on_input"):
        hidden, counts = draw(rng, (EXPERTS, 17, hidden_size)), np.array([17, 0, 3, 1, 9], np.int32)
        out = cupy.zeros(hidden.shape, np.float32)
        experts.batched(device(hidden), device(counts), out)
        check(f"{label} batched", out, reference.batched(hidden, counts, **layer), 3e-2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-gemm", action="store_true")
    parser.add_argument("--backend", choices=backend.NAMES[:-1])
    options = parser.parse_args()
    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    routing = route_and_shuffle(rng)
    quantize(rng)
    activate(rng, routing)
    combine_and_choose(rng, routing)
    if not options.no_gemm:
        status = cupy_moe.backends()
        print("\n".join(f"{name}: {text}" for name, text in status.items()))
        fill_what_the_library_writes()
        own_gemms(options.backend)
        for name, text in status.items():
            if name != "reference" and text == "available" and options.backend in (None, name):
                gemm_and_layers(rng, routing, name)
    cupy.cuda.Device().synchronize()
    worst = max(error for _, error in CHECKS)
    print(f"{len(CHECKS)} results are right; largest relative error {worst:.1e}")


if __name__ == "__main__":
    main()
