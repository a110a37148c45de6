# SPDX-License-Identifier: Apache-2.0
"""torch CPU tensors wherever NumPy arrays go: the same bits come out, as tensors, in the caller's memory."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupy_moe
from cupy_moe import Experts, Routing, arrays, fused_experts, reference

torch = pytest.importorskip("torch")

SEED = 91
M, K, N, E, TOPK, MAX_TOKENS = 9, 32, 16, 4, 2, 5
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
DTYPES = {"float16": np.float16, "bfloat16": BF16, "float32": np.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def to_torch(x):
    """The same memory as a tensor of the same dtype; anything but an array as it is."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype == FP8:
        return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BF16 else torch.from_numpy(x)


def all_to_torch(arguments):
    return {name: to_torch(x) for name, x in arguments.items()}


def assert_same_bits(got, expected):
    """`got` is a plain tensor with the dtype, shape and bits of the NumPy array `expected`."""
    assert type(got) is torch.Tensor
    assert got.dtype == to_torch(expected[:0]).dtype
    assert tuple(got.shape) == expected.shape
    bits = got.contiguous().view(torch.uint8).numpy()
    np.testing.assert_array_equal(bits, np.ascontiguousarray(expected).view(np.uint8))


def layer_arguments(rng):
    return {
        "w1": rng.normal(0, 60, (E, 2 * N, K)).astype(FP8),
        "w2": rng.normal(0, 60, (E, K, N)).astype(FP8),
        "w1_scale": rng.uniform(0.004, 0.02, (E, 2 * N)).astype(np.float32),
        "w2_scale": rng.uniform(0.004, 0.02, (E, 1)).astype(np.float32),
        "w1_bias": rng.normal(0, 2, (E, 2 * N)).astype(BF16),
        "w2_bias": rng.normal(0, 2, (E, K)).astype(np.float16),
        "a2_scale": rng.uniform(0.1, 0.5, E).astype(np.float32),
    }


def call_arguments(rng, dtype=np.float32, ids=np.int32):
    return {
        "hidden_states": rng.normal(0, 1, (M, K)).astype(dtype),
        "topk_weights": rng.uniform(0.1, 1, (M, TOPK)).astype(np.float32),
        "topk_ids": rng.integers(-1, E + 1, (M, TOPK)).astype(ids),
    }


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


@pytest.mark.parametrize("ids", [np.int32, np.int64])
@each_dtype
def test_call(rng, dtype, ids):
    layer, call = layer_arguments(rng), call_arguments(rng, DTYPES[dtype], ids)
    expected = reference.fused_experts(**layer, **call)
    assert expected.dtype == DTYPES[dtype]
    assert np.count_nonzero(expected) > expected.size // 2
    experts = Experts(**all_to_torch(layer))
    assert_same_bits(experts(**all_to_torch(call)), expected)
    assert_same_bits(fused_experts(**all_to_torch(layer), **all_to_torch(call)), expected)
    assert experts.backend == "reference"
    assert "CPU" in experts.explain()


@pytest.mark.parametrize("scale", [0.02, np.float32([0.02]), np.float32([[0.02]]),
                                   np.linspace(0.01, 0.05, M, dtype=np.float32)[:, None]],
                         ids=["number", "(1,)", "(1, 1)", "(M, 1)"])
@pytest.mark.parametrize("bits", [False, True], ids=["float8", "uint8"])
def test_fp8_hidden_states(rng, bits, scale):
    layer, call = layer_arguments(rng), call_arguments(rng)
    call["hidden_states"] = (100 * call["hidden_states"]).astype(FP8)
    expected = reference.fused_experts(**layer, **call, a1_scale=scale)
    if bits:
        call["hidden_states"] = call["hidden_states"].view(np.uint8)
    layer, call, scale = all_to_torch(layer), all_to_torch(call), to_torch(scale)
    assert_same_bits(fused_experts(**layer, **call, a1_scale=scale), expected)
    assert_same_bits(Experts(**layer)(**call, a1_scale=scale), expected)
    assert_same_bits(Experts(**layer, a1_scale=scale)(**call), expected)


def test_weights_as_bits(rng):
    layer, call = layer_arguments(rng), call_arguments(rng)
    expected = reference.fused_experts(**layer, **call)
    for w1, w2 in ((np.uint8, np.uint8), (np.uint8, FP8), (FP8, np.uint8)):
        views = layer | {"w1": layer["w1"].view(w1), "w2": layer["w2"].view(w2)}
        assert_same_bits(fused_experts(**all_to_torch(views), **all_to_torch(call)), expected)
        np.testing.assert_array_equal(fused_experts(**views, **call), expected)


@pytest.mark.parametrize("options", [
    {"per_act_token": True},
    {"a1_scale": 0.01},
    {"a1_scale": np.linspace(0.005, 0.02, E, dtype=np.float32)},
    {"activation": "swigluoai", "apply_router_weight_on_input": True},
    {"expert_map": np.array([1, -1, 0, 3], np.int32)},
    {"out_dtype": "float16"},
], ids=lambda options: ", ".join(options))
def test_options(rng, options):
    layer, call = layer_arguments(rng) | options, call_arguments(rng)
    expected = reference.fused_experts(**layer, **call)
    assert_same_bits(fused_experts(**all_to_torch(layer), **all_to_torch(call)), expected)
    assert_same_bits(Experts(**all_to_torch(layer))(**all_to_torch(call)), expected)


@pytest.mark.parametrize("name", ["float16", torch.bfloat16, np.float32])
def test_out_dtype_of_any_library(rng, name):
    layer, call = layer_arguments(rng), call_arguments(rng)
    expected = reference.fused_experts(**layer, **call, out_dtype=str(name).removeprefix("torch.")
                                       if not isinstance(name, type) else name)
    assert_same_bits(fused_experts(**all_to_torch(layer), **all_to_torch(call), out_dtype=name), expected)


def test_under_torch_compile(rng):
    """Without an operator of its own, as in examples/torch_layer.py, it has to be left out of what is compiled."""
    layer, call = layer_arguments(rng), call_arguments(rng)
    expected = reference.fused_experts(**layer, **call)
    experts, call = Experts(**all_to_torch(layer)), all_to_torch(call)
    run = torch.compiler.disable(experts.__call__)

    @torch.compile(backend="eager")
    def function(hidden_states, **routing):
        return run(hidden_states * 2, **routing) + 1

    call["hidden_states"] /= 2
    assert torch.equal(function(**call), torch.from_numpy(expected) + 1)
    assert torch.equal(function(**call), torch.from_numpy(expected) + 1)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # torch's own word, once in a process
def test_tensors_of_a_trace(rng):
    """What torch.compile passes while it traces has no memory; it is refused before anything reads it."""
    from torch._subclasses import FakeTensorMode

    layer, call = all_to_torch(layer_arguments(rng)), all_to_torch(call_arguments(rng))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call["hidden_states"] = mode.from_tensor(call["hidden_states"])
        with pytest.raises(TypeError, match=r"^hidden_states: expected a dense array in memory; got: "):
            Experts(**layer)(**call)


def test_threads_that_bring_a_kind_at_once(monkeypatch):
    """One of them finds the library; the other waits for it."""
    made, asked = [], threading.Event()

    def slowly(name):
        made.append(name)
        asked.set()
        time.sleep(0.05)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(arrays, "_library", functools.cache(slowly))
    monkeypatch.setattr(arrays, "_library_by_type", {})
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(arrays.library_of, torch.zeros(3))
        assert asked.wait(10)
        second = threads.submit(arrays.library_of, torch.zeros(3))
        assert first.result() is second.result() is arrays.library_of(torch.zeros(3))
    assert made == ["torch"]


@each_dtype
def test_out_is_written_in_place(rng, dtype):
    layer, call = layer_arguments(rng), call_arguments(rng)
    expected = reference.fused_experts(**layer, **call, out_dtype=dtype)
    layer, call = all_to_torch(layer), all_to_torch(call)
    for run in (Experts(**layer), lambda **options: fused_experts(**layer, **options)):
        memory = torch.full((M, 2 * K), 7.0, dtype=getattr(torch, dtype))
        out = memory[:, K:]  # rows at a distance
        assert run(**call, out=out) is out
        assert_same_bits(memory[:, K:], expected)
        assert (memory[:, :K] == 7).all()


@each_dtype
def test_rows_at_a_distance(rng, dtype):
    layer, call = layer_arguments(rng), call_arguments(rng, DTYPES[dtype])
    expected = reference.fused_experts(**layer, **call)
    call = all_to_torch(call)
    memory = torch.full((M, K + 3), float("nan"), dtype=getattr(torch, dtype))
    memory[:, :K] = call["hidden_states"]
    call["hidden_states"] = memory[:, :K]
    assert not call["hidden_states"].is_contiguous()
    assert_same_bits(fused_experts(**all_to_torch(layer), **call), expected)


@pytest.mark.parametrize("counts", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn"])
def test_batched(rng, dtype, counts):
    layer = layer_arguments(rng)
    hidden = 50 * rng.normal(0, 1, (E, MAX_TOKENS, K))
    call = {"hidden_states": hidden.astype(DTYPES.get(dtype, FP8)), "expert_num_tokens": np.array([3, 0, 5, 1], counts)}
    if dtype == "float8_e4m3fn":
        call["a1_scale"] = rng.uniform(0.01, 0.03, (E, MAX_TOKENS, 1)).astype(np.float32)
    expected = reference.batched(**call, **layer)
    experts = Experts(**all_to_torch(layer))
    assert_same_bits(experts.batched(**all_to_torch(call)), expected)
    out = torch.empty(expected.shape, dtype=torch.float32)
    assert experts.batched(**all_to_torch(call), out=out) is out
    assert_same_bits(out, reference.batched(**call, **layer, out_dtype="float32"))


class Tagged(torch.Tensor):
    """A subclass that does nothing of its own."""


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda x: x.as_subclass(Tagged)], ids=["Parameter", "subclass"])
def test_kinds_of_tensors(rng, wrap):
    layer, call = layer_arguments(rng), call_arguments(rng)
    expected = reference.fused_experts(**layer, **call)

    def wrapped(arguments):
        return {name: wrap(x) if x.is_floating_point() else x for name, x in all_to_torch(arguments).items()}

    layer, call = wrapped(layer), wrapped(call)
    assert type(layer["w1"]) is not torch.Tensor
    assert_same_bits(Experts(**layer)(**call), expected)
    assert_same_bits(fused_experts(**layer, **call), expected)
    q, scale = cupy_moe.quantize_fp8(call["hidden_states"], per_token=True)
    q_expected, scale_expected = reference.quantize_fp8(call["hidden_states"].detach().numpy(), per_token=True)
    assert_same_bits(q, q_expected)
    assert_same_bits(scale, scale_expected)


def step_arguments(rng):
    routing = reference.route(rng.integers(-1, E + 1, (M, TOPK)), E)
    rows, experts, weights = M * TOPK, routing.row_experts, layer_arguments(rng)
    product = rng.normal(0, 50, (rows, 2 * N)).astype(np.float32)
    a = rng.normal(0, 60, (rows, K)).astype(FP8)
    row_scales = rng.uniform(0.01, 0.03, (rows, 1)).astype(np.float32)
    return {
        "route": ("route", {"topk_ids": rng.integers(-1, 9, (M, TOPK)), "num_experts": E,
                            "expert_map": np.array([-1, 2, 0, 3, 1, -1], np.int32)}),
        "shuffle_rows": ("shuffle_rows", {"x": a[:M], "dst2src_map": routing.dst2src_map}),
        "gather_scales": ("gather_scales", {"scales": row_scales[:M, 0], "dst2src_map": routing.dst2src_map}),
        "quantize_fp8, dynamic": ("quantize_fp8", {"x": product.astype(BF16)}),
        "quantize_fp8, per token": ("quantize_fp8", {"x": product.astype(np.float16), "per_token": True}),
        "quantize_fp8, number": ("quantize_fp8", {"x": product, "scale": 0.25}),
        "quantize_fp8, static": ("quantize_fp8", {"x": product, "scale": row_scales}),
        "activation_quantize, dynamic": ("activation_quantize", {
            "x": product.astype(BF16), "x_scale": row_scales, "w_scale": weights["w1_scale"],
            "bias": weights["w1_bias"], "row_experts": experts}),
        "activation_quantize, static": ("activation_quantize", {
            "x": product, "activation": "relu2_no_mul", "scale": weights["a2_scale"], "row_experts": experts}),
        "activation_quantize, plain": ("activation_quantize", {"x": product, "x_scale": 0.5, "per_token": True}),
        "grouped_gemm_fp8": ("grouped_gemm_fp8", {
            "a": a, "b": weights["w1"], "expert_offsets": routing.expert_offsets, "a_scale": row_scales,
            "b_scale": weights["w1_scale"], "bias": weights["w1_bias"]}),
        "grouped_gemm_fp8, bits": ("grouped_gemm_fp8", {
            "a": a.view(np.uint8), "b": weights["w1"].view(np.uint8), "expert_offsets": routing.expert_offsets,
            "out_dtype": "float32"}),
        "combine": ("combine", {
            "x": product.astype(BF16), "src2dst_map": routing.src2dst_map, "x_scale": row_scales,
            "topk_weights": rng.uniform(0.1, 1, (M, TOPK)).astype(np.float32), "w_scale": weights["w2_scale"],
            "bias": weights["w2_bias"], "row_experts": experts, "out_dtype": "float16"}),
        "combine, plain": ("combine", {"x": product, "src2dst_map": routing.src2dst_map}),
        "topk_softmax": ("topk_softmax", {"gating": product[:M, :E].astype(np.float16), "topk": TOPK}),
        "topk_softmax, renormalized": ("topk_softmax", {
            "gating": product[:M, :E], "topk": TOPK, "renormalize": True}),
    }


STEPS = tuple(step_arguments(np.random.default_rng(SEED)))


@pytest.mark.parametrize("case", STEPS)
def test_steps(rng, case):
    name, arguments = step_arguments(rng)[case]
    expected = getattr(reference, name)(**arguments)
    got = getattr(cupy_moe, name)(**all_to_torch(arguments))
    from_numpy = getattr(cupy_moe, name)(**arguments)
    if not isinstance(expected, tuple):
        got, expected, from_numpy = (got,), (expected,), (from_numpy,)
    assert type(got) is (Routing if name == "route" else tuple)
    for x, y, z in zip(got, expected, from_numpy, strict=True):
        assert_same_bits(x, y)
        assert type(z) is np.ndarray
        assert z.dtype == y.dtype
        np.testing.assert_array_equal(z.view(np.uint8), y.view(np.uint8))


def test_every_step_is_tested():
    names = {case.split(",")[0] for case in STEPS}
    assert names == {name for name in cupy_moe.__all__ if hasattr(reference, name)} - {"Routing", "fused_experts"}


@pytest.mark.parametrize("dtype", ["complex64", "longdouble", "datetime64[s]", "uint16"])
def test_shuffle_rows_of_numpy_alone(rng, dtype):
    x = rng.integers(0, 9, (M, K)).astype(dtype)
    got = cupy_moe.shuffle_rows(x, np.array([3, -1, 0], np.int32))
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, np.stack([x[3], np.zeros_like(x[0]), x[0]]))


@pytest.mark.parametrize("name", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
                                  "float64", "float8_e4m3fn", "uint16", "uint32", "uint64"])
def test_shuffle_rows_into_out(rng, name):
    index = torch.tensor([3, -1, 0, 3, M], dtype=torch.int32)
    x = torch.from_numpy(rng.integers(0, 2, (M, 2 * K))).to(getattr(torch, name))[:, :K]  # rows at a distance
    out = torch.empty((5, K), dtype=x.dtype)
    assert cupy_moe.shuffle_rows(x, index, out=out) is out
    expected = torch.zeros((5, K))
    expected[[0, 2, 3]] = x.float()[[3, 0, 3]]
    assert torch.equal(out.float(), expected)
    made = cupy_moe.shuffle_rows(x, index)
    assert made.dtype == x.dtype
    assert torch.equal(made.float(), expected)


def test_batched_takes_no_map(rng):
    """Its experts are those held here, whatever a map says of global ids."""
    layer, hidden = layer_arguments(rng), rng.normal(0, 1, (E, MAX_TOKENS, K)).astype(np.float32)
    counts = np.array([3, 0, 5, 1], np.int32)
    mapped = Experts(**layer, expert_map=np.array([-1, 2, 0, 3, 1, -1], np.int32))
    np.testing.assert_array_equal(mapped.batched(hidden, counts), Experts(**layer).batched(hidden, counts))


def test_one_token_whose_stride_says_nothing(rng):
    """As `x[None]` of NumPy and CuPy has it: 0 elements from the only row to the next."""
    layer, call = layer_arguments(rng), call_arguments(rng)
    one = {name: x[:1] for name, x in call.items()}
    expected = fused_experts(**layer, **one)
    out = np.empty(K, np.float32)
    assert call["hidden_states"][0][None].strides[0] == 0
    fused_experts(**layer, **one | {"hidden_states": call["hidden_states"][0][None]}, out=out[None])
    np.testing.assert_array_equal(out[None], expected)
    column = rng.normal(0, 1, M).astype(np.float32)[:, None]
    assert column.strides[1] == 0
    np.testing.assert_array_equal(cupy_moe.quantize_fp8(column)[0], cupy_moe.quantize_fp8(column.copy())[0])
