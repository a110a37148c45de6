# SPDX-License-Identifier: Apache-2.0
"""Each step of the reference against a slow definition of its own."""

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import reference

SEED = 34
FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def round_e4m3(x):
    """Round to e4m3 values with ml_dtypes, saturating."""
    clipped = np.clip(np.nan_to_num(x, posinf=448, neginf=-448), -448, 448).astype(FP8)
    return np.where(np.isnan(x), np.float32(np.nan), clipped.astype(np.float32))


def random_fp8(rng, *shape):
    return rng.normal(0, 60, shape).astype(FP8)


def sorted_rows(counts, dropped):
    """Return expert offsets and the expert of each row, with `dropped` rows of no expert at the end."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    experts = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(dropped, -1)])
    return offsets, experts.astype(np.int32)


def route_slowly(ids, num_experts, expert_map=None):
    rows, dropped = [], 0
    for token, slot in np.ndindex(ids.shape):
        expert = int(ids[token, slot])
        if expert_map is not None:
            expert = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
        if 0 <= expert < num_experts:
            rows.append((expert, token, slot))
        else:
            dropped += 1
    rows.sort()
    src2dst = np.full(ids.shape, -1)
    for row, (_, token, slot) in enumerate(rows):
        src2dst[token, slot] = row
    counts = [sum(row[0] == e for row in rows) for e in range(num_experts)]
    return {
        "expert_offsets": np.concatenate([[0], np.cumsum(counts)]),
        "expert_counts": counts,
        "dst2src_map": [row[1] for row in rows] + [-1] * dropped,
        "src2dst_map": src2dst,
        "row_experts": [row[0] for row in rows] + [-1] * dropped,
    }


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_scales_of_nothing(shape, per_token):
    codes, scale = reference.quantize_fp8(np.zeros(shape, np.float32), per_token=per_token)
    assert codes.shape == shape
    assert scale.shape == ((shape[0], 1) if per_token else (1,))
    np.testing.assert_array_equal(scale, np.float32(1e-30) / np.float32(448))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("low", "high"), [(0, 6), (-3, 12), (2, 3), (-5, 0)])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (17, 1), (40, 5)])
@pytest.mark.parametrize("mapped", [False, True])
def test_route(shape, low, high, dtype, mapped):
    rng = np.random.default_rng(SEED)
    ids = rng.integers(low, high, shape).astype(dtype)
    expert_map = rng.integers(-2, 8, 9).astype(np.int32) if mapped else None
    routing = reference.route(ids, 6, expert_map=expert_map)
    for name, expected in route_slowly(ids, 6, expert_map).items():
        got = getattr(routing, name)
        assert got.dtype == np.int32, name
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_route_drops_ids_beyond_32_bits():
    ids = np.array([[2**32, 1], [2**31, -(2**32)]])
    routing = reference.route(ids, 2)
    assert routing.expert_counts.tolist() == [0, 1]
    assert routing.src2dst_map.tolist() == [[-1, 0], [-1, -1]]


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, FP8, np.uint8, np.int64, np.float64])
def test_shuffle_rows(dtype):
    x = np.random.default_rng(SEED).normal(20, 5, (5, 7)).astype(dtype)
    dst2src = np.array([4, 0, -1, 0, 5, 2**31 - 1, 3, -7], np.int32)
    expected = np.zeros((8, 7), dtype)
    for row, token in enumerate(dst2src):
        if 0 <= token < 5:
            expected[row] = x[token]
    got = reference.shuffle_rows(x, dst2src)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    out = np.ones((8, 7), dtype)
    assert reference.shuffle_rows(x[:, ::-1], dst2src, out=out) is out
    np.testing.assert_array_equal(out, expected[:, ::-1])


def test_shuffle_rows_of_nothing():
    got = reference.shuffle_rows(np.empty((0, 3), BF16), np.array([-1, 0], np.int32))
    np.testing.assert_array_equal(got, np.zeros((2, 3), BF16))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_gather_scales(shape):
    scales = np.array([0.5, 2, 3, 4], np.float32).reshape(shape)
    got = reference.gather_scales(scales, np.array([3, 3, -1, 0], np.int32))
    assert got.dtype == np.float32
    assert got.tolist() == [[4], [4], [0], [0.5]]


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32])
@pytest.mark.parametrize("mode", ["tensor", "token", "0.25", "(1,)", "(M, 1)"])
def test_quantize_fp8(mode, dtype):
    x = np.random.default_rng(SEED).normal(0, 90, (6, 33)).astype(dtype)
    x[1, :3] = np.nan, np.inf, -np.inf
    x[2] = 0
    static = {"0.25": 0.25, "(1,)": np.array([0.1], np.float32), "(M, 1)": np.linspace(0.1, 2, 6)[:, None]}
    q, scale = reference.quantize_fp8(x, static.get(mode), per_token=mode == "token")

    wide = x.astype(np.float32)
    finite = np.abs(np.where(np.isfinite(wide), wide, 0))
    amax = finite.max(axis=1, keepdims=True) if mode == "token" else finite.max().reshape(1)
    dynamic = np.maximum(amax, np.float32(1e-30)) / np.float32(448)
    expected = np.atleast_1d(np.asarray(static.get(mode, dynamic), np.float32))
    assert scale.dtype == np.float32
    assert q.dtype == FP8
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(q.astype(np.float32), round_e4m3(wide / expected))


def test_quantize_fp8_of_nothing():
    assert reference.quantize_fp8(np.empty((0, 4), np.float32))[1].shape == (1,)
    assert reference.quantize_fp8(np.empty((0, 4), np.float32), per_token=True)[1].shape == (0, 1)


ROWS = {
    "none": lambda rng, rows: None,
    "scalar": lambda rng, rows: 0.5,
    "(1,)": lambda rng, rows: np.array([0.3], np.float32),
    "(rows, 1)": lambda rng, rows: rng.uniform(0.1, 1, (rows, 1)).astype(np.float32),
    "(E,)": lambda rng, rows: rng.uniform(0.1, 1, 4).astype(np.float32),
}
CHANNELS = {
    "none": lambda rng, n: None,
    "(E,)": lambda rng, n: rng.uniform(0.1, 1, 4).astype(np.float32),
    "(E, 1, 1)": lambda rng, n: rng.uniform(0.1, 1, (4, 1, 1)).astype(np.float32),
    "(E, 2)": lambda rng, n: rng.uniform(0.1, 1, (4, 2)).astype(np.float32),
    "(E, n, 1)": lambda rng, n: rng.uniform(0.1, 1, (4, n, 1)).astype(np.float32),
}
OFFSETS, EXPERTS = sorted_rows([3, 0, 4, 1], dropped=2)


def rescaled_row(x, row, row_scale, channel_scale, bias, expert=None):
    """Scale one row in float64 and add its bias."""
    expert = EXPERTS[row] if expert is None else expert
    y = x[row].astype(np.float64)
    if row_scale is not None:
        flat = np.ravel(row_scale)
        y = y * float(flat[0] if len(flat) == 1 else flat[row] if np.ndim(row_scale) == 2 else flat[expert])
    if channel_scale is not None:
        of_expert = channel_scale[expert].reshape(-1)
        y = y * np.repeat(of_expert, len(y) // len(of_expert)).astype(np.float64)
    return y if bias is None else y + bias[expert]


def gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


SLOW_ACTIVATIONS = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu": lambda g, u: gelu(g) * u,
    "gelu_tanh": lambda g, u: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u,
    "swigluoai": lambda g, u: (
        np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))) * (np.clip(u, -7, 7) + 1)
    ),
    "silu_no_mul": lambda x: x / (1 + np.exp(-x)),
    "gelu_no_mul": gelu,
    "relu2_no_mul": lambda x: np.where(x > 0, x, 0) ** 2,
}


def assert_same_codes(q, scale, values):
    """Allow a code beside the right one where the value lies within 1e-4 of the midpoint between the two."""
    got, expected = q.astype(np.float32), round_e4m3((values / scale).astype(np.float32))
    differ = got != expected
    midpoint = (got + expected)[differ] / 2
    assert differ.mean() < 0.02
    np.testing.assert_allclose((values / scale)[differ], midpoint, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("w_kind", CHANNELS)
@pytest.mark.parametrize("x_kind", ROWS)
def test_activation_quantize_scales(x_kind, w_kind, bias):
    rng = np.random.default_rng(SEED)
    x = rng.normal(0, 4, (10, 24)).astype(BF16)
    x[8:] = np.nan  # rows of no expert
    x_scale, w_scale = ROWS[x_kind](rng, 10), CHANNELS[w_kind](rng, 24)
    b = rng.normal(0, 2, (4, 24)).astype(np.float32) if bias else None
    q, scale = reference.activation_quantize(x, x_scale=x_scale, w_scale=w_scale, bias=b, row_experts=EXPERTS)
    h = np.stack([rescaled_row(x, row, x_scale, w_scale, b) for row in range(8)])
    values = SLOW_ACTIVATIONS["silu"](h[:, :12], h[:, 12:])
    np.testing.assert_allclose(scale, [np.abs(values).max() / 448], rtol=1e-5)
    assert_same_codes(q[:8], scale, values)
    assert not q[8:].view(np.uint8).any()


@pytest.mark.parametrize("kind", ["tensor", "token", "scalar", "(1,)", "(E,)"])
@pytest.mark.parametrize("activation", SLOW_ACTIVATIONS)
def test_activation_quantize_modes(activation, kind):
    rng = np.random.default_rng(SEED)
    gated = not activation.endswith("no_mul")
    x = rng.normal(0, 8, (10, 32 if gated else 16)).astype(np.float32)
    x[8:] = 1e6
    static = ROWS[kind](rng, 10) if kind in ROWS else None
    q, scale = reference.activation_quantize(
        x, activation, scale=static, per_token=kind == "token", row_experts=EXPERTS
    )
    wide = x[:8].astype(np.float64)
    values = SLOW_ACTIVATIONS[activation](*((wide[:, :16], wide[:, 16:]) if gated else (wide,)))
    if kind == "tensor":
        np.testing.assert_allclose(scale, [np.abs(values).max() / 448], rtol=1e-5)
    elif kind == "token":
        np.testing.assert_allclose(scale[:8, 0], np.abs(values).max(axis=1) / 448, rtol=1e-5)
    else:
        np.testing.assert_array_equal(scale, np.atleast_1d(np.float32(static)))
    row_scale = scale[EXPERTS[:8], None] if kind == "(E,)" else scale.reshape(-1, 1)[:8]
    assert_same_codes(q[:8], row_scale, values)
    assert not q[8:].view(np.uint8).any()


def test_activation_quantize_without_experts():
    x = np.random.default_rng(SEED).normal(0, 8, (3, 32)).astype(np.float32)
    q, scale = reference.activation_quantize(x)
    assert_same_codes(q, scale, SLOW_ACTIVATIONS["silu"](x[:, :16].astype(np.float64), x[:, 16:]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("b_kind", CHANNELS)
@pytest.mark.parametrize("a_kind", ROWS)
def test_grouped_gemm_fp8(a_kind, b_kind, bias):
    rng = np.random.default_rng(SEED)
    a, b = random_fp8(rng, 10, 48), random_fp8(rng, 4, 6, 48)
    a[8:] = np.nan  # rows of no expert
    a_scale, b_scale = ROWS[a_kind](rng, 10), CHANNELS[b_kind](rng, 6)
    shift = rng.normal(0, 9000, (4, 6)).astype(np.float32) if bias else None
    got = reference.grouped_gemm_fp8(
        a, b, OFFSETS, a_scale=a_scale, b_scale=b_scale, bias=shift, out_dtype="float32"
    )
    product = np.zeros((10, 6))
    for row in range(8):
        product[row] = b[EXPERTS[row]].astype(np.float64) @ a[row].astype(np.float64)
        product[row] = rescaled_row(product, row, a_scale, b_scale, shift)
    np.testing.assert_allclose(got, product, rtol=1e-5, atol=0.2)
    assert not got[8:].any()


def test_grouped_gemm_fp8_of_a_part_of_the_rows():
    """Rows in front of the first expert's and behind the last one's are zero, whatever the bias is."""
    rng = np.random.default_rng(SEED)
    a, b = random_fp8(rng, 10, 48), random_fp8(rng, 2, 6, 48)
    offsets, bias = np.array([3, 5, 8], np.int32), np.full((2, 6), 1000, np.float32)
    got = reference.grouped_gemm_fp8(a, b, offsets, bias=bias, out_dtype="float32")
    want = reference.grouped_gemm_fp8(a[3:], b, offsets - 3, bias=bias, out_dtype="float32")
    np.testing.assert_array_equal(got[3:], want)
    assert want[:5].all()
    assert not got[:3].any()


@pytest.mark.parametrize("bits", [False, True])
def test_grouped_gemm_fp8_types(bits):
    rng = np.random.default_rng(SEED)
    a, b = random_fp8(rng, 10, 32), random_fp8(rng, 4, 6, 32)
    exact = reference.grouped_gemm_fp8(a, b, OFFSETS, out_dtype="float32")
    if bits:
        a, b = a.view(np.uint8), b.view(np.uint8)
    got = reference.grouped_gemm_fp8(a, b, OFFSETS)
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, exact.astype(BF16))
    assert np.isinf(reference.grouped_gemm_fp8(a, b, OFFSETS, a_scale=100, out_dtype="float16")).any()
