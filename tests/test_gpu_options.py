# SPDX-License-Identifier: Apache-2.0
"""Every option of the layer on small shapes, crossed where options meet in one kernel."""

import os

import numpy as np
import pytest
from gpu_cases import (
    ACTIVATIONS,
    DTYPES,
    LAYER_LIMIT,
    SCHEMES,
    W1_KINDS,
    W2_KINDS,
    WORKSPACE,
    call_repeatedly,
    check_layer,
    cupy,
    make_layer,
    make_routing,
    make_small,
    normal,
    poison,
    poisoned,
    random_codes,
    relative_error,
    same_bits,
)

import cupy_moe
from cupy_moe import Experts, backend, fused_experts, gemms, reference
from cupy_moe.grouped_gemm import GroupedGemm

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]


def static(kind, middle, experts=6):
    """A static scale of activations around ``middle``."""
    if kind in (None, "number"):
        return None if kind is None else middle
    values = np.float32(middle) * np.linspace(0.7, 1.3, experts, dtype=np.float32) if kind == "(E,)" else [middle]
    return cupy.asarray(values, np.float32).reshape({"()": (), "(1, 1)": (1, 1)}.get(kind, -1))


# ---- scales, activations, bias ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_act_token", [False, True])
@pytest.mark.parametrize("w1_kind", W1_KINDS)
@pytest.mark.parametrize("w2_kind", W2_KINDS)
def test_weight_scales(w1_kind, w2_kind, per_act_token, seed):
    check_layer(*make_small(seed, kinds=(w1_kind, w2_kind), per_act_token=per_act_token))


@pytest.mark.parametrize("per_act_token", [False, True])
@pytest.mark.parametrize("a1_kind", [None, "number", "()", "(1,)", "(E,)"])
@pytest.mark.parametrize("a2_kind", [None, "number", "()", "(1,)", "(E,)"])
def test_activation_scales(a1_kind, a2_kind, per_act_token, seed):
    scales = {"a1_scale": static(a1_kind, 0.01), "a2_scale": static(a2_kind, 0.02)}
    check_layer(*make_small(seed, per_act_token=per_act_token, **scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, seed):
    kind = "(E,)" if activation.endswith("no_mul") else "(E, 2)"
    check_layer(*make_small(seed, activation=activation, dtype=dtype, kinds=(kind, "(E, n)")))
    check_layer(*make_small(seed, activation=activation, dtype=dtype, per_act_token=True))


@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ["swigluoai", "relu2_no_mul"])
def test_bias(bias, scheme, activation, seed):
    case = make_small(seed, activation=activation, bias=bias, **SCHEMES[scheme])
    check_layer(*case)
    if bias == "float32":
        for name in ("w1_bias", "w2_bias"):
            check_layer({key: value for key, value in case[0].items() if key != name}, *case[1:])


@pytest.mark.parametrize("kind", ["number", "()", "(1,)", "(1, 1)", "(M, 1)"])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_fp8_hidden_states(kind, weight_on_input, seed):
    layer, hidden, *call = make_small(seed, per_act_token=True, apply_router_weight_on_input=weight_on_input)
    hidden = random_codes(seed, hidden.shape)
    scale = abs(normal(seed, (len(hidden), 1))) * 0.005 + 0.005 if kind == "(M, 1)" else static(kind, 0.01)
    got, _ = check_layer(layer, hidden, *call, a1_scale=scale)
    assert got.dtype == DTYPES["bfloat16"]
    again, _ = check_layer({**layer, "a1_scale": scale}, hidden, *call)  # the layer's instead of the call's
    assert same_bits(got, again)
    hidden[7, 3] = 0x7F
    check_layer(layer, hidden, *call, a1_scale=scale, out_dtype="float32")


# ---- routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, "static", "expert", "fp8"])
@pytest.mark.parametrize("topk", [1, 4])
def test_router_weight_on_input(scheme, topk, seed):
    options = dict(SCHEMES.get(scheme, {}))
    if scheme in ("static", "expert"):
        options["a1_scale"] = static("(E,)" if scheme == "expert" else "number", 0.007)
    layer, hidden, weights, ids = make_small(seed, topk=topk, hidden=1024, apply_router_weight_on_input=True, **options)
    weights[::5] *= -1
    if scheme == "fp8":
        hidden = random_codes(seed, hidden.shape)
    a1_scale = 0.01 if scheme == "fp8" else None
    got, _ = check_layer(layer, hidden, weights, ids, a1_scale=a1_scale)
    layer["apply_router_weight_on_input"] = False
    assert not same_bits(got, check_layer(layer, hidden, weights, ids, a1_scale=a1_scale)[0])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ids_of_no_expert(dtype, mapped, weight_on_input, scheme, seed):
    options = {"apply_router_weight_on_input": weight_on_input, **SCHEMES[scheme]}
    if mapped:
        options["expert_map"] = cupy.asarray([3, -1, 0, 9, 5, 2, -1, 1, 6, 4], np.int32)  # 6 and 9 are no experts
    layer, hidden, *_ = make_small(seed, tokens=300, **options)
    weights, ids = make_routing(seed, 300, 3, 10 if mapped else 6, "wild", dtype)
    ids[17] = -1
    got, _ = check_layer(layer, hidden, weights, ids)
    local = reference.route(ids, 6, expert_map=options.get("expert_map")).src2dst_map
    idle = (local < 0).all(axis=1)
    assert idle.sum() > 1
    assert not (idle[:, None] & (got.astype(np.float32) != 0)).any()
    weights = cupy.where(local < 0, np.float32(np.nan), weights)  # adds nothing all the same
    assert same_bits(check_layer(layer, hidden, weights, ids)[0], got)
    ids[:] = -1
    assert not check_layer(layer, hidden, weights, ids)[0].astype(np.float32).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "one"])
@pytest.mark.parametrize(("tokens", "topk", "experts"), [(0, 2, 8), (300, 1, 5), (40, 9, 3), (2, 1, 64), (90, 2, 1)])
def test_routing(tokens, topk, experts, routing, scheme, seed):
    """No tokens, one expert per token, the same expert often in one token, most experts idle, one expert in all."""
    inner = 8192 if tokens == 2 else 512
    check_layer(*make_small(
        seed, tokens=tokens, topk=topk, experts=experts, routing=routing, inner=inner, **SCHEMES[scheme]
    ))


# ---- sizes, memory layout, result ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ["silu", "gelu_no_mul"])
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (37, 19), (100, 72), (136, 200), (129, 255), (2887, 1)])
def test_sizes_that_are_no_multiples_of_16(hidden, inner, activation, scheme, seed):
    tokens = 4000 if inner == 1 else 700
    options = {"activation": activation, "bias": "float32", **SCHEMES[scheme]}
    check_layer(*make_small(seed, tokens=tokens, hidden=hidden, inner=inner, **options))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_arrays(dtype, scheme, seed):
    """Every array starts one element after an aligned address."""

    def shifted(x):
        buffer = cupy.empty(x.nbytes + x.itemsize, np.uint8)
        buffer[x.itemsize :] = x.reshape(-1).view(np.uint8)
        return buffer[x.itemsize :].view(x.dtype).reshape(x.shape)

    layer, hidden, *call = make_small(seed, dtype=dtype, bias=dtype, **SCHEMES[scheme])
    aligned, _ = check_layer(layer, hidden, *call)
    moved = {name: shifted(x) if isinstance(x, cupy.ndarray) else x for name, x in layer.items()}
    experts = Experts(**moved, workspace=WORKSPACE)
    out = shifted(aligned)
    assert out.data.ptr % 16
    experts(hidden, *call)  # the same call but for the addresses
    call_repeatedly(lambda out: experts(shifted(hidden), *map(shifted, call), out), out)
    assert relative_error(out, aligned) <= LAYER_LIMIT
    for part in ("w1", "w1_scale", "w1_bias", "w2_bias"):  # one at a time: the others can be read as vectors
        check_layer({**layer, part: moved[part]}, hidden, *call)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart(dtype, scheme, seed):
    layer, hidden, *call = make_small(seed, dtype=dtype, **SCHEMES[scheme])
    packed, _ = check_layer(layer, hidden, *call)
    experts = Experts(**layer, workspace=WORKSPACE)
    word = f"u{hidden.itemsize}"
    for first, step, extra in ((0, 1, 8), (8, 2, 72), (3, 1, 4)):
        wide, wide_out = (poisoned((step * len(hidden), hidden.shape[1] + extra), dtype) for _ in range(2))
        place = slice(None, None, step), slice(first, first + hidden.shape[1])
        wide.view(word)[place] = hidden.view(word)
        experts(wide[place], *call, wide_out[place])
        assert same_bits(cupy.ascontiguousarray(wide_out.view(word)[place]), packed.view(word))
        left = wide_out.view(np.uint8).sum(dtype=np.int64) - packed.view(np.uint8).sum(dtype=np.int64)
        assert int(left) == 255 * (wide_out.nbytes - packed.nbytes), "wrote between the rows"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [3, 65, 300, 2100])
def test_result_in_place_of_the_hidden_states(tokens, scheme, seed):
    """As one layer follows another: each call reads what the one before has written."""
    layer, hidden, *call = make_small(seed, tokens=tokens, **SCHEMES[scheme])
    experts, chained, x = Experts(**layer, workspace=WORKSPACE), hidden, hidden.copy()
    for _ in range(5):
        chained = experts(chained, *call)
        assert experts(x, *call, x) is x
    assert same_bits(x, chained)


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8"])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
def test_result_dtypes(dtype, out_dtype, seed):
    layer, hidden, *call = make_small(seed, hidden=1024, dtype="float32" if dtype == "uint8" else dtype)
    if dtype == "uint8":
        hidden, layer["a1_scale"] = random_codes(seed, hidden.shape), 0.01
    natural = "bfloat16" if dtype == "uint8" else dtype
    got, _ = check_layer(layer, hidden, *call, out_dtype=out_dtype)
    assert got.dtype == DTYPES[out_dtype or natural]
    made = Experts(**layer, out_dtype=out_dtype)(hidden, *call)
    assert same_bits(made, got)
    assert same_bits(fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], out_dtype=out_dtype, **layer), got)


# ---- the padded form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(3, 0, 40, 1, 39, 17), (40,) * 6, (0,) * 6, (0, 0, 0, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, "static", "fp8", "fp8 per token"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_batched(counts, scheme, dtype, seed):
    options = dict(SCHEMES.get(scheme, {"a1_scale": 0.01, "a2_scale": static("(E,)", 0.02)}))
    layer = make_layer(seed, 6, 128, 256 if sum(counts) > 1 else 8192, bias="bfloat16", **options)
    hidden, call_scale = normal(seed, (6, 40, 128), "bfloat16"), None
    if scheme.startswith("fp8"):
        del layer["a1_scale"]
        hidden = random_codes(seed, (6, 40, 128))
        call_scale = 0.01 if scheme == "fp8" else abs(normal(seed, (6, 40, 1))) * 0.005 + 0.005
    valid = (cupy.arange(40)[None, :] < cupy.asarray(counts)[:, None])[:, :, None]
    hidden.view(np.uint8)[...] = cupy.where(valid, hidden.view(np.uint8), 0xFF)  # NaN behind an expert's last token
    tokens = cupy.asarray(counts, dtype)
    experts = Experts(**layer, workspace=WORKSPACE)
    out = call_repeatedly(
        lambda out: experts.batched(hidden, tokens, out, a1_scale=call_scale), poisoned(hidden.shape, "bfloat16")
    )
    if call_scale is not None:
        layer["a1_scale"] = call_scale
    want = reference.batched(hidden, tokens, out_dtype="float32", **layer)
    assert relative_error(cupy.where(valid, out.astype(np.float32), 0), want) <= LAYER_LIMIT
    assert (valid | (out.view(np.uint8) == 0xFF)).all(), "wrote behind an expert's last token"


def test_batched_sizes(seed):
    layer = make_layer(seed, 3, 100, 72, per_act_token=True)
    experts = Experts(**layer)
    for max_tokens in (0, 1, 5, 333):
        hidden = normal(seed, (3, max_tokens, 100), "float16")
        tokens = cupy.asarray([max_tokens, max_tokens // 2, 2**31 - 1], np.int32)  # more than fit: all that fit
        got = experts.batched(hidden, tokens)
        assert got.shape == hidden.shape
        if max_tokens == 333:
            want = reference.batched(hidden, tokens, out_dtype="float32", **layer)
            valid = (cupy.arange(max_tokens)[None, :] < tokens[:, None])[:, :, None]
            assert relative_error(cupy.where(valid, got.astype(np.float32), 0), want) <= LAYER_LIMIT


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 65, 222])
def test_packed(scheme, tokens, seed, monkeypatch):
    """What GEMM 1 leaves where it is much, here where it is little: routing with gaps, and rows in the padded form."""
    monkeypatch.setattr(gemms, "PACKED_ROWS", {"tensor": 0, "token": 0})
    layer, hidden, *call = make_small(seed, tokens=tokens, inner=2040, routing="wild", **SCHEMES[scheme])
    check_layer(layer, hidden, *call)
    counts = cupy.asarray([0, tokens, 1, 0, tokens // 2, tokens], np.int32)
    padded = normal(seed, (6, tokens, 128), "bfloat16")
    valid = (cupy.arange(tokens)[None, :] < counts[:, None])[:, :, None]
    experts = Experts(**layer, workspace=WORKSPACE)
    out = call_repeatedly(lambda out: experts.batched(padded, counts, out), poisoned(padded.shape, "bfloat16"))
    want = reference.batched(padded, counts, out_dtype="float32", **layer)
    assert relative_error(cupy.where(valid, out.astype(np.float32), 0), want) <= LAYER_LIMIT
    assert (valid | (out.view(np.uint8) == 0xFF)).all(), "wrote behind an expert's last token"


# ---- backends, validation -----------------------------------------------------------------------------------------


def test_backends(seed):
    layer, hidden, *call = make_small(seed)
    available = [name for name, status in cupy_moe.backends().items() if status == "available"]
    experts = Experts(**layer)
    assert experts.backend == (os.environ.get("CUPY_MOE_BACKEND") or available[0])
    assert f"{experts.backend} runs" in experts.explain()
    for name in available:
        assert Experts(**layer, backend=name).backend == name
    slow = Experts(**layer, backend="reference")
    assert slow.backend == "reference"
    want = reference.fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], **layer)
    assert same_bits(slow(hidden, *call), want)
    out = poison(cupy.empty_like(hidden))
    assert fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], backend="reference", out=out, **layer) is out
    assert same_bits(out, want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_rows_come_to_a_rank(scheme, seed):
    """Of a map that lets it expect an eighth of them: tiles and buffers are for any number."""
    layer, hidden, weights, _ = make_small(seed, tokens=700, topk=2, **SCHEMES[scheme])
    mapped = cupy.full(48, -1, np.int32)
    mapped[7:13] = cupy.arange(6)
    ids = make_routing(seed, 700, 2, 6)[1] + 7
    check_layer({**layer, "expert_map": mapped}, hidden, weights, cupy.asarray(ids, np.int32))


def test_experts_per_token(seed):
    layer, hidden, *_ = make_small(seed, tokens=3)
    call = cupy.ones((3, 1025), np.float32), cupy.zeros((3, 1025), np.int32)
    with pytest.raises(ValueError, match=r"^topk_ids: expected at most 1024 experts per token on a GPU; got .*1025"):
        Experts(**layer)(hidden, *call)
    with pytest.raises(ValueError, match=r"^src2dst_map: expected at most 1024 slots per token on a GPU; got 1025"):
        cupy_moe.combine(hidden, call[1])


def test_self_test_of_the_library(monkeypatch):
    if cupy_moe.backends(0)["cublaslt"] != "available":
        pytest.skip("needs cuBLASLt with grouped fp8 matmul")
    assert backend._self_test.__wrapped__(0) is None
    monkeypatch.setattr(GroupedGemm, "prepare", lambda *_: lambda stream: None)
    assert backend._self_test.__wrapped__(0).endswith("gave wrong products")


def test_reference_of_the_environment(seed, monkeypatch):
    layer, hidden, *call = make_small(seed)
    monkeypatch.setenv("CUPY_MOE_BACKEND", "reference")
    want = reference.fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], **layer)
    for _ in range(2):
        assert same_bits(fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], **layer), want)


def test_validate(seed):
    layer, hidden, weights, ids = make_small(seed, dtype="float32")
    experts = Experts(**layer, validate=True)
    experts(hidden, weights, ids)
    bad_ids, bad_hidden = ids.copy(), hidden.copy()
    bad_ids[4, 1], bad_hidden[9, 2] = 6, np.nan
    with pytest.raises(ValueError, match=r"topk_ids: .* token 4"):
        experts(hidden, weights, bad_ids)
    with pytest.raises(ValueError, match=r"hidden_states: .* token 9"):
        experts(bad_hidden, weights, ids)
    padded, counts = normal(seed, (6, 4, 128)), cupy.asarray([4, 0, 2, 1, 3, 4], np.int32)
    padded[1, 2], padded[2, 2] = np.nan, np.inf  # behind the last tokens
    experts.batched(padded, counts)
    padded[3, 0, 5] = np.nan
    with pytest.raises(ValueError, match=r"hidden_states: .* token 0 of expert 3"):
        experts.batched(padded, counts)
    with pytest.raises(ValueError, match=r"expert_num_tokens: .* expert 2"):
        experts.batched(padded, cupy.asarray([4, 0, 5, 1, 3, 4], np.int32))
