# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of a call, of `batched` and of `fused_experts`, and what `validate` finds."""

import ml_dtypes
import numpy as np
import pytest
from rejections import assert_rejected

from cupy_moe import Experts, fused_experts, validation

M, K, N, E, TOPK, MAX_TOKENS = 7, 32, 16, 4, 2, 5
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
LAYER = {
    "w1": np.zeros((E, 2 * N, K), FP8),
    "w2": np.zeros((E, K, N), FP8),
    "w1_scale": np.ones(E, np.float32),
    "w2_scale": np.ones(E, np.float32),
}
CALL = {
    "hidden_states": np.ones((M, K), np.float32),
    "topk_weights": np.ones((M, TOPK), np.float32),
    "topk_ids": np.zeros((M, TOPK), np.int32),
}
PADDED = {
    "hidden_states": np.ones((E, MAX_TOKENS, K), np.float32),
    "expert_num_tokens": np.array([0, 5, 2, 1], np.int32),
}
LONGER = np.ones((M + 1, 1), np.float32)
FP8_HIDDEN, FP8_PADDED = np.zeros((M, K), FP8), np.zeros((E, MAX_TOKENS, K), FP8)


def floats(*shape):
    return np.ones(shape, np.float32)


def call(options):
    return Experts(**LAYER)(**options)


def batched(options):
    return Experts(**LAYER).batched(**options)


def fused(options):
    return fused_experts(**LAYER | options)


def read_only(*shape):
    array = floats(*shape)
    array.flags.writeable = False
    return array


FLOATS = "float16 or bfloat16 or float32"
ROWS = ("contiguous rows", "strides", "ascontiguousarray")
CONTIGUOUS = ("C-contiguous", "strides", "ascontiguousarray")
PER_TOKEN = ("(1,)", f"({M}, 1)")

# what changes, the argument that the message names, exception, what the message contains
WRONG_CALLS = [
    ({"hidden_states": [[0.0] * K] * M}, "hidden_states", TypeError, ("numpy array", "got list")),
    ({"hidden_states": np.ones((M, K))}, "hidden_states", TypeError, (FLOATS, "uint8", "got float64")),
    ({"hidden_states": np.ones((M, K), np.int32)}, "hidden_states", TypeError, (FLOATS, "got int32")),
    ({"hidden_states": floats(K)}, "hidden_states", ValueError, (f"(M, {K})", f"got ({K},)")),
    ({"hidden_states": floats(1, M, K)}, "hidden_states", ValueError, (f"(M, {K})", f"got (1, {M}, {K})")),
    ({"hidden_states": floats(M, K - 1)}, "hidden_states", ValueError, (f"(M, {K})", f"got ({M}, {K - 1})")),
    ({"hidden_states": floats(K, M).T}, "hidden_states", ValueError, ROWS),
    ({"hidden_states": floats(M, 2 * K)[:, ::2]}, "hidden_states", ValueError, ROWS),
    ({"hidden_states": floats(M, K)[::-1]}, "hidden_states", ValueError, ROWS),
    ({"hidden_states": np.broadcast_to(floats(K), (M, K))}, "hidden_states", ValueError, ROWS),
    ({"topk_ids": None}, "topk_ids", TypeError, ("numpy array", "got NoneType")),
    ({"topk_ids": np.zeros((M, TOPK), np.int16)}, "topk_ids", TypeError, ("int32 or int64", "got int16")),
    ({"topk_ids": np.zeros((M, TOPK), np.uint32)}, "topk_ids", TypeError, ("int32 or int64", "got uint32")),
    ({"topk_ids": floats(M, TOPK)}, "topk_ids", TypeError, ("int32 or int64", "got float32")),
    ({"topk_ids": np.zeros(M, np.int32)}, "topk_ids", ValueError, (f"({M}, topk)", f"got ({M},)")),
    ({"topk_ids": np.zeros((M + 1, 2), np.int32)}, "topk_ids", ValueError, (f"({M}, topk)", f"got ({M + 1}, 2)")),
    ({"topk_ids": np.zeros((2, M), np.int32).T}, "topk_ids", ValueError, CONTIGUOUS),
    (
        {"topk_ids": np.zeros((M, 0), np.int32), "topk_weights": floats(M, 0)},
        "topk_ids", ValueError, ("at least one expert", f"({M}, 0)"),
    ),
    ({"topk_weights": np.ones((M, TOPK), np.float16)}, "topk_weights", TypeError, ("float32", "got float16")),
    ({"topk_weights": np.ones((M, TOPK))}, "topk_weights", TypeError, ("float32", "got float64")),
    ({"topk_weights": floats(M, TOPK + 1)}, "topk_weights", ValueError, (f"({M}, {TOPK})", f"got ({M}, {TOPK + 1})")),
    ({"topk_weights": floats(TOPK, M)}, "topk_weights", ValueError, (f"({M}, {TOPK})", f"got ({TOPK}, {M})")),
    ({"topk_weights": floats(TOPK, M).T}, "topk_weights", ValueError, CONTIGUOUS),
    ({"topk_weights": 1.0}, "topk_weights", TypeError, ("numpy array", "got float")),
    # the scale of fp8 hidden states
    ({"hidden_states": FP8_HIDDEN}, "a1_scale", ValueError, (f"({M}, 1)", "fp8 hidden_states", "got None")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": floats(M)}, "a1_scale", ValueError, (*PER_TOKEN, f"got ({M},)")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": floats(1, M)}, "a1_scale", ValueError, (*PER_TOKEN, f"got (1, {M})")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": LONGER}, "a1_scale", ValueError, (*PER_TOKEN, f"got ({M + 1}, 1)")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": floats(E)}, "a1_scale", ValueError, (*PER_TOKEN, f"got ({E},)")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": floats(M, 2)[:, :1]}, "a1_scale", ValueError, CONTIGUOUS),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": np.ones((M, 1))}, "a1_scale", TypeError, ("float32", "got float64")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": -1.0}, "a1_scale", ValueError, ("a positive scale, from", "got -1.0")),
    ({"hidden_states": FP8_HIDDEN, "a1_scale": "1"}, "a1_scale", TypeError, ("number or an array", "got '1'")),
    # the result
    ({"out": floats(M, K + 1)}, "out", ValueError, (f"({M}, {K})", f"got ({M}, {K + 1})")),
    ({"out": floats(M + 1, K)}, "out", ValueError, (f"({M}, {K})", f"got ({M + 1}, {K})")),
    ({"out": np.ones((M, K))}, "out", TypeError, (FLOATS, "got float64")),
    ({"out": np.ones((M, K), np.uint8)}, "out", TypeError, (FLOATS, "got uint8")),
    ({"out": floats(K, M).T}, "out", ValueError, ROWS),
    ({"out": np.lib.stride_tricks.as_strided(floats(2 * K), (M, K), (4, 4))}, "out", ValueError, ROWS),
    ({"out": read_only(M, K)}, "out", ValueError, ("written to", "read-only")),
    ({"out": "float32"}, "out", TypeError, ("numpy array", "got str")),
]


def names(cases):
    def name(value):
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else str(value)[:20]

    return [" ".join(f"{key}={name(value)}" for key, value in changes.items()) for changes, *_ in cases]


@pytest.mark.parametrize("run", [call, fused])
@pytest.mark.parametrize(("changes", "name", "kind", "parts"), WRONG_CALLS, ids=names(WRONG_CALLS))
def test_wrong_call(run, changes, name, kind, parts):
    assert_rejected(kind, name, parts, run, CALL | changes)


WRONG_BATCHED = [
    ({"hidden_states": floats(M, K)}, "hidden_states", ValueError, ("(4, max_tokens, 32)", "got (7, 32)")),
    ({"hidden_states": floats(E + 1, 5, K)}, "hidden_states", ValueError, ("(4, max_tokens, 32)", "(5, 5, 32)")),
    ({"hidden_states": floats(E, MAX_TOKENS, 2 * K)[..., :K]}, "hidden_states", ValueError, CONTIGUOUS),
    ({"hidden_states": np.ones((E, MAX_TOKENS, K))}, "hidden_states", TypeError, (FLOATS, "got float64")),
    ({"expert_num_tokens": np.zeros(E + 1, np.int32)}, "expert_num_tokens", ValueError, (f"({E},)", f"got ({E + 1},)")),
    ({"expert_num_tokens": np.zeros((E, 1), np.int32)}, "expert_num_tokens", ValueError, (f"({E},)", f"got ({E}, 1)")),
    ({"expert_num_tokens": floats(E)}, "expert_num_tokens", TypeError, ("int32 or int64", "got float32")),
    ({"expert_num_tokens": [0] * E}, "expert_num_tokens", TypeError, ("numpy array", "got list")),
    ({"expert_num_tokens": np.zeros(2 * E, np.int32)[::2]}, "expert_num_tokens", ValueError, CONTIGUOUS),
    ({"hidden_states": FP8_PADDED}, "a1_scale", ValueError, (f"({E}, {MAX_TOKENS}, 1)", "got None")),
    (
        {"hidden_states": FP8_PADDED, "a1_scale": floats(E, MAX_TOKENS)},
        "a1_scale", ValueError, (f"({E}, {MAX_TOKENS}, 1)", f"got ({E}, {MAX_TOKENS})"),
    ),
    (
        {"hidden_states": FP8_PADDED, "a1_scale": floats(E * MAX_TOKENS, 1)},
        "a1_scale", ValueError, (f"({E}, {MAX_TOKENS}, 1)", f"got ({E * MAX_TOKENS}, 1)"),
    ),
    ({"hidden_states": FP8_PADDED, "a1_scale": floats(E)}, "a1_scale", ValueError, ("(4, 5, 1)", "got (4,)")),
    ({"a1_scale": 1.0}, "a1_scale", ValueError, ("expected None", "float32", "got float")),
    ({"out": floats(E, MAX_TOKENS + 1, K)}, "out", ValueError, (f"({E}, {MAX_TOKENS}, {K})", "got (4, 6, 32)")),
    ({"out": floats(E, MAX_TOKENS, 2 * K)[..., :K]}, "out", ValueError, CONTIGUOUS),
    ({"out": read_only(E, MAX_TOKENS, K)}, "out", ValueError, ("written to", "read-only")),
]


@pytest.mark.parametrize(("changes", "name", "kind", "parts"), WRONG_BATCHED, ids=names(WRONG_BATCHED))
def test_wrong_batched(changes, name, kind, parts):
    assert_rejected(kind, name, parts, batched, PADDED | changes)


def test_what_the_tests_start_from_is_right():
    for run, options, shape in ((call, CALL, (M, K)), (fused, CALL, (M, K)), (batched, PADDED, (E, MAX_TOKENS, K))):
        assert run(options).shape == shape
    for scale in (0.5, floats(), floats(1), floats(M, 1)):
        assert call(CALL | {"hidden_states": FP8_HIDDEN, "a1_scale": scale}).dtype == BF16
    for scale in (0.5, floats(), floats(1), floats(E, MAX_TOKENS, 1)):
        assert batched(PADDED | {"hidden_states": FP8_PADDED, "a1_scale": scale}).dtype == BF16
    call(CALL | {"out": floats(M, 2 * K)[:, :K]})


def test_layer_scales_that_do_not_fit_the_call():
    per_expert, per_token = Experts(**LAYER, a1_scale=floats(E)), Experts(**LAYER, a1_scale=floats(M, 1))
    codes = CALL | {"hidden_states": FP8_HIDDEN}
    assert_rejected(ValueError, "a1_scale", (*PER_TOKEN, f"got ({E},)"), per_expert, **codes)
    assert_rejected(ValueError, "a1_scale", (f"({E},)", "float32", f"got ({M}, 1)"), per_token, **CALL)
    # M == E: one scale per token is a column, so a row of M scales stays one per expert and is refused
    four = {name: x[:E] for name, x in CALL.items()}
    assert per_expert(**four).shape == (E, K)
    four["hidden_states"] = FP8_HIDDEN[:E]
    assert_rejected(ValueError, "a1_scale", (f"({E}, 1)", f"got ({E},)"), per_expert, **four)


def test_a1_scale_of_a_call_belongs_to_fp8():
    options = CALL | {"a1_scale": floats(1)}
    assert_rejected(ValueError, "a1_scale", ("expected None", "float32", "got ndarray"), call, options)


def test_batch_invariant_takes_no_dynamic_scale_per_tensor():
    options = {"a2_scale": 0.5, "batch_invariant": True}
    layer = Experts(**LAYER, **options)
    parts = ("static scale", "per_act_token=True", "fp8 hidden_states", "batch_invariant=True", "got None")
    assert_rejected(ValueError, "a1_scale", parts, layer, **CALL)
    assert_rejected(ValueError, "a1_scale", parts, layer.batched, **PADDED)
    assert_rejected(ValueError, "a1_scale", parts, fused, CALL | options)
    assert_rejected(ValueError, "a2_scale", parts[:2], fused, CALL | options | {"a1_scale": 0.5, "a2_scale": None})
    for scale in (0.5, floats(M, 1)):
        assert layer(**CALL | {"hidden_states": FP8_HIDDEN}, a1_scale=scale).shape == (M, K)
        assert fused(CALL | options | {"hidden_states": FP8_HIDDEN, "a1_scale": scale}).shape == (M, K)
    for right in ({"a1_scale": 0.5}, {"per_act_token": True}, {"per_act_token": True, "a2_scale": None}):
        assert fused(CALL | options | right).shape == (M, K)


def test_out_has_the_dtype_asked_for():
    layer = Experts(**LAYER, out_dtype="float16")
    assert_rejected(TypeError, "out", ("expected float16;", "got float32"), layer, **CALL, out=floats(M, K))
    assert_rejected(TypeError, "out", ("expected float16;", "got bfloat16"), layer.batched, **PADDED,
                    out=np.ones((E, MAX_TOKENS, K), BF16))


def test_no_router_weight_in_the_padded_form():
    layer = Experts(**LAYER, apply_router_weight_on_input=True)
    assert_rejected(ValueError, "apply_router_weight_on_input", ("False", "got True"), layer.batched, **PADDED)


FUSED_WRONG = [
    ("w1", np.zeros((E, 2 * N + 1, K), FP8), ValueError, ("even", f"({E}, {2 * N + 1}, {K})")),
    ("w2", np.zeros((E, N, K), FP8), ValueError, (f"({E}, {K}, {N})", f"got ({E}, {N}, {K})")),
    ("w1_scale", None, ValueError, ("float32", "(E,)", "got None")),
    ("w2_scale", floats(K), ValueError, (f"({E}, {K})", f"got ({K},)")),
    ("a1_scale", floats(M, 1), ValueError, (f"({E},)", f"got ({M}, 1)")),
    ("a2_scale", float("nan"), ValueError, ("a positive scale, from", "got nan")),
    ("w1_bias", floats(E, N), ValueError, (f"({E}, {2 * N})", f"got ({E}, {N})")),
    ("expert_map", np.zeros(8, np.int64), TypeError, ("int32", "got int64")),
    ("activation", "swish", ValueError, ("'silu'", "got 'swish'")),
    ("out_dtype", "double", ValueError, ("'float32'", "got 'double'")),
    ("backend", "cuda", ValueError, ("'cublaslt'", "got 'cuda'")),
    ("validate", 1, TypeError, ("True or False", "got 1")),
    ("batch_invariant", "yes", TypeError, ("True or False", "got 'yes'")),
    ("per_act_token", "yes", TypeError, ("True or False", "got 'yes'")),
]


@pytest.mark.parametrize(("name", "value", "kind", "parts"), FUSED_WRONG, ids=[case[0] for case in FUSED_WRONG])
def test_wrong_option_of_fused_experts(name, value, kind, parts):
    assert_rejected(kind, name, parts, fused, CALL | {name: value})


@pytest.mark.parametrize("name", ["hidden_states", "topk_weights", "topk_ids", "out", "a1_scale"])
def test_mixed_kinds_in_a_call(name):
    torch = pytest.importorskip("torch")
    options = CALL | {"hidden_states": FP8_HIDDEN.view(np.uint8), "out": floats(M, K), "a1_scale": floats(1)}
    options[name] = torch.from_numpy(options[name])
    for run in (call, fused):
        assert_rejected(TypeError, name, ("a numpy array like the other", "got a torch array"), run, options)


@pytest.mark.parametrize("name", ["hidden_states", "expert_num_tokens", "out"])
def test_mixed_kinds_in_batched(name):
    torch = pytest.importorskip("torch")
    options = PADDED | {"out": floats(E, MAX_TOKENS, K)}
    options[name] = torch.from_numpy(options[name])
    assert_rejected(TypeError, name, ("a numpy array like the other", "got a torch array"), batched, options)


def changed(x, index, value):
    x = x.copy()
    x[index] = value
    return x


IDS = CALL["topk_ids"]


@pytest.mark.parametrize(("token", "wrong"), [(3, E), (0, -1), (M - 1, 2**31 - 1)])
def test_validate_finds_bad_ids(token, wrong):
    options = CALL | {"topk_ids": changed(IDS, (token, 1), wrong)}
    assert call(options).shape == (M, K)  # defined without: such an id adds nothing
    parts = (f"from 0 to {E - 1}", f"token {token} has [0, {wrong}]")
    assert_rejected(ValueError, "topk_ids", parts, Experts(**LAYER, validate=True), **options)
    assert_rejected(ValueError, "topk_ids", parts, fused, options | {"validate": True})


def test_validate_takes_the_range_of_ids_from_the_map():
    layer = Experts(**LAYER, validate=True, expert_map=np.array([-1, 0, 1, -1, 2, 3], np.int32))
    options = CALL | {"topk_ids": changed(IDS, (2, 0), 5)}
    assert layer(**options).shape == (M, K)
    options["topk_ids"] = changed(IDS, (2, 0), 6)
    assert_rejected(ValueError, "topk_ids", ("from 0 to 5", "token 2 has [6, 0]"), layer, **options)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, FP8])
def test_validate_finds_what_is_not_finite(dtype):
    layer = Experts(**LAYER, validate=True)
    scale = {"a1_scale": 1.0} if dtype == FP8 else {}
    hidden = np.full((M, K), 448, dtype)
    assert layer(**CALL | {"hidden_states": hidden} | scale).shape == (M, K)
    for value in (np.nan,) if dtype == FP8 else (np.nan, np.inf, -np.inf):
        options = CALL | {"hidden_states": changed(hidden, (4, K - 1), value)} | scale
        assert_rejected(ValueError, "hidden_states", ("finite", "token 4"), layer, **options)


def test_validate_accepts_no_tokens():
    assert Experts(**LAYER, validate=True)(**{name: x[:0] for name, x in CALL.items()}).shape == (0, K)


def test_validation_of_the_padded_form():
    hidden, counts = PADDED.values()
    spec = Experts(**LAYER)._spec
    validation.check_padded(spec, changed(hidden, (1, 0, 0), 1), counts)
    validation.check_padded(spec, changed(hidden, (2, 2, 0), np.nan), counts)  # behind the last token
    for wrong in (-1, MAX_TOKENS + 1):
        parts = (f"0 to {MAX_TOKENS}", f"expert 2 has {wrong}")
        counted = changed(counts, 2, wrong)
        assert_rejected(ValueError, "expert_num_tokens", parts, validation.check_padded, spec, hidden, counted)
    bad = changed(hidden, (2, 1, 3), np.inf)
    parts = ("finite", "token 1 of expert 2")
    assert_rejected(ValueError, "hidden_states", parts, validation.check_padded, spec, bad, counts)
    assert_rejected(ValueError, "hidden_states", parts, Experts(**LAYER, validate=True).batched, bad, counts)
