# SPDX-License-Identifier: Apache-2.0
"""The reference layer at its edges: no tokens, NaN, infinity, result types, and the padded batched form."""

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import reference

SEED = 12
M, K, N, E, TOPK = 9, 32, 16, 4, 2
FP8 = ml_dtypes.float8_e4m3fn
MODES = {
    "per tensor": {},
    "per token": {"per_act_token": True},
    "static": {"a1_scale": 0.01, "a2_scale": 2.0},
    "static per expert": {"a1_scale": np.full(E, 0.01, np.float32), "a2_scale": np.full(E, 2, np.float32)},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def make_layer(tokens=M):
    """Draw hidden states, router weights and ids, and the weights of a layer as keyword arguments."""
    rng = np.random.default_rng(SEED)
    layer = {
        "w1": rng.normal(0, 60, (E, 2 * N, K)).astype(FP8),
        "w2": rng.normal(0, 60, (E, K, N)).astype(FP8),
        "w1_scale": rng.uniform(0.004, 0.02, E).astype(np.float32),
        "w2_scale": rng.uniform(0.004, 0.02, E).astype(np.float32),
        "w1_bias": rng.normal(0, 2, (E, 2 * N)).astype(np.float32),
        "w2_bias": rng.normal(0, 2, (E, K)).astype(np.float32),
    }
    hidden = rng.normal(0, 1, (tokens, K)).astype(np.float32)
    weights = rng.uniform(0.1, 1, (tokens, TOPK)).astype(np.float32)
    return hidden, weights, rng.integers(0, E, (tokens, TOPK)), layer


def run(hidden, weights, ids, layer, **options):
    return reference.fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer, **options)


@pytest.mark.parametrize("on_input", [False, True])
@each_mode
def test_no_tokens(mode, on_input):
    hidden, weights, ids, layer = make_layer(0)
    assert run(hidden, weights, ids, layer, apply_router_weight_on_input=on_input, **mode).shape == (0, K)


@pytest.mark.parametrize("scale", [0.5, np.empty((0, 1), np.float32)], ids=["scalar", "(0, 1)"])
def test_no_fp8_tokens(scale):
    hidden, weights, ids, layer = make_layer(0)
    assert run(hidden.astype(FP8), weights, ids, layer, a1_scale=scale).shape == (0, K)


@pytest.mark.parametrize("on_input", [False, True])
@each_mode
def test_nan_stays_in_its_token(mode, on_input):
    hidden, weights, ids, layer = make_layer()
    hidden[4] = 0  # far from the maximum of the activated rows, from which the NaN takes it out
    options = {**mode, "apply_router_weight_on_input": on_input}
    expected = run(hidden, weights, ids, layer, **options)
    hidden[4, 7] = np.nan
    got = run(hidden, weights, ids, layer, **options)
    assert np.isnan(got[4]).all()
    others = np.arange(M) != 4
    assert np.isfinite(got[others]).all()
    np.testing.assert_array_equal(got[others], expected[others])


@each_mode
def test_infinity_saturates(mode):
    hidden, weights, ids, layer = make_layer()
    hidden[2, 3], hidden[2, 4] = -np.inf, np.inf
    got = run(hidden, weights, ids, layer, **mode)
    finite = np.abs(np.where(np.isfinite(hidden), hidden, 0))
    largest = 4.48 if "a1_scale" in mode else (finite[2] if "per_act_token" in mode else finite).max()
    hidden[2, 3], hidden[2, 4] = -largest, largest
    np.testing.assert_array_equal(got, run(hidden, weights, ids, layer, **mode))


def test_nan_router_weight_stays_in_its_token():
    hidden, weights, ids, layer = make_layer()
    expected = run(hidden, weights, ids, layer)
    weights[5, 1] = np.nan
    got = run(hidden, weights, ids, layer)
    assert np.isnan(got[5]).all()
    others = np.arange(M) != 5
    np.testing.assert_array_equal(got[others], expected[others])


def test_tokens_of_zeros():
    hidden, weights, ids, layer = make_layer()
    layer.update(w1_bias=None, w2_bias=None)
    assert not run(0 * hidden, weights, ids, layer).any()


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_type_is_that_of_the_input(dtype):
    hidden, weights, ids, layer = make_layer()
    hidden = hidden.astype(dtype)
    got = run(hidden, weights, ids, layer)
    exact = run(hidden, weights, ids, layer, out_dtype="float32")
    assert got.dtype == dtype
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(got, exact.astype(dtype))


@pytest.mark.parametrize("hidden_type", [FP8, np.uint8])
def test_result_type_of_fp8_input(hidden_type):
    hidden, weights, ids, layer = make_layer()
    got = run(hidden.astype(FP8).view(hidden_type), weights, ids, layer, a1_scale=1.0)
    assert got.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", ml_dtypes.bfloat16, np.dtype(np.float16)])
def test_out_dtype(name):
    hidden, weights, ids, layer = make_layer()
    got = run(hidden, weights, ids, layer, out_dtype=name)
    expected = run(hidden, weights, ids, layer)
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype):
    hidden, weights, ids, layer = make_layer()
    out = np.full((M, K), 7, dtype)
    assert run(hidden.astype(np.float16), weights, ids, layer, out=out) is out
    exact = run(hidden.astype(np.float16), weights, ids, layer, out_dtype="float32")
    np.testing.assert_array_equal(out, exact.astype(dtype))  # rounded once


def test_float16_overflows_to_infinity_without_a_warning():
    hidden, weights, ids, layer = make_layer()
    got = run(hidden, 1e4 * weights, ids, layer, out_dtype="float16")
    exact = run(hidden, 1e4 * weights, ids, layer)
    assert np.isinf(got).any()
    assert np.isfinite(exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
@each_mode
def test_batched_is_the_plain_form(mode, dtype):
    counts = np.array([3, 0, 5, 1], np.int32)
    hidden, _, _, layer = make_layer(E * 5)
    real = np.arange(5) < counts[:, None]
    padded = hidden.reshape(E, 5, K).astype(dtype)
    padded[~real] = np.where(np.arange(K) % 2, np.nan, 1e4).astype(dtype)  # counts in no maximum
    got = reference.batched(padded, counts, **layer, **mode)

    ids = np.repeat(np.arange(E), counts)[:, None]
    expected = run(padded[real], np.ones(ids.shape, np.float32), ids, layer, **mode)
    assert got.dtype == dtype
    assert got.shape == padded.shape
    np.testing.assert_array_equal(got[real], expected)
    assert not got[~real].any()


@pytest.mark.parametrize("scale", [0.02, np.linspace(0.01, 0.05, E * 5, dtype=np.float32).reshape(E, 5, 1)])
def test_batched_fp8_input(scale):
    counts = np.array([3, 0, 5, 1], np.int32)
    hidden, _, _, layer = make_layer(E * 5)
    padded = (100 * hidden).reshape(E, 5, K).astype(FP8)
    real = np.arange(5) < counts[:, None]
    out = np.empty(padded.shape, np.float32)
    assert reference.batched(padded, counts, a1_scale=scale, out=out, **layer) is out

    ids = np.repeat(np.arange(E), counts)[:, None]
    row_scale = np.broadcast_to(scale, (E, 5, 1))[real].astype(np.float32)
    ones = np.ones(ids.shape, np.float32)
    expected = run(padded[real], ones, ids, layer, a1_scale=row_scale, out_dtype="float32")
    np.testing.assert_array_equal(out[real], expected)


def test_batched_without_tokens():
    *_, layer = make_layer()
    counts = np.zeros(E, np.int32)
    assert reference.batched(np.ones((E, 0, K), np.float32), counts, **layer).shape == (E, 0, K)
    assert not reference.batched(np.ones((E, 2, K), np.float32), counts, **layer).any()
