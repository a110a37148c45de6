# SPDX-License-Identifier: Apache-2.0
"""The two steps that quantise, on the GPU, against their twins in the reference, which run here on NumPy copies."""

from unittest import mock

import numpy as np
import pytest
from gpu_cases import (
    DTYPES,
    W1_KINDS,
    assert_equal,
    code_steps,
    cupy,
    expected,
    host,
    make_routing,
    normal,
    poison,
    relative_error,
    sorted_rows,
    weight_scale,
)

import cupy_moe
from cupy_moe import compiler, dispatch, e4m3, reference
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.grids import MANY_ROWS, MAX_ROW_THREADS, MOST_COLUMNS_HELD
from cupy_moe.launches import PARTIALS, Maps, Matrix, RowScale, Tables

pytestmark = pytest.mark.gpu

# ---- quantize_fp8 -------------------------------------------------------------------------------------------------

WIDTHS = (
    (1, 1), (3, 7), (11, 2880), (17, 2880), (130, 4096), (2, 14344), (9, 14344), (3, 28673), (1030, 2880), (1024, 4090),
)


def check_quantize(x, scale=None, **options):
    want_codes, want_scale = expected(reference.quantize_fp8, x, scale, **options)
    for limit in (0, dispatch.ALONE_ELEMENTS):  # the maximum of few elements too with a kernel of its own
        with mock.patch.object(dispatch, "ALONE_ELEMENTS", limit):
            codes, made = cupy_moe.quantize_fp8(x, scale, **options)
        assert_equal(made, want_scale)
        assert_equal(codes, want_codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_quantize(shape, dtype, seed):
    x = normal(seed, shape, dtype)
    check_quantize(x)
    check_quantize(x, per_token=True)
    check_quantize(x, 0.0123)
    check_quantize(x, cupy.asarray([0.0123], np.float32))
    check_quantize(x, cupy.asarray(0.0123, np.float32))
    check_quantize(x, abs(normal(seed + 1, (shape[0], 1))) + 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_widest_rows(dtype, seed):
    x = normal(seed, (2, MOST_COLUMNS_HELD), dtype)
    check_quantize(x, per_token=True)
    check_quantize(x[:, 1:], per_token=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_pitched_and_misaligned(dtype, seed):
    wide = normal(seed, (33, 200), dtype)
    for x in (wide[:, :128], wide[::2, 8:136], wide[:, 3:131], wide[1::5, 1:78]):
        for per_token in (False, True):
            check_quantize(x, per_token=per_token)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantize_every_pattern(dtype):
    bits = np.arange(65536, dtype=np.uint16)
    x = cupy.asarray(bits.reshape(256, 256)).view(DTYPES[dtype])
    for scale in (1.0, 0.37, 1e-3):
        check_quantize(x, scale)
    check_quantize(x)
    check_quantize(x, per_token=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_negative_zero(dtype):
    check_quantize(cupy.asarray([[-0.0, 0.0, 1.0, -1.0]], np.float32).astype(DTYPES[dtype]))


def test_quantize_ties(seed):
    """Quotients on, just below and just above the middle between two codes: the division has to be exactly rounded."""
    values = e4m3.decode(np.arange(0x7F, dtype=np.uint8))
    middles = (values[1:] + values[:-1]) / 2
    scale = np.exp(np.random.default_rng(seed).uniform(-12, 5, (500, 1))).astype(np.float32)
    x = (middles * scale).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf)), -x], axis=1)
    check_quantize(cupy.asarray(x), cupy.asarray(scale))


@pytest.mark.parametrize("per_token", [False, True])
def test_quantize_special_rows(per_token, seed):
    x = normal(seed, (9, 300)).get()
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e-35
    x[4, 5] = np.nan
    x[5, 6:8] = np.inf, -np.inf
    x[6] = np.nan
    x[7] *= 1e30
    check_quantize(cupy.asarray(x), per_token=per_token)
    check_quantize(cupy.asarray(x[:3] * 1e-6), per_token=per_token)
    check_quantize(cupy.zeros((3, 40), np.float16), per_token=per_token)
    check_quantize(cupy.zeros((0, 40), np.float16), per_token=per_token)


# ---- routing and quantisation in one launch -------------------------------------------------------------------------

FEW_PAIRS = (
    (1, 1, 1, 7), (8, 3, 2, 4096), (64, 85, 6, 700), (600, 64, 8, 1024), (5, 170, 3, 40), (3, 512, 1, 72),
    (3, 513, 1, 72), (600, 256, 8, 1032), (64, 341, 6, 700), (8, 1024, 2, 264), (5, 2048, 1, 7), (300, 8, 256, 4104),
)


@pytest.mark.parametrize("kind", ["uniform", "wild", "mapped"])
@pytest.mark.parametrize("mode", ["TENSOR", "TOKEN", "STATIC"])
@pytest.mark.parametrize(("experts", "tokens", "topk", "cols"), FEW_PAIRS)
def test_route_quantize(experts, tokens, topk, cols, mode, kind, seed):
    x = normal(seed, (tokens, cols), "float16")
    _, ids = make_routing(seed, tokens, topk, 2 * experts if kind == "mapped" else experts, kind, "int64")
    expert_map = None
    if kind == "mapped":
        expert_map = cupy.asarray(np.random.default_rng(seed).permutation(2 * experts) - experts, np.int32)
    want = expected(reference.route, ids, experts, expert_map=expert_map)
    given = 0.01 if mode == "STATIC" else None
    want_codes, want_scale = expected(reference.quantize_fp8, x, given, per_token=mode == "TOKEN")

    made = [poison(cupy.empty(table.shape, np.int32)) for table in want]
    spans, tables = poison(cupy.empty((experts, 2), np.int32)), poison(cupy.empty((4, experts), np.int64))
    codes = poison(cupy.empty((tokens * topk, cols), np.uint8))
    scales = poison(cupy.empty((tokens * topk, 1), np.float32))
    partials = poison(cupy.empty((PARTIALS,), np.float32))
    launched = dispatch.quantize(
        0, mode, Matrix(x.data.ptr, cols, "float16"), tokens, cols, Matrix(codes.data.ptr, cols, "uint8"), cols,
        routing=dispatch.Pairs(
            ids.data.ptr, "int64", topk, experts, Maps(*(table.data.ptr for table in made), spans.data.ptr),
            expert_map=expert_map.data.ptr if kind == "mapped" else 0, map_size=2 * experts,
            tables=Tables(tables.data.ptr, (1000, 0, 0, 0), (cols, 0, 0, 0)),
        ),
        scale=RowScale(value=given or 1.0), scale_out=scales.data.ptr, partials=partials.data.ptr,
    )
    names = [launch.kernel.name for launch in launched]
    alone = tokens * cols <= dispatch.ALONE_ELEMENTS and tokens * topk <= MAX_ROW_THREADS
    assert names == ["amax_tokens"] * (mode == "TENSOR" and not alone) + ["route_quantize"]
    for launch in launched:
        launch(cupy.cuda.get_current_stream().ptr)
    for got, table in zip(made, want, strict=True):
        assert_equal(got, table)
    offsets, counts, tokens_of_rows = map(host, (want.expert_offsets, want.expert_counts, want.dst2src_map))
    assert_equal(spans, np.stack([offsets[:-1], counts], axis=1))
    assert_equal(tables[0], 1000 + offsets[:-1].astype(np.int64) * cols)
    rows = int(offsets[-1])
    assert_equal(codes[:rows], host(want_codes)[tokens_of_rows[:rows]])
    assert bool((codes[rows:] == 0xFF).all())
    if mode == "TENSOR":
        assert_equal(scales[0], host(want_scale))
    else:
        want_rows = np.broadcast_to(host(want_scale), (tokens, 1))[tokens_of_rows[:rows]]
        assert_equal(scales[:rows], want_rows)
        assert bool(cupy.isnan(scales[rows:]).all())


# ---- activation_quantize ------------------------------------------------------------------------------------------


def check_activation(x, activation="silu", **options):
    codes, scale = cupy_moe.activation_quantize(x, activation, **options)
    want_codes, want_scale = expected(reference.activation_quantize, x, activation, **options)
    owners, scale = host(options.get("row_experts")), host(scale)
    if owners is not None and scale.shape == (len(owners), 1):  # scales of rows without an expert mean nothing
        scale, want_scale = scale[owners >= 0], want_scale[owners >= 0]
    np.testing.assert_allclose(scale, want_scale, rtol=1e-5)
    steps = code_steps(host(codes), want_codes)
    assert steps.max(initial=0) <= 1
    assert (steps != 0).sum() <= max(0.01 * steps.size, 1)
    values, want = (e4m3.decode(np.asarray(c).view(np.uint8)) for c in (host(codes), want_codes))
    assert relative_error(values, want) <= 1e-2


def product(seed, rows, cols, activation, dtype="float32"):
    return normal(seed, (rows, cols * (2 if ACTIVATIONS[activation].gated else 1)), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation, dtype, seed):
    x = product(seed, 60, 320, activation, dtype)
    check_activation(x, activation, per_token=True)
    if dtype == "float32":
        check_activation(3 * x, activation)
        check_activation(x, activation, scale=0.01)


@pytest.mark.parametrize("w_kind", W1_KINDS)
@pytest.mark.parametrize("x_kind", ["number", "(1,)", "(E,)", "(rows, 1)"])
def test_activation_scales(w_kind, x_kind, seed):
    rng = np.random.default_rng(seed)
    rows, experts, cols = 80, 5, 200
    owners, _ = sorted_rows(seed, rows, experts)
    x = product(seed, rows, cols, "silu")
    x[-3:] = np.nan  # rows of no expert
    shape = {"number": (), "(1,)": (1,), "(E,)": (experts,), "(rows, 1)": (rows, 1)}[x_kind]
    x_scale = 90.0 if x_kind == "number" else cupy.asarray(rng.uniform(80, 100, shape), np.float32)
    options = {"x_scale": x_scale, "row_experts": owners, "w_scale": weight_scale(rng, w_kind, experts, 2 * cols, 1)}
    check_activation(x, **options)
    check_activation(x, per_token=True, **options)
    check_activation(x, scale=cupy.asarray(rng.uniform(0.005, 0.02, experts), np.float32), **options)


@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("cols", [200, 37])
def test_activation_bias(bias, cols, seed):
    owners, _ = sorted_rows(seed, 90, 4)
    options = {"bias": normal(seed + 1, (4, 2 * cols), bias), "row_experts": owners}
    check_activation(product(seed, 90, cols, "gelu"), "gelu", per_token=True, **options)
    check_activation(product(seed, 90, cols, "gelu"), "gelu", scale=0.02, **options)


@pytest.mark.parametrize("activation", ["silu", "swigluoai", "gelu_no_mul"])
@pytest.mark.parametrize("cols", [9000, 16384, 28672, 32768, 32765, 50008, MOST_COLUMNS_HELD])
@pytest.mark.parametrize("multiprocessors", [2, 3])
def test_activation_wide_rows(activation, cols, multiprocessors, seed, monkeypatch):
    """More rows than multiprocessors, so that two blocks share one, or as many."""
    monkeypatch.setattr(compiler, "multiprocessors", lambda device: multiprocessors)
    x = product(seed, 3, cols, activation, "float16")
    bias = normal(seed + 1, (1, x.shape[1]))
    check_activation(x, activation, per_token=True)
    check_activation(x, activation, per_token=True, bias=bias, w_scale=abs(bias) + 0.1)


@pytest.mark.parametrize("cols", [1408, 2056, 333])
@pytest.mark.parametrize("w_kind", ["(E, 2)", "(E, n)"])
def test_activation_many_rows(cols, w_kind, seed):
    """A thread has several vectors of each, some of which are behind the end."""
    rng = np.random.default_rng(seed)
    rows, experts = MANY_ROWS + 5, 4
    owners, _ = sorted_rows(seed, rows, experts)
    x = product(seed, rows, cols, "silu", "float16")
    x[-3:] = np.nan  # rows of no expert
    options = {"row_experts": owners, "w_scale": weight_scale(rng, w_kind, experts, 2 * cols, 1)}
    check_activation(x, **options)
    check_activation(x, scale=0.01, **options)
    check_activation(x, per_token=True, **options)
