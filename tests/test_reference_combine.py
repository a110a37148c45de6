# SPDX-License-Identifier: Apache-2.0
"""The reference's `combine`, `topk_softmax` and activations against definitions of their own and torch."""

import math

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import reference, topk_softmax
from cupy_moe.activations import ACTIVATIONS, activate, erf

SEED = 56
BF16 = ml_dtypes.bfloat16
E, M, TOPK, K = 4, 5, 2, 6
EXPERTS = np.array([0, 0, 0, 2, 2, 2, 2, 3, -1, -1], np.int32)  # of ten rows
SRC2DST = np.array([[3, 0], [7, -1], [-1, -1], [5, 4], [1, 6]], np.int32)

ROW_SCALES = {
    "none": None,
    "scalar": 0.5,
    "(1,)": np.array([0.3], np.float32),
    "(rows, 1)": np.linspace(0.1, 1, 10, dtype=np.float32)[:, None],
    "(E,)": np.linspace(0.1, 1, E, dtype=np.float32),
}
CHANNEL_SCALES = {
    "none": None,
    "(E,)": np.linspace(2, 3, E, dtype=np.float32),
    "(E, 1)": np.linspace(2, 3, E, dtype=np.float32)[:, None],
    "(E, K)": np.linspace(2, 3, E * K, dtype=np.float32).reshape(E, K),
    "(E, K, 1)": np.linspace(2, 3, E * K, dtype=np.float32).reshape(E, K, 1),
}


def random_rows(rng, dtype=np.float32):
    x = rng.normal(0, 3, (10, K)).astype(dtype)
    x[8:] = np.nan  # no slot points there
    return x


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("w_kind", CHANNEL_SCALES)
@pytest.mark.parametrize("x_kind", ROW_SCALES)
def test_combine(x_kind, w_kind, bias, weighted):
    rng = np.random.default_rng(SEED)
    x, x_scale, w_scale = random_rows(rng), ROW_SCALES[x_kind], CHANNEL_SCALES[w_kind]
    b = rng.normal(0, 1, (E, K)).astype(np.float32) if bias else None
    weights = rng.uniform(0, 1, (M, TOPK)).astype(np.float32) if weighted else None
    expected = np.zeros((M, K))
    for token, slot in np.ndindex(M, TOPK):
        row = SRC2DST[token, slot]
        if row < 0:
            continue
        expert = EXPERTS[row]
        which = {"(rows, 1)": row, "(E,)": expert}.get(x_kind, 0)
        y = x[row].astype(np.float64) * (1 if x_scale is None else np.ravel(x_scale)[which])
        y = y if w_scale is None else y * w_scale[expert].reshape(-1)
        y = y if b is None else y + b[expert]
        expected[token] += y if weights is None else y * weights[token, slot]
    got = reference.combine(
        x, SRC2DST, topk_weights=weights, x_scale=x_scale, w_scale=w_scale, bias=b, row_experts=EXPERTS
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("w_kind", CHANNEL_SCALES)
def test_combine_leaves_out_rows_of_no_expert(w_kind):
    x = np.arange(1, 10 * K + 1, dtype=np.float32).reshape(10, K)
    options = {"w_scale": CHANNEL_SCALES[w_kind], "row_experts": EXPERTS}
    got = reference.combine(x, np.array([[8, 3], [9, 8]]), **options)
    np.testing.assert_array_equal(got[:1], reference.combine(x, np.array([[3]]), **options))
    assert not got[1].any()


def test_combine_sums_in_slot_order():
    x = np.array([[1], [1e8], [-1e8]], np.float32)
    assert reference.combine(x, np.array([[1, 2, 0], [1, 0, 2]])).ravel().tolist() == [1, 0]


def test_combine_ignores_the_weight_of_an_empty_slot():
    weights = np.where(SRC2DST < 0, np.nan, 0.5).astype(np.float32)
    x = random_rows(np.random.default_rng(SEED))
    got = reference.combine(x, SRC2DST, topk_weights=weights)
    np.testing.assert_array_equal(got, reference.combine(x, SRC2DST) / 2)
    assert not got[2].any()


@pytest.mark.parametrize("out_dtype", [None, "float16", "bfloat16", "float32"])
def test_combine_result_type(out_dtype):
    x = random_rows(np.random.default_rng(SEED), BF16)
    got = reference.combine(x, SRC2DST, out_dtype=out_dtype)
    exact = reference.combine(x.astype(np.float32), SRC2DST)
    assert str(got.dtype) == (out_dtype or "bfloat16")
    np.testing.assert_array_equal(got, exact.astype(got.dtype))


def test_combine_of_no_tokens():
    empty = np.empty((0, 2), np.int32)
    assert reference.combine(np.empty((0, K), np.float32), empty, row_experts=empty[:, 0]).shape == (0, K)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32])
@pytest.mark.parametrize("shape", [(0, 4, 2), (1, 1, 1), (37, 8, 2), (20, 130, 8), (5, 4, 4)])
def test_topk_softmax(shape, dtype, renormalize):
    torch = pytest.importorskip("torch")
    tokens, experts, topk = shape
    rng = np.random.default_rng(SEED)
    # Distinct in every type, so that torch, which promises no order of ties, has no choice.
    gating = rng.permuted(np.tile(np.arange(experts) / 16 - 4, (tokens, 1)), axis=1)
    weights, ids = reference.topk_softmax(gating.astype(dtype), topk, renormalize=renormalize)
    expected, expected_ids = torch.softmax(torch.from_numpy(gating), dim=1).topk(topk, dim=1)
    if renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    assert (weights.dtype, ids.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(ids, expected_ids.numpy())
    np.testing.assert_allclose(weights, expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize(
    ("logits", "ids", "weights"),
    [
        ([1, 3, 3, 1], [1, 2, 0], [0.4404, 0.4404, 0.0596]),  # ties: the lowest id first
        ([0, 0, 0, 0], [0, 1, 2], [0.25, 0.25, 0.25]),
        ([0, -200, -np.inf, -150], [0, 3, 1], [1, 0, 0]),  # by the logit, not by the weight, which underflows
        ([np.nan, 1, -1e38, -5], [1, 3, 2], [0.9975, 0.0025, 0]),
        ([np.nan, np.nan, -np.inf, 0], [3, 0, 1], [1, 0, 0]),
        ([np.nan] * 4, [0, 1, 2], [0.25, 0.25, 0.25]),
        ([np.inf, 0, np.inf, np.nan], [0, 2, 1], [0.5, 0.5, 0]),
        ([-np.inf] * 4, [0, 1, 2], [0.25, 0.25, 0.25]),
    ],
)
def test_topk_softmax_at_the_edges(logits, ids, weights):
    got_weights, got_ids = reference.topk_softmax(np.array([logits], np.float32), 3)
    assert got_ids[0].tolist() == ids
    np.testing.assert_allclose(got_weights[0], weights, atol=1e-4)


def test_erf():
    x = np.concatenate([np.linspace(-7, 7, 20_001), [1e-300, 0.46875, 4.0, 1e300, np.inf, -np.inf, -0.0]])
    expected = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf(x, np), expected, rtol=1e-15, atol=0)
    assert np.isnan(erf(np.array([np.nan]), np)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Against torch in float64, over values where the parts cancel, overflow and are clamped."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    with_torch = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "swigluoai": lambda x: x.clamp(max=7) * torch.sigmoid(1.702 * x.clamp(max=7)),
        "relu2": lambda x: functional.relu(x).square(),
    }[name.removesuffix("_no_mul")]
    x = np.concatenate([np.linspace(-12, 12, 401), [-1e30, -300, -0.0, 300, 1e15]]).astype(np.float32)
    up = np.linspace(-9, 9, len(x), dtype=np.float32)
    expected = with_torch(torch.from_numpy(x).double()).numpy()
    if ACTIVATIONS[name].gated:
        expected = expected * (np.clip(up, -7, 7) + 1.0 if name == "swigluoai" else up)
        rows = np.concatenate([x, up])[None]
    else:
        rows = x[None]
    with np.errstate(over="ignore"):
        got = activate(name, rows)
    assert got.dtype == np.float32
    assert got.shape == (1, len(x))
    np.testing.assert_allclose(got[0], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan(name):
    assert np.isnan(activate(name, np.full((2, 4), np.nan, np.float32))).all()


def test_topk_softmax_takes_the_lowest_of_many_equal_ids():
    """Of as many experts as may be: a sort that is not stable shows from some tens on."""
    gating = np.random.default_rng(SEED).integers(0, 3, (20, 1024)).astype(np.float32)
    _, ids = topk_softmax(gating, 8)
    np.testing.assert_array_equal(ids, [np.flatnonzero(row == 2)[:8] for row in gating])


def test_combine_overflows_without_a_warning():
    got = reference.combine(np.full((1, K), 1e38, np.float32), np.zeros((1, 1), np.int32), x_scale=1e3)
    assert np.isinf(got).all()
