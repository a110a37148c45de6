# SPDX-License-Identifier: Apache-2.0
"""What the GPU tests share: random layers and routing, poison, and the measures of error.

Large arrays are drawn on the GPU by a hash of their index, so that a case is the same everywhere and needs no cuRAND.
"""

from __future__ import annotations

import gc
import sys
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import Experts, Workspace, e4m3, reference

cupy = pytest.importorskip("cupy")

LAYER_LIMIT = 1e-2
"""Relative Frobenius error of the layer, flips of single codes in the requantisation included."""
STEP_LIMIT = 3e-3
"""The same of the steps that do not requantise."""

DTYPES = {name: np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name))
          for name in ("float16", "bfloat16", "float32")}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")
W1_KINDS = ("(E,)", "(E, 1)", "(E, 1, 1)", "(E, 2)", "(E, n)", "(E, n, 1)")
W2_KINDS = ("(E,)", "(E, 1)", "(E, 1, 1)", "(E, n)", "(E, n, 1)")
ROUTINGS = ("uniform", "skewed", "one")
SCHEMES = {
    "tensor": {"kinds": ("(E,)", "(E,)"), "per_act_token": False},
    "token": {"kinds": ("(E, n)", "(E, n)"), "per_act_token": True},
}

CODE_STD = 130.0
_TABLE = e4m3.encode(
    np.array([CODE_STD * NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)
)  # a random byte becomes a normally distributed e4m3 code

_HASH = """
__device__ unsigned long long hashed(unsigned long long seed, unsigned long long i) {
    unsigned long long z = seed * 0xD1342543DE82EF95ull + (i + 1) * 0x9E3779B97F4A7C15ull;  // splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
"""
_fill_normal = cupy.ElementwiseKernel(
    "uint64 seed", "float32 y",
    "unsigned long long z = hashed(seed, i);"
    "float u = (float(z >> 40) + 0.5f) * 5.9604645e-8f, v = float(z & 0xffffff) * 5.9604645e-8f;"
    "y = sqrtf(-2.0f * logf(u)) * cospif(2.0f * v)",
    "cupy_moe_test_normal", preamble=_HASH,
)
_fill_codes = cupy.ElementwiseKernel(
    "uint64 seed, raw uint8 table", "uint8 code", "code = table[hashed(seed, i) >> 56]", "cupy_moe_test_codes",
    preamble=_HASH,
)

WORKSPACE = Workspace()
"""Shared by the tests on the default stream."""


# ---- random cases -------------------------------------------------------------------------------------------------


def normal(seed, shape, dtype="float32"):
    """Standard normal numbers."""
    y = cupy.empty(shape, np.float32)
    if y.size:
        _fill_normal(np.uint64(seed), y)
    return y.astype(DTYPES[dtype])


def random_codes(seed, shape):
    """Normally distributed e4m3 codes, none of them NaN."""
    codes = cupy.empty(shape, np.uint8)
    if codes.size:
        _fill_codes(np.uint64(seed), cupy.asarray(_TABLE), codes)
    return codes


def weight_scale(rng, kind, experts, channels, fan_in):
    """A scale of weights, of a kind in W1_KINDS, that gives products of standard normal rows a size of about 1."""
    per_expert = {"(E, 2)": 2, "(E, n)": channels, "(E, n, 1)": channels}.get(kind, 1)
    scale = rng.uniform(0.8, 1.2, (experts, per_expert)).astype(np.float32) / np.float32(CODE_STD * fan_in**0.5)
    shapes = {"(E,)": (experts,), "(E, 1, 1)": (experts, 1, 1), "(E, n, 1)": (experts, channels, 1)}
    return cupy.asarray(scale.reshape(shapes.get(kind, scale.shape)))


def make_weights(seed, experts, hidden, inner, *, gated=True):
    """``w1`` and ``w2``, random codes."""
    rows = inner * (2 if gated else 1)
    return random_codes(seed, (experts, rows, hidden)), random_codes(seed + 1, (experts, hidden, inner))


def make_layer(
    seed, experts, hidden, inner, *, kinds=("(E,)", "(E,)"), activation="silu", bias=None, weights=None, **options
):
    """The keyword arguments of `Experts` (and of the reference) for random weights; ``bias`` is the dtype of both."""
    rng = np.random.default_rng(seed)
    gated = not activation.endswith("no_mul")
    rows = inner * (2 if gated else 1)
    w1, w2 = weights or make_weights(seed, experts, hidden, inner, gated=gated)
    if bias is not None:
        options["w1_bias"] = normal(seed + 2, (experts, rows), bias)
        options["w2_bias"] = normal(seed + 3, (experts, hidden), bias)
    return {
        "w1": w1, "w2": w2,
        "w1_scale": weight_scale(rng, kinds[0], experts, rows, hidden),
        "w2_scale": weight_scale(rng, kinds[1], experts, hidden, inner),
        "activation": activation, **options,
    }


def make_routing(seed, tokens, topk, experts, kind="uniform", dtype="int32"):
    """``topk_weights`` and ``topk_ids``.

    Kinds: "uniform" (different experts for a token, where there are enough), "skewed" (few experts get most tokens,
    experts repeat within tokens), "one" (all to the last expert), "wild" (many ids are no experts).
    """
    rng = np.random.default_rng(seed)
    if kind == "uniform" and topk <= experts:
        ids = rng.random((tokens, experts)).argsort(axis=1)[:, :topk]
    elif kind == "skewed":
        popularity = 1 / (1.0 + np.arange(experts)) ** 1.5
        ids = rng.choice(experts, (tokens, topk), p=popularity / popularity.sum())
    elif kind == "one":
        ids = np.full((tokens, topk), experts - 1)
    else:
        ids = rng.integers(0, experts, (tokens, topk))
    if kind == "wild":
        far = 2**40 if dtype == "int64" else 2**31 - 1
        odd = np.array([-1, experts, -far, far, -2, experts + 1])
        ids = np.where(rng.random(ids.shape) < 0.4, rng.choice(odd, ids.shape), ids)
    weights = rng.uniform(0.3, 1, (tokens, topk)).astype(np.float32)
    return cupy.asarray(weights), cupy.asarray(np.ascontiguousarray(ids).astype(dtype))


# ---- poison -------------------------------------------------------------------------------------------------------


def poison(array):
    """Fill with bytes of 0xFF: NaN in every floating type, -1 in integers."""
    if array.size:
        array.reshape(-1).view(np.uint8).fill(0xFF)
    return array


def poisoned(shape, dtype):
    """A new array full of NaN."""
    return poison(cupy.empty(shape, DTYPES[dtype]))


def poison_workspace(workspace):
    """Fill scratch memory with NaN, on the current stream."""
    if workspace.nbytes:
        memory = cupy.cuda.UnownedMemory(workspace._memory.ptr, workspace.nbytes, workspace)
        poison(cupy.ndarray(workspace.nbytes, np.uint8, cupy.cuda.MemoryPointer(memory, 0)))


# ---- measures -----------------------------------------------------------------------------------------------------


def same_bits(a, b):
    """Whether two arrays of one library are equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.reshape(-1).view(np.uint8) for x in (a, b))
    return bool((a == b).all())


def relative_error(got, want):
    """||got - want|| / ||want|| over the places where ``want`` is finite; ``got`` has to be finite just there."""
    assert got.shape == want.shape
    got, want = got.astype(np.float32), want.astype(np.float32)
    finite = abs(want) < np.float32(np.inf)
    astray = int(((abs(got) < np.float32(np.inf)) != finite).sum())
    assert astray == 0, f"{astray} of {want.size} values are finite in one result only"
    xp = e4m3.array_namespace(want)
    want = xp.where(finite, want, 0)
    difference = xp.where(finite, got, 0) - want
    norm = float((want * want).sum(dtype=np.float64)) ** 0.5
    distance = float((difference * difference).sum(dtype=np.float64)) ** 0.5
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / norm


def code_steps(got, want):
    """How many e4m3 steps lie between two arrays of codes, elementwise; NaN has to stand in the same places."""
    got, want = (np.asarray(x).view(np.uint8) for x in (got, want))
    missing = (got & 0x7F) == 0x7F
    np.testing.assert_array_equal(missing, (want & 0x7F) == 0x7F)
    rank = [np.where(x < 0x80, x.astype(np.int32), 0x80 - x.astype(np.int32)) for x in (got, want)]
    return np.where(missing, 0, abs(rank[0] - rank[1]))


# ---- a step against the reference on the host ----------------------------------------------------------------------


def host(x):
    return x.get() if isinstance(x, cupy.ndarray) else x


def expected(function, *args, **options):
    """A function of the reference on copies in host memory."""
    return function(*map(host, args), **{name: host(x) for name, x in options.items()})


def assert_equal(got, want):
    """Bitwise, whatever the type."""
    got, want = host(got), np.ascontiguousarray(host(want))
    assert got.shape == want.shape
    assert got.itemsize == want.itemsize
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint8), want.reshape(-1).view(np.uint8))


def sorted_rows(seed, rows, experts, *, tail=3):
    """Experts of sorted rows, the last ``tail`` of none, and their offsets; one expert stays empty."""
    counts = np.random.default_rng(seed).multinomial(rows - tail, np.ones(experts) / experts).astype(np.int32)
    if experts > 1:
        counts[0], counts[1] = 0, counts[0] + counts[1]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    owners = np.concatenate([np.repeat(np.arange(experts), counts), np.full(tail, -1)]).astype(np.int32)
    return cupy.asarray(owners), cupy.asarray(offsets)


# ---- the layer against the reference ------------------------------------------------------------------------------


def call_repeatedly(function, out, workspace=WORKSPACE):
    """``function(out)`` with poison in ``out`` and the workspace: five calls whose results have to be bitwise equal.

    The later ones replay a graph that the layer has recorded, into another ``out`` where that can be like the first.
    """
    alike = out.flags.c_contiguous and out.data.ptr % 16 == 0
    other, results = cupy.empty(out.shape, out.dtype) if alike else out, []
    for target in (out, other, out, other, out):
        poison(target)
        poison_workspace(workspace)
        assert function(target) is target
        results.append(target.copy())
    assert all(same_bits(results[0], result) for result in results), "calls with the same arguments differ"
    return out


def run_layer(layer, hidden, topk_weights, topk_ids, *, experts=None, a1_scale=None, out_dtype=None):
    """Run the layer on poisoned memory; returns the result and that of the reference.

    ``experts`` is an `Experts` of ``layer`` with the shared workspace; None makes one.
    """
    experts = experts or Experts(**layer, workspace=WORKSPACE)
    out_dtype = out_dtype or ("bfloat16" if hidden.dtype == np.uint8 else hidden.dtype.name)
    out = poisoned(hidden.shape, out_dtype)
    got = call_repeatedly(lambda out: experts(hidden, topk_weights, topk_ids, out, a1_scale=a1_scale), out)
    options = layer if a1_scale is None else {**layer, "a1_scale": a1_scale}
    options = {**options, "out_dtype": "float32"}
    return got, reference.fused_experts(hidden, topk_weights=topk_weights, topk_ids=topk_ids, **options)


def check_layer(layer, hidden, topk_weights, topk_ids, **options):
    """`run_layer`, and its result compared with the reference."""
    got, want = run_layer(layer, hidden, topk_weights, topk_ids, **options)
    error = relative_error(got, want)
    assert error <= LAYER_LIMIT, f"relative error {error:.2e}"
    return got, want


def make_small(
    seed, *, tokens=65, topk=3, experts=6, hidden=128, inner=256, dtype="bfloat16", routing="uniform", **options
):
    """A layer and a call of it: large enough that a flip of one code stays far below LAYER_LIMIT.

    Sums of few products are the least exact in the tensor cores: wide distributions take a larger ``hidden``.
    """
    layer = make_layer(seed, experts, hidden, inner, **options)
    return layer, normal(seed + 4, (tokens, hidden), dtype), *make_routing(seed, tokens, topk, experts, routing)


def to_torch(torch, options):
    """Arguments with CuPy arrays as torch tensors over the same memory, ``w1`` and ``w2`` as float8_e4m3fn."""
    made = {name: torch.from_dlpack(x) if isinstance(x, cupy.ndarray) else x for name, x in options.items()}
    return {name: x.view(torch.float8_e4m3fn) if name in ("w1", "w2") else x for name, x in made.items()}


def free_device_memory():
    """Give back what the memory pools of CuPy and torch hold without need."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
