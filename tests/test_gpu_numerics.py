# SPDX-License-Identifier: Apache-2.0
"""Values at the edge: zeros, tiny and huge rows, saturating scales, NaN and infinity."""

import numpy as np
import pytest
from gpu_cases import (
    ACTIVATIONS,
    DTYPES,
    LAYER_LIMIT,
    WORKSPACE,
    call_repeatedly,
    check_layer,
    cupy,
    make_layer,
    make_routing,
    make_small,
    normal,
    poisoned,
    random_codes,
    relative_error,
    run_layer,
    same_bits,
)

from cupy_moe import Experts

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

MODES = {
    "tensor": {},
    "token": {"per_act_token": True, "kinds": ("(E, n)", "(E, n)")},
    "static": {"a1_scale": 0.01, "a2_scale": 0.02},
}
BAD = 7
"""The token that holds a NaN or an infinity."""


def rows_that_differ(a, b):
    """Numbers of the rows in which two matrices differ in any bit."""
    a, b = (np.ascontiguousarray(x.get()).view(np.uint8) for x in (a, b))
    return np.flatnonzero((a != b).any(axis=1)).tolist()


def with_value(hidden, value):
    """A copy with ``value`` in one place of the token BAD."""
    wide = hidden.astype(np.float32)
    wide[BAD, 3] = value
    return wide.astype(hidden.dtype)


# ---- small numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros(mode, dtype, seed):
    layer, hidden, *call = make_small(seed, dtype=dtype, **MODES[mode])
    keep = np.ones((len(hidden), 1), np.float32)
    keep[[0, 5, 6, -1]] = 0
    hidden = (hidden.astype(np.float32) * cupy.asarray(keep)).astype(hidden.dtype)
    got, _ = check_layer(layer, hidden, *call)
    assert not got.astype(np.float32).get()[keep[:, 0] == 0].any()
    got, _ = check_layer(layer, cupy.zeros_like(hidden), *call)
    assert not got.astype(np.float32).any()


@pytest.mark.parametrize("activation", ["silu", "silu_no_mul", "gelu_no_mul"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_1e_30(mode, dtype, activation, seed):
    layer, hidden, *call = make_small(seed, dtype=dtype, activation=activation, tokens=80, **MODES[mode])
    size = np.ones((80, 1), np.float32)
    size[20:60] = 1e-30
    tiny = (hidden.astype(np.float32) * cupy.asarray(size)).astype(hidden.dtype)
    got, want = check_layer(layer, tiny, *call, out_dtype="float32")
    if mode == "token" and activation != "silu":
        # Not gated, they give results about as small as the input, and are to be as exact as the others.
        assert abs(want[20:60]).max() > 1e-31
        assert relative_error(got[20:60] * np.float32(1e30), want[20:60] * np.float32(1e30)) <= LAYER_LIMIT
    alone = (hidden.astype(np.float32) * np.float32(1e-30)).astype(hidden.dtype)
    got, want = check_layer(layer, alone, *call, out_dtype="float32")
    assert relative_error(got * np.float32(1e30), want * np.float32(1e30)) <= LAYER_LIMIT


# ---- large numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("a1_scale", "a2_scale"),
    [(1e-4, None), (None, 1e-3), (0.01, 1e-3), (1e-4, 1e-6), ("E", None), (None, "E"), (0.01, "E")],
)
def test_saturating_static_scales(a1_scale, a2_scale, dtype, seed):
    per_expert = cupy.asarray([1e-4, 1e-2, 2e-4, 1e-3, 2e-3, 5e-3], np.float32)
    scales = {"a1_scale": a1_scale, "a2_scale": a2_scale}
    scales = {name: per_expert if scale == "E" else scale for name, scale in scales.items()}
    check_layer(*make_small(seed, dtype=dtype, per_act_token=True, **scales))


@pytest.mark.parametrize("hidden_size", [64, 2880, 14336])
@pytest.mark.parametrize("mode", MODES)
def test_largest_codes(hidden_size, mode, seed):
    """Every product of codes is 448 * 448: the largest sums there can be have to fit in between."""
    options = {**MODES[mode], "a2_scale": None}
    layer = make_layer(seed, 4, hidden_size, 256, **options)
    layer["w1"][...] = 0x7E
    layer["w2"][...] = 0x7E
    hidden = cupy.full((40, hidden_size), 500.0, np.float32)
    check_layer(layer, hidden, *make_routing(seed, 40, 2, 4))
    layer["w1"][:, :256] = 0xFE  # negative gates
    check_layer(layer, hidden, *make_routing(seed, 40, 2, 4))


# ---- NaN and infinity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bad_token_per_token(activation, dtype, seed):
    layer, hidden, *call = make_small(seed, activation=activation, dtype=dtype, per_act_token=True)
    clean, _ = check_layer(layer, hidden, *call)
    for value in (np.nan, np.inf, -np.inf):
        got, _ = check_layer(layer, with_value(hidden, value), *call)
        assert set(rows_that_differ(got, clean)) <= {BAD}
        row = got.astype(np.float32).get()[BAD]
        assert np.isnan(row).all() if np.isnan(value) else np.isfinite(row).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["tensor", "static"])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_bad_token_per_tensor(mode, dtype, weight_on_input, seed):
    layer, hidden, *call = make_small(seed, dtype=dtype, apply_router_weight_on_input=weight_on_input, **MODES[mode])
    clean, _ = check_layer(layer, hidden, *call)
    for value in (np.nan, np.inf, -np.inf):
        got, _ = check_layer(layer, with_value(hidden, value), *call)
        finite = np.isfinite(got.astype(np.float32).get()).all(axis=1)
        assert np.flatnonzero(~finite).tolist() == ([BAD] if np.isnan(value) else [])
        if mode == "static":
            assert set(rows_that_differ(got, clean)) <= {BAD}


@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_huge_token_per_token(value, seed):
    """Intermediates may overflow: only in the token itself."""
    layer, hidden, *call = make_small(seed, dtype="float32", per_act_token=True)
    clean, _ = check_layer(layer, hidden, *call)
    experts = Experts(**layer, workspace=WORKSPACE)
    huge = hidden.copy()
    huge[BAD] = cupy.clip(huge[BAD] * np.float32(value / 4), -3e38, 3e38)
    got = call_repeatedly(lambda out: experts(huge, *call, out), poisoned(huge.shape, "float32"))
    assert rows_that_differ(got, clean) == [BAD]


@pytest.mark.parametrize("per_row", ["(E,)", "(E, n)"])
@pytest.mark.parametrize("bias", [None, "float32"])
@pytest.mark.parametrize("name", ["a1_scale", "a2_scale"])
def test_huge_scale(name, per_row, bias, seed):
    """All codes in front of a GEMM are zero; their scale times what 1 in its product stands for would overflow."""
    layer, hidden, *call = make_small(seed, dtype="float32", hidden=256, kinds=(per_row, per_row), bias=bias)
    for scale in (1e36, cupy.asarray([1e36], np.float32)):
        got, want = check_layer({**layer, name: scale}, hidden, *call)
        assert bool(want.any()) == (bias is not None)
        assert np.isfinite(got.get()).all()


@pytest.mark.parametrize("kinds", [("(E,)", "(E,)"), ("(E, n)", "(E, n)")])
@pytest.mark.parametrize("activation", ["silu", "gelu_no_mul"])
def test_huge_token_per_tensor(activation, kinds, seed):
    """Beside it the codes of all other tokens are zero, whatever becomes of its own."""
    layer, hidden, *call = make_small(
        seed, dtype="float32", hidden=256, kinds=kinds, activation=activation, bias="float32", a2_scale=0.02
    )
    got, want = run_layer(layer, with_value(hidden, 3e38), *call)
    got, want = (np.delete(x.get(), BAD, axis=0) for x in (got, want))
    assert want.any()
    assert np.linalg.norm(got - want) <= LAYER_LIMIT * np.linalg.norm(want)


@pytest.mark.parametrize("mode", ["tensor", "token"])
@pytest.mark.parametrize("weights", [(2.0, 3.0), (2.0, 0.5), (np.inf, 0.5), (np.nan, 2.0)])
@pytest.mark.parametrize("tokens", [3, 700])  # one launch, or one that looks for the maximum in front
def test_weights_that_overflow(weights, tokens, mode, seed):
    """What they make infinite is not the maximum: that is the largest finite product of an element and a weight."""
    layer, hidden, topk_weights, ids = make_small(
        seed, tokens=tokens, topk=2, hidden=256, dtype="float32", apply_router_weight_on_input=True, **MODES[mode]
    )
    hidden[1] *= np.float32(10.0)
    hidden[1, 5] = np.float32(3e38)
    topk_weights[1] = cupy.asarray(weights, np.float32)
    got, want = (np.delete(x.get(), 1, axis=0) for x in run_layer(layer, hidden, topk_weights, ids))
    assert want.any() == (mode == "token" or weights[1] != 0.5), "where 1.5e38 counts, the others are zero beside it"
    assert np.linalg.norm(got - want) <= LAYER_LIMIT * np.linalg.norm(want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_nan_router_weight(mode, weight_on_input, seed):
    layer, hidden, weights, ids = make_small(seed, apply_router_weight_on_input=weight_on_input, **MODES[mode])
    weights[BAD, 1] = np.nan
    got, _ = check_layer(layer, hidden, weights, ids)
    finite = np.isfinite(got.astype(np.float32).get()).all(axis=1)
    assert np.flatnonzero(~finite).tolist() == [BAD]


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_fp8_hidden_states(mode, seed):
    options = {**MODES[mode], "a1_scale": 0.01}
    layer, hidden, *call = make_small(seed, **options)
    codes = random_codes(seed, hidden.shape)
    clean, _ = check_layer(layer, codes, *call)
    codes[BAD, 100] = 0xFF
    got, _ = check_layer(layer, codes, *call)
    assert BAD in rows_that_differ(got, clean)
    if mode != "tensor":
        assert rows_that_differ(got, clean) == [BAD]


@pytest.mark.parametrize("mode", MODES)
def test_batched_ignores_padding(mode, seed):
    """Whatever lies behind an expert's last token, the results are the same to the bit."""
    layer = make_layer(seed, 4, 128, 256, **MODES[mode])
    experts = Experts(**layer, workspace=WORKSPACE)
    tokens = cupy.asarray([20, 0, 7, 31], np.int32)
    valid = (cupy.arange(32)[None, :] < tokens[:, None])[:, :, None]
    hidden, results = normal(seed, (4, 32, 128)), []
    for padding in (0.0, 1e30, np.inf, np.nan):
        filled = cupy.where(valid, hidden, np.float32(padding))
        out = call_repeatedly(lambda out, x=filled: experts.batched(x, tokens, out), poisoned(hidden.shape, "float32"))
        results.append(out)
        assert same_bits(out, results[0])
