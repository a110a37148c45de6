# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of `Experts`: the error names the argument, what is allowed and what came."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from rejections import assert_rejected

import cupy_moe
from cupy_moe import Experts, Workspace, arrays, checks, pipeline

K, N, E = 32, 16, 4
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def layer_arguments(experts=E, rows=2 * N):
    return {
        "w1": np.zeros((experts, rows, K), FP8),
        "w2": np.zeros((experts, K, N), FP8),
        "w1_scale": np.ones(experts, np.float32),
        "w2_scale": np.ones(experts, np.float32),
    }


def floats(*shape):
    return np.ones(shape, np.float32)


def test_right_arguments_are_accepted():
    """What the tests below start from, and every shape of scale, is right."""
    Experts(**layer_arguments())
    right = layer_arguments() | {"w1_bias": np.ones((E, 2 * N), BF16), "w2_bias": np.ones((E, K), np.float16)}
    for w1_shape in ((E,), (E, 1), (E, 1, 1), (E, 2), (E, 2 * N), (E, 2 * N, 1)):
        Experts(**right | {"w1_scale": floats(*w1_shape)})
    for w2_shape in ((E,), (E, 1), (E, 1, 1), (E, K), (E, K, 1)):
        Experts(**right | {"w2_scale": floats(*w2_shape)})
    for a_scale in (0.5, np.float32(0.5), np.float64(0.5), 1, floats(), floats(1), floats(E)):
        Experts(**right, a1_scale=a_scale, a2_scale=a_scale)
    Experts(**right, a1_scale=floats(7, 1), expert_map=np.zeros(9, np.int32), workspace=Workspace())
    for out_dtype in ("float16", "bfloat16", np.float32, np.dtype(np.float16), BF16):
        Experts(**right, out_dtype=out_dtype)


FP8_NAMES = ("float8_e4m3fn", "uint8")
FLOAT_NAMES = ("'float16'", "'bfloat16'", "'float32'")
NOT_FLOAT32 = ("expected float32", "got float64")
CONTIGUOUS = ("C-contiguous", "strides", "ascontiguousarray")

# argument, value, exception, what the message contains
WRONG = [
    # weights: kind, dtype, rank, size, layout
    ("w1", None, TypeError, ("NumPy, CuPy or torch array", "NoneType")),
    ("w1", [[[0]]], TypeError, ("NumPy, CuPy or torch array", "list")),
    ("w1", floats(E, 2 * N, K), TypeError, (*FP8_NAMES, "got float32")),
    ("w1", np.zeros((E, 2 * N, K), ml_dtypes.float8_e5m2), TypeError, (*FP8_NAMES, "got float8_e5m2")),
    ("w1", np.zeros((E, 2 * N, K), ml_dtypes.float8_e4m3fnuz), TypeError, (*FP8_NAMES, "got float8_e4m3fnuz")),
    ("w1", np.zeros((E, 2 * N, K), np.int8), TypeError, (*FP8_NAMES, "got int8")),
    ("w1", np.zeros((2 * N, K), FP8), ValueError, ("(E, 2N, K)", "got (32, 32)")),
    ("w1", np.zeros((E, 2 * N, K, 1), FP8), ValueError, ("(E, 2N, K)", "got (4, 32, 32, 1)")),
    ("w1", np.zeros((E, 2 * N + 1, K), FP8), ValueError, ("even", "'silu'", "got (4, 33, 32)")),
    ("w1", np.zeros((0, 2 * N, K), FP8), ValueError, ("at least 1", "got (0, 32, 32)")),
    ("w1", np.zeros((E, 0, K), FP8), ValueError, ("at least 1", "got (4, 0, 32)")),
    ("w1", np.zeros((E, 2 * N, 0), FP8), ValueError, ("at least 1", "got (4, 32, 0)")),
    ("w1", np.zeros((E, K, 2 * N), FP8).swapaxes(1, 2), ValueError, CONTIGUOUS),
    ("w1", np.zeros((E, 2 * N, 2 * K), FP8)[:, :, ::2], ValueError, CONTIGUOUS),
    ("w2", np.zeros((E, K, N + 1), FP8), ValueError, ("(4, 32, 16)", "got (4, 32, 17)")),
    ("w2", np.zeros((E, N, K), FP8), ValueError, ("(4, 32, 16)", "got (4, 16, 32)")),
    ("w2", np.zeros((E + 1, K, N), FP8), ValueError, ("(4, 32, 16)", "got (5, 32, 16)")),
    ("w2", np.zeros((E, K, 2 * N), FP8), ValueError, ("since w1 has (4, 32, 32)", "'silu' is gated")),
    ("w2", np.zeros((K, N), FP8), ValueError, ("(4, 32, 16)", "got (32, 16)")),
    ("w2", np.zeros((E, K, N), np.float16), TypeError, (*FP8_NAMES, "got float16")),
    ("w2", np.zeros((E, N, K), FP8).swapaxes(1, 2), ValueError, CONTIGUOUS),
    ("w2", "w2", TypeError, ("numpy array", "got str")),
    # scales of weights
    ("w1_scale", None, ValueError, ("float32", "(E,)", "(E, 32)", "got None")),
    ("w2_scale", None, ValueError, ("float32", "(E,)", "(E, 32)", "got None")),
    ("w1_scale", 1.0, TypeError, ("numpy array", "got float")),
    ("w1_scale", np.ones(E), TypeError, NOT_FLOAT32),
    ("w2_scale", np.ones(E, np.float16), TypeError, ("expected float32", "got float16")),
    ("w1_scale", floats(), ValueError, ("(4,)", "got ()")),
    ("w1_scale", floats(1), ValueError, ("(4,)", "got (1,)")),
    ("w1_scale", floats(E + 1), ValueError, ("(4,)", "(4, 2)", "(4, 32)", "got (5,)")),
    ("w1_scale", floats(2 * N), ValueError, ("(4, 32)", "got (32,)")),
    ("w1_scale", floats(2 * N, E), ValueError, ("(4, 32)", "got (32, 4)")),
    ("w1_scale", floats(2 * N, E).T, ValueError, CONTIGUOUS),
    ("w1_scale", floats(E, N), ValueError, ("(4, 2)", "(4, 32)", "got (4, 16)")),
    ("w1_scale", floats(E, 1, 2 * N), ValueError, ("(4, 32, 1)", "got (4, 1, 32)")),
    ("w2_scale", floats(E, 2), ValueError, ("(4, 1)", "(4, 32)", "got (4, 2)")),
    ("w2_scale", floats(K, E), ValueError, ("(4, 32)", "got (32, 4)")),
    ("w2_scale", floats(E, N), ValueError, ("(4, 32)", "got (4, 16)")),
    ("w2_scale", floats(2 * E)[::2], ValueError, CONTIGUOUS),
    # scales of activations
    ("a1_scale", 0.0, ValueError, ("a positive scale, from", "got 0.0")),
    ("a1_scale", -0.5, ValueError, ("a positive scale, from", "got -0.5")),
    ("a2_scale", float("nan"), ValueError, ("a positive scale, from", "got nan")),
    ("a2_scale", np.float32("inf"), ValueError, ("a positive scale, from", "inf")),
    ("a1_scale", 1e-38, ValueError, ("a positive scale, from 2**-126 to 2**126", "got 1e-38")),
    ("a2_scale", 1e38, ValueError, ("a positive scale, from 2**-126 to 2**126", "got 1e+38")),
    ("a2_scale", -1, ValueError, ("a positive scale, from", "got -1")),
    ("a1_scale", True, TypeError, ("number or an array", "got True")),
    ("a1_scale", "0.5", TypeError, ("number or an array", "got '0.5'")),
    ("a2_scale", [0.5], TypeError, ("number or an array", "got [0.5]")),
    ("a1_scale", np.ones(1), TypeError, NOT_FLOAT32),
    ("a1_scale", floats(E + 1), ValueError, ("(1,)", "(4,)", "(M, 1)", "got (5,)")),
    ("a1_scale", floats(1, 7), ValueError, ("(M, 1)", "got (1, 7)")),
    ("a2_scale", floats(7, 1), ValueError, ("(1,)", "(4,)", "got (7, 1)")),
    ("a2_scale", floats(2 * E)[::2], ValueError, CONTIGUOUS),
    # biases and map
    ("w1_bias", floats(2 * N), ValueError, ("(4, 32)", "got (32,)")),
    ("w1_bias", floats(E, N), ValueError, ("(4, 32)", "got (4, 16)")),
    ("w1_bias", floats(2 * N, E).T, ValueError, CONTIGUOUS),
    ("w1_bias", 0.0, TypeError, ("numpy array", "got float")),
    ("w2_bias", floats(E, N), ValueError, ("(4, 32)", "got (4, 16)")),
    ("w2_bias", np.ones((E, K)), TypeError, ("float16 or bfloat16 or float32", "got float64")),
    ("expert_map", np.zeros(8, np.int64), TypeError, ("int32", "got int64")),
    ("expert_map", np.zeros((2, 4), np.int32), ValueError, ("(global_num_experts,)", "got (2, 4)")),
    ("expert_map", np.zeros(0, np.int32), ValueError, ("at least one", "(0,)")),
    ("expert_map", np.zeros(8, np.int32)[::2], ValueError, CONTIGUOUS),
    ("expert_map", {0: 1}, TypeError, ("numpy array", "got dict")),
    # options
    ("activation", "SILU", ValueError, ("'silu'", "'swigluoai'", "'relu2_no_mul'", "got 'SILU'")),
    ("activation", None, ValueError, ("'silu'", "got None")),
    ("out_dtype", "float64", ValueError, (*FLOAT_NAMES, "got 'float64'")),
    ("out_dtype", "fp16", ValueError, (*FLOAT_NAMES, "got 'fp16'")),
    ("out_dtype", FP8, ValueError, (*FLOAT_NAMES, "float8_e4m3fn")),
    ("out_dtype", int, ValueError, (*FLOAT_NAMES, "int")),
    ("out_dtype", 3, ValueError, (*FLOAT_NAMES, "got 3")),
    ("backend", "cutlass", ValueError, ("'sm90'", "'cublaslt'", "'mma'", "'reference'", "got 'cutlass'")),
    ("per_act_token", 1, TypeError, ("True or False", "got 1")),
    ("per_act_token", None, TypeError, ("True or False", "got None")),
    ("apply_router_weight_on_input", "no", TypeError, ("True or False", "got 'no'")),
    ("batch_invariant", 1, TypeError, ("True or False", "got 1")),
    ("validate", 0, TypeError, ("True or False", "got 0")),
    ("workspace", 1 << 20, TypeError, ("cupy_moe.Workspace", "got int")),
    ("workspace", Workspace, TypeError, ("cupy_moe.Workspace", "got type")),
]


def _name(value):
    shape = getattr(value, "shape", None)
    return f"{value.dtype}{list(shape)}" if isinstance(shape, tuple) else str(value)


@pytest.mark.parametrize(
    ("name", "value", "kind", "parts"), WRONG, ids=[f"{name} {_name(value)}" for name, value, *_ in WRONG]
)
def test_wrong_argument(name, value, kind, parts):
    assert_rejected(kind, name, parts, Experts, **layer_arguments() | {name: value})


@pytest.mark.parametrize("name", ["w1", "w2", "w1_scale", "w2_scale"])
def test_required_arguments(name):
    arguments = layer_arguments()
    del arguments[name]
    with pytest.raises(TypeError, match=f"missing 1 required .*'{name}'"):
        Experts(**arguments)


def test_sizes_that_follow_from_the_activation():
    gated, plain = layer_arguments(), layer_arguments(rows=N)
    assert_rejected(ValueError, "w2", ("(4, 32, 32)", "got (4, 32, 16)"), Experts, **gated, activation="silu_no_mul")
    assert_rejected(ValueError, "w2", ("(4, 32, 8)", "got (4, 32, 16)"), Experts, **plain)
    plain["activation"] = "gelu_no_mul"
    Experts(**plain)
    for shape in ((E, 2), (E, 2 * N)):  # without gates there are no halves
        came = f"got {shape}"
        assert_rejected(ValueError, "w1_scale", ("(4, 16)", came), Experts, **plain | {"w1_scale": floats(*shape)})
    odd = layer_arguments(rows=N - 1) | {"w2": np.zeros((E, K, N - 1), FP8), "activation": "gelu_no_mul"}
    Experts(**odd)


@pytest.mark.parametrize(("name", "size"), [("w1_scale", 2 * N), ("w2_scale", K)])
def test_one_expert_does_not_make_a_row_of_scales_per_channel(name, size):
    one = layer_arguments(experts=1)
    Experts(**one | {name: floats(1, size)})
    came = f"got ({size},)"
    assert_rejected(ValueError, name, (f"(1, {size})", came), Experts, **one | {name: floats(size)})


def test_one_expert_does_not_make_activation_scales_per_token():
    one = layer_arguments(experts=1)
    assert_rejected(ValueError, "a2_scale", ("(1,)", "got (7,)"), Experts, **one, a2_scale=floats(7))


@pytest.mark.parametrize("name", ["sm90", "cublaslt", "mma"])
def test_backend_that_the_arrays_cannot_run_on(name):
    with pytest.raises(RuntimeError, match=rf"^backend: expected 'reference' or None with .* CPU; got '{name}'"):
        Experts(**layer_arguments(), backend=name)


def test_batch_invariant_takes_no_dynamic_scale_per_tensor():
    layer = layer_arguments() | {"batch_invariant": True}
    parts = ("static scale", "per_act_token=True", "batch_invariant=True", "got None", "all tokens of the call")
    for a1_scale in (None, 0.5):
        assert_rejected(ValueError, "a2_scale", parts, Experts, **layer, a1_scale=a1_scale)
    with_it, without = (Experts(**layer | {"batch_invariant": on}, per_act_token=True)._spec for on in (True, False))
    assert with_it.without_arrays() != without.without_arrays(), "fused_experts finds its layers by this"
    for a_scale in (0.5, floats(1), floats(E)):
        Experts(**layer, a1_scale=a_scale, a2_scale=a_scale)
        Experts(**layer, a2_scale=a_scale)  # fp8 hidden states may come with a scale
    parts = ("None or one of", "'sm90'", "'reference'", "got 'cublaslt'", "order along K")
    assert_rejected(ValueError, "backend", parts, Experts, **layer, per_act_token=True, backend="cublaslt")


# method, its arguments, the argument that the message names, exception, what the message contains
WRONG_SIZES = [
    ("workspace_nbytes", {"M": -1, "topk": 2}, "M", ValueError, ("at least 0", "got -1")),
    ("workspace_nbytes", {"M": 1.0, "topk": 2}, "M", TypeError, ("integer", "got 1.0")),
    ("workspace_nbytes", {"M": None, "topk": 2}, "M", TypeError, ("integer", "got None")),
    ("workspace_nbytes", {"M": 8, "topk": 0}, "topk", ValueError, ("at least 1", "got 0")),
    ("workspace_nbytes", {"M": 8, "topk": "2"}, "topk", TypeError, ("integer", "got '2'")),
    ("tune", {"M": 0, "topk": 2}, "M", ValueError, ("at least 1", "got 0")),
    ("tune", {"M": [8, -8], "topk": 2}, "M", ValueError, ("at least 1", "got -8")),
    ("tune", {"M": [], "topk": 2}, "M", ValueError, ("None", "at least one number of tokens", "got []")),
    ("tune", {"M": "64", "topk": 2}, "M", TypeError, ("integer", "got '64'")),
    ("tune", {"M": True, "topk": 2}, "M", TypeError, ("integer", "got True")),
    ("tune", {"M": [1, 2.5], "topk": 2}, "M", TypeError, ("integer", "got 2.5")),
    ("tune", {"M": np.ones((2, 2), int), "topk": 2}, "M", TypeError, ("integer", "got [1, 1]")),
    ("tune", {"M": {8: 2}, "topk": 2}, "M", TypeError, ("integer", "got {8: 2}")),
    ("tune", {"topk": E + 1}, "topk", ValueError, ("from 1 to 4", "got 5")),
    ("tune", {"topk": 0}, "topk", ValueError, ("from 1 to 4", "got 0")),
    ("tune", {"topk": None}, "topk", TypeError, ("integer", "got None")),
]


@pytest.mark.parametrize(
    ("method", "options", "name", "kind", "parts"), WRONG_SIZES,
    ids=[f"{case[0]} {' '.join(map(_name, case[1].values()))}" for case in WRONG_SIZES],
)
def test_wrong_size(method, options, name, kind, parts):
    assert_rejected(kind, name, parts, getattr(Experts(**layer_arguments()), method), **options)


def test_sizes_of_the_reference():
    """It takes no scratch memory and has nothing to tune."""
    experts = Experts(**layer_arguments())
    assert experts.workspace_nbytes(64, 2) == experts.workspace_nbytes(M=0, topk=100) == 0
    assert experts.tune(topk=2) == experts.tune(np.int64(3), topk=E) == experts.tune([1, 2], topk=1) == {}
    mapped = Experts(**layer_arguments(), expert_map=np.zeros(9, np.int32))
    assert mapped.tune(topk=9) == {}
    assert_rejected(ValueError, "topk", ("from 1 to 9", "got 10"), mapped.tune, topk=10)
    with pytest.raises(TypeError, match="topk"):
        experts.tune(64)


@pytest.mark.parametrize("make", [lambda: Experts(**layer_arguments()), Workspace])
def test_copies(make):
    """They hold addresses."""
    made = make()
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=rf"^{type(made).__name__} can be neither copied nor pickled"):
            copier(made)


@pytest.mark.parametrize("name", ["w2", "w1_scale", "w2_scale", "a1_scale", "a2_scale", "w1_bias", "w2_bias",
                                  "expert_map"])
@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_mixed_kinds(first, name):
    torch = pytest.importorskip("torch")
    arguments = layer_arguments() | {
        "a1_scale": floats(1), "a2_scale": floats(1), "w1_bias": floats(E, 2 * N), "w2_bias": floats(E, K),
        "expert_map": np.zeros(8, np.int32),
    }
    as_bits = {key: x.view(np.uint8) if x.dtype == FP8 else x for key, x in arguments.items()}
    as_torch = {key: torch.from_numpy(x) for key, x in as_bits.items()}
    Experts(**as_torch)
    ours, other = (as_bits, as_torch) if first == "numpy" else (as_torch, as_bits)
    second = "torch" if first == "numpy" else "numpy"
    parts = (f"a {first} array like the other arguments", f"got a {second} array")
    assert_rejected(TypeError, name, parts, Experts, **ours | {name: other[name]})


@pytest.mark.parametrize("name", ["w1", "w2_scale"])
def test_tensors_without_memory(name):
    torch = pytest.importorskip("torch")
    arguments = {key: torch.from_numpy(x.view(np.uint8) if x.dtype == FP8 else x)
                 for key, x in layer_arguments().items()}
    on_meta = arguments[name].to("meta")
    assert_rejected(TypeError, name, ("in memory", "'cpu' or 'cuda'", "'meta'"), Experts, **arguments | {name: on_meta})
    sparse = arguments[name].to_sparse()
    assert_rejected(TypeError, name, ("dense",), Experts, **arguments | {name: sparse})
    # What stands for other tensors has the address 0, which means "not given" to a kernel.
    class Wrapper(torch.Tensor):
        __torch_dispatch__ = None

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, arguments[name].shape, dtype=arguments[name].dtype)
    assert_rejected(TypeError, name, ("without memory of its own", "to_local"), Experts, **arguments | {name: wrapper})


def test_numbers_of_the_map():
    arguments = layer_arguments() | {"validate": True}
    Experts(**arguments, expert_map=np.array([0, -1, E - 1], np.int32))
    for wrong in (E, -2):
        parts, mapped = (f"-1 to {E - 1}", f"global expert 1 has {wrong}"), np.array([0, wrong], np.int32)
        assert_rejected(ValueError, "expert_map", parts, Experts, **arguments, expert_map=mapped)


def test_block_wise_scales():
    parts = (f"({E}, 1, 1)", "block-wise scales are not supported", f"got ({E}, 2, 3)")
    assert_rejected(ValueError, "w1_scale", parts, Experts, **layer_arguments() | {"w1_scale": floats(E, 2, 3)})
    with pytest.raises(ValueError, match=rf"^w1_scale: expected shape [^a-z]+ or [^b]+; got \({E + 1}, 1, 1\)$"):
        Experts(**layer_arguments() | {"w1_scale": floats(E + 1, 1, 1)})


def test_experts_that_tokens_choose_from():
    for size, wanted in ((9, 9), (2, E)):
        assert Experts(**layer_arguments(), expert_map=np.zeros(size, np.int32))._spec.experts_routed_to == wanted
    assert Experts(**layer_arguments())._spec.experts_routed_to == E


def test_more_experts_than_a_gpu_takes():
    spec = Experts(**layer_arguments(experts=2049))._spec  # the reference takes them
    assert_rejected(ValueError, "w1", ("at most 2048 experts on a GPU", "got 2049"), pipeline.Layer, spec, "sm90")


def test_repr():
    assert repr(Experts(**layer_arguments())) == f"<Experts E={E}, K={K}, N={N}, silu, reference on the CPU>"


@pytest.mark.parametrize(("device", "kind"), [("cuda:0", TypeError), (-1, ValueError), (True, TypeError)])
def test_backends_of_no_device(device, kind):
    assert_rejected(kind, "device", (repr(device),), cupy_moe.backends, device)


def test_arrays_of_another_device():
    """Such as a torch tensor left on the CPU, whose address a kernel cannot read."""
    x = floats(1)
    parts = ("on cuda:1", "got one on the CPU")
    assert_rejected(TypeError, "x", parts, checks.describe, "x", x, arrays.library_of(x), 1)


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**126])
def test_outermost_scales(scale):
    Experts(**layer_arguments(), a1_scale=scale, a2_scale=np.float32(scale))
    assert_rejected(ValueError, "a1_scale", ("from 2**-126",), Experts, **layer_arguments(),
                    a1_scale=scale * 2 if scale > 1 else scale / 2)
