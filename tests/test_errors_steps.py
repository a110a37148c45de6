# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of the step functions."""

import ml_dtypes
import numpy as np
import pytest
from rejections import assert_rejected

import cupy_moe

M, TOPK, ROWS, C, E = 6, 2, 12, 16, 4
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def floats(*shape):
    return np.ones(shape, np.float32)


def ints(*shape):
    return np.zeros(shape, np.int32)


def codes(*shape):
    return np.zeros(shape, FP8)


def read_only(*shape):
    array = floats(*shape)
    array.flags.writeable = False
    return array


# The right arguments; a test changes some of them.
STEPS = {
    "route": {"topk_ids": ints(M, TOPK), "num_experts": E, "expert_map": ints(8)},
    "shuffle_rows": {"x": floats(M, C), "dst2src_map": ints(ROWS), "out": floats(ROWS, C)},
    "gather_scales": {"scales": floats(M, 1), "dst2src_map": ints(ROWS)},
    "quantize_fp8": {"x": floats(M, C), "scale": floats(M, 1)},
    "activation_quantize": {
        "x": floats(ROWS, C), "scale": floats(E), "x_scale": floats(ROWS, 1), "w_scale": floats(E, 2),
        "bias": floats(E, C), "row_experts": ints(ROWS),
    },
    "grouped_gemm_fp8": {
        "a": codes(ROWS, C), "b": codes(E, 8, C), "expert_offsets": ints(E + 1), "a_scale": floats(ROWS, 1),
        "b_scale": floats(E, 8), "bias": floats(E, 8),
    },
    "combine": {
        "x": floats(ROWS, C), "src2dst_map": ints(M, TOPK), "topk_weights": floats(M, TOPK), "x_scale": floats(E),
        "w_scale": floats(E, C), "bias": floats(E, C), "row_experts": ints(ROWS),
    },
    "topk_softmax": {"gating": floats(M, E), "topk": TOPK},
}


@pytest.mark.parametrize("step", STEPS)
def test_what_the_tests_start_from_is_right(step):
    getattr(cupy_moe, step)(**STEPS[step])


FLOATS = "float16 or bfloat16 or float32"
FP8_NAMES = "float8_e4m3fn or uint8"
STRIDED = ("contiguous rows", "strides", "ascontiguousarray")
CONTIGUOUS = ("C-contiguous", "strides", "ascontiguousarray")
NO_MUL, SWIGLU = {"activation": "silu_no_mul"}, {"activation": "swigluoai"}

# step, what changes, the argument that the message names, exception, what the message contains
WRONG = [
    ("route", {"topk_ids": [[0]]}, "topk_ids", TypeError, ("NumPy, CuPy or torch array", "got list")),
    ("route", {"topk_ids": floats(M, TOPK)}, "topk_ids", TypeError, ("int32 or int64", "got float32")),
    ("route", {"topk_ids": ints(M)}, "topk_ids", ValueError, ("(M, topk)", "got (6,)")),
    ("route", {"topk_ids": ints(TOPK, M).T}, "topk_ids", ValueError, CONTIGUOUS),
    ("route", {"num_experts": 0}, "num_experts", ValueError, ("at least 1", "got 0")),
    ("route", {"num_experts": 4.0}, "num_experts", TypeError, ("integer", "got 4.0")),
    ("route", {"num_experts": True}, "num_experts", TypeError, ("integer", "got True")),
    ("route", {"expert_map": np.zeros(8, np.int64)}, "expert_map", TypeError, ("int32", "got int64")),
    ("route", {"expert_map": ints(2, 4)}, "expert_map", ValueError, ("(global_num_experts,)", "got (2, 4)")),
    ("route", {"expert_map": ints(0)}, "expert_map", ValueError, ("at least one", "(0,)")),
    ("shuffle_rows", {"x": None}, "x", TypeError, ("NumPy, CuPy or torch array", "got NoneType")),
    ("shuffle_rows", {"x": np.full((M, C), "a")}, "x", TypeError, ("numbers", "got str32")),
    ("shuffle_rows", {"x": floats(M)}, "x", ValueError, ("(M, C)", "got (6,)")),
    ("shuffle_rows", {"x": floats(C, M).T}, "x", ValueError, STRIDED),
    ("shuffle_rows", {"dst2src_map": ints(ROWS, 1)}, "dst2src_map", ValueError, ("(rows,)", "got (12, 1)")),
    ("shuffle_rows", {"dst2src_map": np.zeros(ROWS, np.int64)}, "dst2src_map", TypeError, ("int32", "got int64")),
    ("shuffle_rows", {"out": floats(M, C)}, "out", ValueError, ("(12, 16)", "got (6, 16)")),
    ("shuffle_rows", {"out": np.ones((ROWS, C))}, "out", TypeError, ("float32", "got float64")),
    ("shuffle_rows", {"out": floats(ROWS, 2 * C)[:, :C]}, "out", ValueError, CONTIGUOUS),
    ("shuffle_rows", {"out": read_only(ROWS, C)}, "out", ValueError, ("written to", "read-only")),
    ("gather_scales", {"scales": np.ones((M, 1))}, "scales", TypeError, ("float32", "got float64")),
    ("gather_scales", {"scales": floats(M, 2)}, "scales", ValueError, ("(M, 1) or (M,)", "got (6, 2)")),
    ("gather_scales", {"scales": floats(M, 2)[:, :1]}, "scales", ValueError, CONTIGUOUS),
    ("gather_scales", {"scales": 0.5}, "scales", TypeError, ("NumPy, CuPy or torch array", "got float")),
    ("gather_scales", {"dst2src_map": floats(ROWS)}, "dst2src_map", TypeError, ("int32", "got float32")),
    ("quantize_fp8", {"x": codes(M, C)}, "x", TypeError, (FLOATS, "got float8_e4m3fn")),
    ("quantize_fp8", {"x": floats(1, M, C)}, "x", ValueError, ("(M, C)", "got (1, 6, 16)")),
    ("quantize_fp8", {"x": floats(M, 2 * C)[:, ::2]}, "x", ValueError, STRIDED),
    ("quantize_fp8", {"scale": floats(M)}, "scale", ValueError, ("(1,)", "(6, 1)", "got (6,)")),
    ("quantize_fp8", {"scale": floats(1, C)}, "scale", ValueError, ("(6, 1)", "got (1, 16)")),
    ("quantize_fp8", {"scale": np.ones(1)}, "scale", TypeError, ("float32", "got float64")),
    ("quantize_fp8", {"scale": 0}, "scale", ValueError, ("a positive scale, from", "got 0")),
    ("quantize_fp8", {"scale": float("nan")}, "scale", ValueError, ("a positive scale, from", "got nan")),
    ("quantize_fp8", {"per_token": 1}, "per_token", TypeError, ("True or False", "got 1")),
    ("activation_quantize", {"x": codes(ROWS, C)}, "x", TypeError, (FLOATS, "got float8_e4m3fn")),
    ("activation_quantize", {"x": floats(ROWS)}, "x", ValueError, ("(rows, 2N)", "got (12,)")),
    ("activation_quantize", NO_MUL | {"x": floats(ROWS)}, "x", ValueError, ("(rows, N)", "got (12,)")),
    ("activation_quantize", SWIGLU | {"x": floats(ROWS, 15)}, "x", ValueError, ("even", "'swigluoai'", "got (12, 15)")),
    ("activation_quantize", {"activation": "SiLU"}, "activation", ValueError, ("'silu'", "got 'SiLU'")),
    ("activation_quantize", {"per_token": "row"}, "per_token", TypeError, ("True or False", "got 'row'")),
    ("activation_quantize", {"scale": floats(ROWS, 1)}, "scale", ValueError, ("(1,)", "(4,)", "got (12, 1)")),
    ("activation_quantize", {"scale": floats(E + 1)}, "scale", ValueError, ("(1,)", "(4,)", "got (5,)")),
    ("activation_quantize", {"scale": -2.0}, "scale", ValueError, ("a positive scale, from", "got -2.0")),
    ("activation_quantize", {"x_scale": floats(ROWS)}, "x_scale", ValueError, ("(12, 1)", "(4,)", "got (12,)")),
    ("activation_quantize", {"x_scale": np.ones(1)}, "x_scale", TypeError, ("float32", "got float64")),
    ("activation_quantize", {"w_scale": floats(C, E)}, "w_scale", ValueError, ("(16, 2)", "got (16, 4)")),
    ("activation_quantize", {"w_scale": 0.5}, "w_scale", TypeError, ("numpy array", "got float")),
    ("activation_quantize", {"w_scale": floats(0)}, "w_scale", ValueError, ("at least one expert", "(0,)")),
    ("activation_quantize", NO_MUL | {"w_scale": floats(E, 2)}, "w_scale", ValueError, ("(4, 16)", "got (4, 2)")),
    ("activation_quantize", {"bias": floats(E, C // 2)}, "bias", ValueError, ("(4, 16)", "got (4, 8)")),
    ("activation_quantize", {"bias": ints(E, C)}, "bias", TypeError, (FLOATS, "got int32")),
    ("activation_quantize", {"row_experts": ints(M)}, "row_experts", ValueError, ("(12,)", "got (6,)")),
    ("activation_quantize", {"row_experts": floats(ROWS)}, "row_experts", TypeError, ("int32", "got float32")),
    ("activation_quantize", {"row_experts": None}, "row_experts", ValueError, ("(12,)", "w_scale", "got None")),
    ("grouped_gemm_fp8", {"a": floats(ROWS, C)}, "a", TypeError, (FP8_NAMES, "got float32")),
    ("grouped_gemm_fp8", {"a": codes(ROWS, 2 * C)[:, :C]}, "a", ValueError, CONTIGUOUS),
    ("grouped_gemm_fp8", {"b": codes(E, C, 8)}, "b", ValueError, ("(E, n, 16)", "got (4, 16, 8)")),
    ("grouped_gemm_fp8", {"b": codes(E, C, 8).swapaxes(1, 2)}, "b", ValueError, CONTIGUOUS),
    ("grouped_gemm_fp8", {"b": codes(8, C)}, "b", ValueError, ("(E, n, 16)", "got (8, 16)")),
    ("grouped_gemm_fp8", {"expert_offsets": ints(E)}, "expert_offsets", ValueError, ("(5,)", "got (4,)")),
    ("grouped_gemm_fp8", {"expert_offsets": [0] * 5}, "expert_offsets", TypeError, ("numpy array", "got list")),
    ("grouped_gemm_fp8", {"a_scale": floats(ROWS)}, "a_scale", ValueError, ("(12, 1)", "(4,)", "got (12,)")),
    ("grouped_gemm_fp8", {"a_scale": float("inf")}, "a_scale", ValueError, ("a positive scale, from", "got inf")),
    ("grouped_gemm_fp8", {"b_scale": floats(8)}, "b_scale", ValueError, ("(4,)", "(4, 8)", "got (8,)")),
    ("grouped_gemm_fp8", {"b_scale": floats(E, 2)}, "b_scale", ValueError, ("(4, 1)", "(4, 8)", "got (4, 2)")),
    ("grouped_gemm_fp8", {"bias": floats(8)}, "bias", ValueError, ("(4, 8)", "got (8,)")),
    ("grouped_gemm_fp8", {"out_dtype": None}, "out_dtype", ValueError, ("'bfloat16'", "got None")),
    ("grouped_gemm_fp8", {"out_dtype": "int8"}, "out_dtype", ValueError, ("'bfloat16'", "got 'int8'")),
    ("grouped_gemm_fp8", {"backend": "cutlass"}, "backend", ValueError, ("'reference'", "got 'cutlass'")),
    ("combine", {"x": ints(ROWS, C)}, "x", TypeError, (FLOATS, "got int32")),
    ("combine", {"x": floats(C, ROWS).T}, "x", ValueError, STRIDED),
    ("combine", {"src2dst_map": ints(ROWS)}, "src2dst_map", ValueError, ("(M, topk)", "got (12,)")),
    ("combine", {"src2dst_map": np.zeros((M, 2), np.int64)}, "src2dst_map", TypeError, ("int32", "got int64")),
    ("combine", {"topk_weights": floats(ROWS)}, "topk_weights", ValueError, ("(6, 2)", "got (12,)")),
    ("combine", {"topk_weights": np.ones((M, 2), BF16)}, "topk_weights", TypeError, ("float32", "got bfloat16")),
    ("combine", {"x_scale": floats(M, 1)}, "x_scale", ValueError, ("(12, 1)", "(4,)", "got (6, 1)")),
    ("combine", {"w_scale": floats(E, C).T.copy()}, "w_scale", ValueError, ("(16, 16)", "got (16, 4)")),
    ("combine", {"w_scale": floats(C, E).T}, "w_scale", ValueError, CONTIGUOUS),
    ("combine", {"bias": floats(C)}, "bias", ValueError, ("(4, 16)", "got (16,)")),
    ("combine", {"row_experts": None}, "row_experts", ValueError, ("(12,)", "w_scale", "got None")),
    ("combine", {"out_dtype": "float8_e4m3fn"}, "out_dtype", ValueError, ("'float16'", "got 'float8_e4m3fn'")),
    ("topk_softmax", {"gating": np.ones((M, E))}, "gating", TypeError, (FLOATS, "got float64")),
    ("topk_softmax", {"gating": floats(M)}, "gating", ValueError, ("(M, E)", "got (6,)")),
    ("topk_softmax", {"gating": floats(E, M).T}, "gating", ValueError, STRIDED),
    ("topk_softmax", {"gating": floats(M, 1025)}, "gating", ValueError, ("1 to 1024", "(6, 1025)")),
    ("topk_softmax", {"gating": floats(M, 0)}, "gating", ValueError, ("1 to 1024", "(6, 0)")),
    ("topk_softmax", {"topk": E + 1}, "topk", ValueError, ("from 1 to 4", "got 5")),
    ("topk_softmax", {"topk": 0}, "topk", ValueError, ("from 1 to 4", "got 0")),
    ("topk_softmax", {"topk": "2"}, "topk", TypeError, ("integer", "got '2'")),
    ("topk_softmax", {"renormalize": None}, "renormalize", TypeError, ("True or False", "got None")),
]


def _name(step, changes):
    def name(value):
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else str(value)[:20]

    return " ".join([step, *(f"{key}={name(value)}" for key, value in changes.items())])


@pytest.mark.parametrize(
    ("step", "changes", "name", "kind", "parts"), WRONG, ids=[_name(step, changes) for step, changes, *_ in WRONG]
)
def test_wrong_argument(step, changes, name, kind, parts):
    assert_rejected(kind, name, parts, getattr(cupy_moe, step), **(STEPS[step] | changes))


@pytest.mark.parametrize("step", ["activation_quantize", "combine"])
@pytest.mark.parametrize("per_expert", ["w_scale", "bias", "x_scale"])
def test_arguments_per_expert_need_the_experts_of_the_rows(step, per_expert):
    """A row of scales per token looks like one per expert: the message says which argument is taken for that."""
    shape = (ROWS,) if per_expert == "x_scale" else (E, C)
    arguments = {name: STEPS[step][name] for name in ("x", "src2dst_map") if name in STEPS[step]}
    arguments[per_expert] = floats(*shape)
    parts = ("int32", f"({ROWS},)", f"{per_expert} of shape {shape}", "got None")
    assert_rejected(ValueError, "row_experts", parts, getattr(cupy_moe, step), **arguments)
    arguments[per_expert] = floats(ROWS, 1) if per_expert == "x_scale" else floats(1, C)
    getattr(cupy_moe, step)(**arguments)


ARRAYS = [
    (step, name)
    for step, options in STEPS.items()
    for name, x in options.items()
    if isinstance(x, np.ndarray) and step != "topk_softmax"  # which takes one array
]


@pytest.mark.parametrize(("step", "name"), ARRAYS)
def test_mixed_kinds(step, name):
    torch = pytest.importorskip("torch")
    options = {key: x.view(np.uint8) if getattr(x, "dtype", None) == FP8 else x for key, x in STEPS[step].items()}
    options[name] = torch.from_numpy(options[name])
    first = next(iter(options))
    if name == first:  # the first argument decides, so the second one is of the wrong kind
        others = [key for key, x in options.items() if isinstance(x, np.ndarray)]
        with pytest.raises(TypeError, match=f"^({'|'.join(others)}): expected a torch array .*; got a numpy array"):
            getattr(cupy_moe, step)(**options)
        return
    parts = ("a numpy array like the other", "got a torch array")
    assert_rejected(TypeError, name, parts, getattr(cupy_moe, step), **options)


@pytest.mark.parametrize("step", STEPS)
def test_tensors_without_memory(step):
    torch = pytest.importorskip("torch")
    first = next(iter(STEPS[step]))
    meta = torch.empty(STEPS[step][first].shape, device="meta")
    parts = ("in memory", "'cpu' or 'cuda'", "'meta'")
    assert_rejected(TypeError, first, parts, getattr(cupy_moe, step), **(STEPS[step] | {first: meta}))


def test_shuffle_rows_onto_itself():
    """Rows would be read that have been written already."""
    x, index = np.arange(24, dtype=np.float32).reshape(6, 4), np.array([2, 0, 1], np.int32)
    for out in (x[:3], x[3:], x[1:4]):
        parts = ("apart from that of x", "overlaps")
        assert_rejected(ValueError, "out", parts, cupy_moe.shuffle_rows, x[:4], index, out=out)
    assert cupy_moe.shuffle_rows(x[:3], index, out=x[3:]).tolist() == x[[2, 0, 1]].tolist()


@pytest.mark.parametrize("dtype", ["float8_e5m2", "complex64"])
def test_shuffle_rows_of_a_dtype_that_only_torch_has(dtype):
    """Or that may be the conjugate of what lies in memory."""
    torch = pytest.importorskip("torch")
    x = torch.zeros((M, C), dtype=getattr(torch, dtype))
    options = {"x": x, "dst2src_map": torch.zeros(ROWS, dtype=torch.int32)}
    assert_rejected(TypeError, "x", ("or float8_e4m3fn", f"got {dtype}"), cupy_moe.shuffle_rows, **options)
