# SPDX-License-Identifier: Apache-2.0
"""The reference on a GPU through CuPy: bits and indices equal to those of NumPy, sums close to them."""

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import e4m3, reference
from cupy_moe.activations import ACTIVATIONS

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu

SEED = 78
BF16 = ml_dtypes.bfloat16


def to_gpu(value):
    """Copy an array to the GPU, fp8 as its bits; leave anything else."""
    if not isinstance(value, np.ndarray):
        return value
    return cupy.asarray(value.view(np.uint8) if value.dtype == e4m3.DTYPE else value)


def on_gpu(function, *args, **options):
    """Call a reference function on copies in GPU memory; NumPy arrays back."""
    result = function(*map(to_gpu, args), **{name: to_gpu(value) for name, value in options.items()})
    arrays = result if isinstance(result, tuple) else (result,)
    assert all(isinstance(array, cupy.ndarray) for array in arrays)
    return [array.get() for array in arrays]


def test_e4m3():
    rng = np.random.default_rng(SEED)
    x = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, np.exp2(rng.uniform(-14, 10, 1_000_000)).astype(np.float32)])
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(on_gpu(e4m3.encode, x)[0], e4m3.encode(x))
    np.testing.assert_array_equal(on_gpu(e4m3.decode, codes)[0], e4m3.decode(codes))


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("mapped", [False, True])
def test_route(tokens, mapped):
    rng = np.random.default_rng(SEED)
    ids = rng.integers(-2, 12, (tokens, 3))
    expert_map = rng.integers(-1, 9, 10).astype(np.int32) if mapped else None
    expected = reference.route(ids, 8, expert_map=expert_map)
    for got, array in zip(on_gpu(reference.route, ids, 8, expert_map=expert_map), expected, strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.uint8])
def test_shuffle_rows(dtype):
    x = np.random.default_rng(SEED).normal(20, 5, (5, 7)).astype(dtype)
    dst2src = np.array([4, 0, -1, 0, 5, 3], np.int32)
    (got,) = on_gpu(reference.shuffle_rows, x, dst2src)
    np.testing.assert_array_equal(got, reference.shuffle_rows(x, dst2src))


@pytest.mark.parametrize("renormalize", [False, True])
def test_topk_softmax(renormalize):
    gating = np.random.default_rng(SEED).integers(-9, 9, (500, 16)).astype(np.float32)  # with ties
    gating[3, 2:5] = np.nan, np.inf, -np.inf
    expected_weights, expected_ids = reference.topk_softmax(gating, 4, renormalize=renormalize)
    weights, ids = on_gpu(reference.topk_softmax, gating, 4, renormalize=renormalize)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-30)


def make_layer(dtype=np.float32, tokens=40, activation="silu"):
    rng = np.random.default_rng(SEED)
    experts, hidden_size, inner, topk = 6, 64, 48, 3
    rows = inner if activation.endswith("no_mul") else 2 * inner
    layer = {
        "w1": rng.normal(0, 60, (experts, rows, hidden_size)).astype(e4m3.DTYPE),
        "w2": rng.normal(0, 60, (experts, hidden_size, inner)).astype(e4m3.DTYPE),
        "w1_scale": rng.uniform(0.004, 0.02, (experts, rows)).astype(np.float32),
        "w2_scale": rng.uniform(0.004, 0.02, (experts, 1)).astype(np.float32),
        "w1_bias": rng.normal(0, 2, (experts, rows)).astype(np.float32),
        "w2_bias": rng.normal(0, 2, (experts, hidden_size)).astype(np.float32),
        "topk_weights": rng.uniform(0, 1, (tokens, topk)).astype(np.float32),
        "topk_ids": rng.integers(-1, experts + 1, (tokens, topk)),
        "activation": activation,
    }
    return rng.normal(0, 1, (tokens, hidden_size)).astype(dtype), layer


def assert_close(got, expected):
    """Allow some codes to fall to the other side of a tie, and the rounding of the result."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    got, expected = got.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.linalg.norm(np.nan_to_num(got - expected)) <= 5e-3 * np.linalg.norm(np.nan_to_num(expected))


OPTIONS = {
    "per tensor": {},
    "per token": {"per_act_token": True},
    "static": {"a1_scale": 0.01, "a2_scale": np.array([0.5], np.float32)},
    "static per expert": {"a1_scale": np.linspace(0.01, 0.02, 6, dtype=np.float32), "a2_scale": 0.5},
    "weight on input": {"apply_router_weight_on_input": True},
    "weight on input, per token": {"apply_router_weight_on_input": True, "per_act_token": True},
    "expert_map": {"expert_map": np.array([5, -1, 0, 2, 1, 9], np.int32)},
}


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_experts(options, dtype):
    hidden, layer = make_layer(dtype)
    hidden[7, 3] = np.nan
    expected = reference.fused_experts(hidden, **layer, **options)
    assert_close(on_gpu(reference.fused_experts, hidden, **layer, **options)[0], expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_experts_activations(activation):
    hidden, layer = make_layer(activation=activation)
    expected = reference.fused_experts(hidden, **layer)
    assert_close(on_gpu(reference.fused_experts, hidden, **layer)[0], expected)


def test_fused_experts_fp8_input():
    hidden, layer = make_layer()
    hidden = (100 * hidden).astype(e4m3.DTYPE)
    a1_scale = np.linspace(0.01, 0.02, len(hidden), dtype=np.float32)[:, None]
    expected = reference.fused_experts(hidden, a1_scale=a1_scale, **layer)
    assert_close(on_gpu(reference.fused_experts, hidden, a1_scale=a1_scale, **layer)[0], expected)


@pytest.mark.parametrize("options", list(OPTIONS.values())[:4], ids=list(OPTIONS)[:4])
def test_no_tokens(options):
    hidden, layer = make_layer(tokens=0)
    assert on_gpu(reference.fused_experts, hidden, **layer, **options)[0].shape == (0, 64)


@pytest.mark.parametrize("options", list(OPTIONS.values())[:4], ids=list(OPTIONS)[:4])
def test_batched(options):
    hidden, layer = make_layer(BF16, tokens=6 * 8)
    del layer["topk_weights"], layer["topk_ids"]
    args = hidden.reshape(6, 8, 64), np.array([3, 0, 8, 1, 5, 2], np.int32)
    (got,) = on_gpu(reference.batched, *args, **layer, **options)
    assert_close(got, reference.batched(*args, **layer, **options))
