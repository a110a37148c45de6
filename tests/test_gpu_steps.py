# SPDX-License-Identifier: Apache-2.0
"""Each step on the GPU against its twin in the reference, which runs here on NumPy copies."""

import numpy as np
import pytest
from gpu_cases import (
    DTYPES,
    STEP_LIMIT,
    W2_KINDS,
    assert_equal,
    cupy,
    expected,
    host,
    make_routing,
    normal,
    random_codes,
    relative_error,
    same_bits,
    sorted_rows,
    weight_scale,
)

import cupy_moe
from cupy_moe import dispatch, grids, reference

pytestmark = pytest.mark.gpu


# ---- route, shuffle_rows, gather_scales ---------------------------------------------------------------------------

ROUTES = (
    (1, 1, 1), (8, 0, 2), (8, 3, 2), (8, 2048, 2), (8, 2049, 2), (64, 5000, 6), (512, 300, 8), (1100, 1000, 4),
    (1100, 3000, 8), (33, 20000, 8), (40, 64, 8), (40, 65, 8), (300, 171, 3), (1100, 511, 8), (5000, 100, 6),
)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("kind", ["uniform", "one", "wild"])
@pytest.mark.parametrize(("experts", "tokens", "topk"), ROUTES)
def test_route(experts, tokens, topk, kind, dtype, seed):
    _, ids = make_routing(seed, tokens, topk, experts, kind, dtype)
    for got, want in zip(cupy_moe.route(ids, experts), expected(reference.route, ids, experts), strict=True):
        assert got.dtype == np.int32
        assert_equal(got, want)


@pytest.mark.parametrize(("experts", "tokens", "topk"), ROUTES)
def test_route_without_clusters(experts, tokens, topk, seed, monkeypatch):
    monkeypatch.setattr(dispatch, "ROUTE_CLUSTER", 1)
    _, ids = make_routing(seed, tokens, topk, experts, "wild", "int32")
    for got, want in zip(cupy_moe.route(ids, experts), expected(reference.route, ids, experts), strict=True):
        assert_equal(got, want)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("tokens", [5, 700, 3000])
def test_route_expert_map(tokens, dtype, seed):
    _, ids = make_routing(seed, tokens, 4, 20, "wild", dtype)
    expert_map = cupy.asarray(np.random.default_rng(seed).integers(-3, 12, 20), np.int32)  # 9, 10, 11 are no experts
    made = cupy_moe.route(ids, 9, expert_map=expert_map)
    for got, want in zip(made, expected(reference.route, ids, 9, expert_map=expert_map), strict=True):
        assert_equal(got, want)


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8", "int64"])
@pytest.mark.parametrize("cols", [1, 3, 24, 2048, 5003])
def test_shuffle_rows(dtype, cols, seed):
    random_bytes = np.random.default_rng(seed).integers(0, 256, (70, 8 * (cols + 5)), np.uint8)
    wide = cupy.asarray(random_bytes.view(DTYPES.get(dtype) or np.dtype(dtype)))
    index = np.random.default_rng(seed).integers(-2, 73, 300).astype(np.int32)
    index[:2] = -(2**31), 2**31 - 1
    index = cupy.asarray(index)
    for x in (wide[:, :cols], wide[::3, 1 : 1 + cols], cupy.ascontiguousarray(wide[:, :cols])):
        want = expected(reference.shuffle_rows, x, index)
        assert_equal(cupy_moe.shuffle_rows(x, index), want)
        out = cupy.empty(want.shape, x.dtype)
        assert cupy_moe.shuffle_rows(x, index, out=out) is out
        assert_equal(out, want)


@pytest.mark.parametrize("tokens", [70, 1000, 5003])
@pytest.mark.parametrize("rows", [4092, 4093, 5003])
def test_shuffle_many_rows(rows, tokens, seed):
    """Their blocks do not come in the order of the rows; more or fewer stripes, by the rows of a token."""
    x = random_codes(seed, (tokens, 4096))
    index = cupy.asarray(np.random.default_rng(seed).integers(-2, tokens + 3, rows), np.int32)
    out = cupy.full((rows + 1, 4096), 77, np.uint8)
    cupy_moe.shuffle_rows(x, index, out=out[:rows])
    assert_equal(out[:rows], expected(reference.shuffle_rows, x, index))
    assert (out[rows] == 77).all()


def test_shuffle_rows_of_nothing():
    index = cupy.asarray([0, -1, 3], np.int32)
    assert not cupy_moe.shuffle_rows(cupy.ones((0, 5), np.float32), index).any()
    assert cupy_moe.shuffle_rows(cupy.ones((4, 5), np.float32), index[:0]).shape == (0, 5)


@pytest.mark.parametrize("shape", [(50, 1), (50,)])
def test_gather_scales(shape, seed):
    scales, index = normal(seed, shape), cupy.asarray(np.random.default_rng(seed).integers(-2, 53, 200), np.int32)
    assert_equal(cupy_moe.gather_scales(scales, index), expected(reference.gather_scales, scales, index))


# ---- grouped_gemm_fp8, combine, topk_softmax ----------------------------------------------------------------------


@pytest.mark.gemm
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 48), (512, 2880), (256, 4096), (100, 72), (19, 37), (1, 1)])
def test_grouped_gemm(n, k, out_dtype, seed):
    rng = np.random.default_rng(seed)
    rows, experts = 133, 5
    a, b = random_codes(seed, (rows, k)), random_codes(seed + 1, (experts, n, k))
    _, offsets = sorted_rows(seed, rows, experts)
    row_scale = cupy.asarray(rng.uniform(0.001, 0.002, (rows, 1)), np.float32)
    cases = [{}, {"a_scale": 0.01, "b_scale": weight_scale(rng, "(E,)", experts, n, k)}]
    bias = normal(seed + 2, (experts, n), out_dtype)
    cases += [
        {"a_scale": row_scale, "b_scale": weight_scale(rng, kind, experts, n, k), "bias": bias} for kind in W2_KINDS
    ]
    for options in cases:
        if not options and out_dtype == "float16":
            continue  # the unscaled product does not fit
        got = cupy_moe.grouped_gemm_fp8(a, b, offsets, out_dtype=out_dtype, **options)
        want = expected(reference.grouped_gemm_fp8, a, b, offsets, out_dtype="float32", **options)
        assert got.dtype == DTYPES[out_dtype]
        assert relative_error(host(got), want) <= STEP_LIMIT
        assert not host(got)[-3:].astype(np.float32).any()


@pytest.mark.gemm
def test_grouped_gemm_of_a_part_of_the_rows(seed):
    """Rows in front of the first expert's and behind the last one's are zero, with a bias too."""
    a, b, bias = random_codes(seed, (40, 64)), random_codes(seed + 1, (3, 48, 64)), normal(seed + 2, (3, 48))
    offsets, options = cupy.asarray([7, 9, 20, 33], np.int32), {"a_scale": 0.01, "bias": bias, "out_dtype": "float32"}
    got = host(cupy_moe.grouped_gemm_fp8(a, b, offsets, **options))
    assert relative_error(got, expected(reference.grouped_gemm_fp8, a, b, offsets, **options)) <= STEP_LIMIT
    assert not got[:7].any()
    assert not got[33:].any()


@pytest.mark.gemm
@pytest.mark.parametrize("offsets", [(0, 9, 5, 40), (0, 9, 100, 120), (-3, 9, 20, 2**31 - 1), (0, 7, 7, -5)])
def test_grouped_gemm_offsets_out_of_order(offsets, seed):
    """They end somewhere, and write nothing but the result."""
    a, b = random_codes(seed, (40, 64)), random_codes(seed + 1, (3, 48, 64))
    got = cupy_moe.grouped_gemm_fp8(a, b, cupy.asarray(offsets, np.int32), a_scale=0.01, out_dtype="float32")
    assert got.shape == (40, 48)
    if offsets[-1] >= 40:
        first = cupy.asarray([0, offsets[1]], np.int32)
        want = expected(reference.grouped_gemm_fp8, a, b[:1], first, a_scale=0.01, out_dtype="float32")
        assert relative_error(host(got)[:5], want[:5]) <= STEP_LIMIT, "expert 0"


@pytest.mark.gemm
def test_grouped_gemm_misaligned(seed):
    rows, experts, n, k = 70, 3, 64, 48
    a = random_codes(seed, rows * k + 1)[1:].reshape(rows, k)
    b = random_codes(seed + 1, experts * n * k + 3)[3:].reshape(experts, n, k)
    _, offsets = sorted_rows(seed, rows, experts)
    got = cupy_moe.grouped_gemm_fp8(a, b, offsets, a_scale=0.01, out_dtype="float32")
    want = expected(reference.grouped_gemm_fp8, a, b, offsets, a_scale=0.01, out_dtype="float32")
    assert relative_error(host(got), want) <= STEP_LIMIT


COMBINES = (
    ("float16", "bfloat16", 2), ("float16", "float16", 8), ("bfloat16", "float32", 1), ("float32", "float32", 5)
)


@pytest.mark.parametrize(("dtype", "out_dtype", "topk"), COMBINES)
@pytest.mark.parametrize("cols", [2048, 77])
@pytest.mark.parametrize("w_kind", [None, "(E, 1)", "(E, n)"])
@pytest.mark.parametrize("tokens", [40, grids.MANY_ROWS + 3])
def test_combine(tokens, dtype, out_dtype, topk, cols, w_kind, seed):
    rng = np.random.default_rng(seed)
    experts = 6
    weights, ids = make_routing(seed, tokens, topk, experts, "wild")
    routing = cupy_moe.route(ids, experts)
    routing.src2dst_map[routing.src2dst_map == 0] = -1
    weights = cupy.where(routing.src2dst_map < 0, np.float32(np.nan), weights)  # adds nothing all the same
    x = normal(seed, (tokens * topk, cols), dtype)
    x[0] = np.nan  # a row without a slot
    options = {}
    if w_kind:
        options = {"w_scale": weight_scale(rng, w_kind, experts, cols, 1), "row_experts": routing.row_experts}
        if w_kind == "(E, n)" or tokens == 40:
            options["bias"] = normal(seed + 1, (experts, cols), dtype)
        options["x_scale"] = cupy.asarray(rng.uniform(100, 200, (tokens * topk, 1)), np.float32)
    for topk_weights in (weights, None):
        options["topk_weights"] = topk_weights
        got = cupy_moe.combine(x, routing.src2dst_map, out_dtype=out_dtype, **options)
        want = expected(reference.combine, x, routing.src2dst_map, out_dtype="float32", **options)
        assert got.dtype == DTYPES[out_dtype]
        assert relative_error(host(got), want) <= STEP_LIMIT
        assert same_bits(got, cupy_moe.combine(x, routing.src2dst_map, out_dtype=out_dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "topk"), [(1, 1), (2, 2), (8, 2), (33, 8), (64, 6), (256, 8), (1024, 3)])
def test_topk_softmax(experts, topk, renormalize, dtype, seed):
    gating = (cupy.rint(8 * normal(seed, (101, experts))) / 4).get()  # with ties
    gating[0], gating[1], gating[2] = np.nan, np.inf, -np.inf
    gating[3, 0], gating[4, -1], gating[5, 0] = np.nan, np.inf, -np.inf
    wide = cupy.asarray(np.pad(gating, ((0, 0), (1, 2)))).astype(DTYPES[dtype])
    gating = cupy.asarray(gating).astype(DTYPES[dtype])
    weights, ids = map(host, cupy_moe.topk_softmax(gating, topk, renormalize=renormalize))
    want_weights, want_ids = expected(reference.topk_softmax, gating, topk, renormalize=renormalize)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5, atol=1e-30)
    pitched = cupy_moe.topk_softmax(wide[:, 1 : 1 + experts], topk, renormalize=renormalize)
    assert_equal(pitched[0], weights)
    assert_equal(pitched[1], ids)
