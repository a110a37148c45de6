# SPDX-License-Identifier: Apache-2.0
"""`batch_invariant`: a token's output has the same bits whatever shares the call, and whatever variant runs.

Three tokens are called one by one. Then they stand somewhere among others, one of them twice: in other numbers, with
other routing, and one of the others is NaN.
"""

import numpy as np
import pytest
from gpu_cases import (
    LAYER_LIMIT,
    WORKSPACE,
    cupy,
    make_layer,
    make_routing,
    normal,
    poison,
    poisoned,
    random_codes,
    relative_error,
    same_bits,
)
from test_gpu_graphs import capture, replay
from tuning_choices import choices, chosen, store_other_choices

import cupy_moe
from cupy_moe import Experts, backend, fused_experts, tuning

pytestmark = pytest.mark.gpu

NAMES = [name for name in backend.NAMES if name not in backend.VARIES and name != "reference"]
ROUTINGS = ("uniform", "skewed", "one", "wild")
WHO = [0, 1, 2, 0]
STATIC = {"a1_scale": 0.01, "a2_scale": 0.02}
CHANNEL = {"kinds": ("(E, n)", "(E, n, 1)")}
# E, topk, K, N; tokens; options
CASES = {
    "silu token": ((8, 2, 1024, 512), (7, 64, 222, 1000, 4096), {"per_act_token": True}),
    "silu token, many values": ((8, 2, 512, 2048), (7, 4096), {"per_act_token": True}),
    "gelu_tanh static": (
        (8, 2, 4096, 256), (7, 64, 222, 1000, 4096), {"activation": "gelu_tanh", "bias": "float32", **STATIC, **CHANNEL}
    ),
    "swigluoai token": (
        (64, 6, 512, 704), (7, 1000), {"activation": "swigluoai", "bias": "float16", "per_act_token": True, **CHANNEL}
    ),
    "gelu mixed": ((5, 3, 200, 120), (64, 1000), {"activation": "gelu", "per_act_token": True, "a2_scale": 0.02}),
    "silu_no_mul weighted": (
        (5, 3, 200, 120), (7, 1000),
        {"activation": "silu_no_mul", "per_act_token": True, "apply_router_weight_on_input": True},
    ),
    "gelu_no_mul static": ((8, 2, 1024, 512), (64, 1000), {"activation": "gelu_no_mul", **STATIC, **CHANNEL}),
    "relu2_no_mul token": (
        (8, 2, 1024, 512), (64, 1000), {"activation": "relu2_no_mul", "bias": "bfloat16", "per_act_token": True}
    ),
}


@pytest.fixture(params=NAMES)
def name(request):
    status = cupy_moe.backends()[request.param]
    if status != "available":
        pytest.skip(f"needs the backend {request.param}: {status}")
    return request.param


@pytest.fixture(autouse=True)
def _own_records(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(tuning, "CACHE", tuning.Cache())


class Case:
    """A layer, the three tokens, and what each of them gives alone."""

    def __init__(self, seed, backend_name, shape=(8, 2, 1024, 512), **options):
        self.shape, self.seed = shape, seed
        experts, topk, hidden, inner = shape
        self.layer = make_layer(seed, experts, hidden, inner, **options)
        self.experts = Experts(**self.layer, backend=backend_name, batch_invariant=True, workspace=WORKSPACE)
        self.mine = normal(seed + 4, (3, hidden), "float16"), *make_routing(seed, 3, topk, experts)
        self.alone = self.one_by_one(self.experts, self.mine)
        assert bool((abs(self.alone) < np.inf).all())
        assert bool(self.alone.any(axis=1).all())

    def one_by_one(self, experts, call):
        return cupy.concatenate([experts(*(x[i : i + 1] for x in call)) for i in range(3)])

    def company(self, tokens, routing="uniform"):
        """A call with the three among its ``tokens`` tokens, and where they are."""
        experts, topk, hidden, _ = self.shape
        seed = self.seed + tokens
        call = normal(seed, (tokens, hidden), "float16"), *make_routing(seed, tokens, topk, experts, routing)
        call[0][tokens // 2, 3] = np.nan
        places = cupy.asarray(np.random.default_rng(seed).permutation(tokens)[: len(WHO)])
        for whole, part in zip(call, self.mine, strict=True):
            whole[places] = part[cupy.asarray(WHO)]
        return call, places

    def same(self, got, places):
        return same_bits(got[places], self.alone[cupy.asarray(WHO)])

    def check(self, tokens, routing="uniform", experts=None):
        call, places = self.company(tokens, routing)
        out = poisoned(call[0].shape, "float16")
        (experts or self.experts)(*call, out)
        assert self.same(out, places), f"{tokens} tokens, {routing}"
        return out, places


@pytest.mark.parametrize("case", CASES)
def test_any_company(name, case, seed):
    shape, numbers, options = CASES[case]
    made = Case(seed, name, shape, **options)
    for i, tokens in enumerate(numbers):
        made.check(tokens, ROUTINGS[i % len(ROUTINGS)])
    (hidden, weights, ids), places = made.company(64)
    options = {**made.layer, "backend": name, "batch_invariant": True}
    assert made.same(fused_experts(hidden, topk_weights=weights, topk_ids=ids, **options), places)


@pytest.mark.parametrize("case", list(CASES)[:2])
def test_any_variant(name, case, seed):
    """Whatever tuning picks: here it is told what to pick, at last it may choose."""
    shape, _, options = CASES[case]
    made, tokens = Case(seed, name, shape, **options), 222
    rows = tokens * shape[1]
    own, default = choices(made.experts, rows), chosen(made.experts, rows)
    for tile in own.kernel.TILES:
        tuning.CACHE.store({key: dict(tile._asdict()) for key in own.tuning_keys()})
        suits = tile.suits(own.weights[1])
        assert suits == (getattr(tile, "window", 1) > 0), "no sums but float32"
        assert chosen(made.experts, rows) == ([tuple(tile)] * 2 if suits else default)
        made.check(tokens)
    assert store_other_choices(made.experts, rows) != default
    made.check(tokens)
    made.experts.tune(tokens, topk=shape[1])
    made.check(tokens, "skewed")


def test_padded_form(name, seed):
    """Its rows are those of tokens that go to one expert, with a weight of 1."""
    made = Case(seed, name, per_act_token=True)
    hidden, (num_experts, _, width, _) = made.mine[0], made.shape
    owners, ones = cupy.asarray([2, 7, 2], np.int32)[:, None], cupy.ones((3, 1), np.float32)
    alone = made.one_by_one(made.experts, (hidden, ones, owners))
    for max_tokens, counts in ((5, [0, 1, 5, 2, 0, 0, 3, 1]), (300, [300, 1, 77, 0, 33, 0, 0, 300])):
        padded = normal(seed + max_tokens, (num_experts, max_tokens, width), "float16")
        places = cupy.asarray([2, 2, 7]), cupy.asarray([counts[2] - 1, 0, counts[7] - 1])
        padded[places] = hidden[[0, 2, 1]]
        got = made.experts.batched(padded, cupy.asarray(counts, np.int32))
        assert same_bits(got[places], alone[[0, 2, 1]]), max_tokens


def test_fp8_hidden_states(name, seed):
    made = Case(seed, name, a1_scale=0.01, a2_scale=0.02)
    codes, scale = random_codes(seed, (64, 1024)), abs(normal(seed, (64, 1))) * 0.005 + 0.005
    weights, ids = make_routing(seed, 64, 2, 8)
    got = made.experts(codes, weights, ids, a1_scale=scale)
    for i in (0, 17, 63):
        one = slice(i, i + 1)
        assert same_bits(got[one], made.experts(codes[one], weights[one], ids[one], a1_scale=scale[one]))


def test_graphs(name, seed):
    """Captured, and recorded by the layer itself from the third call on."""
    made = Case(seed, name, per_act_token=True)
    experts = Experts(**made.layer, backend=name, batch_invariant=True)  # a graph keeps its workspace
    for _ in range(4):
        made.check(64, experts=experts)
    call, places = made.company(64)
    buffers, out = [cupy.zeros_like(x) for x in call], poisoned(call[0].shape, "float16")
    experts(*buffers, out)
    graph, stream = capture(lambda: experts(*buffers, out))
    for routing in ROUTINGS:
        call, places = made.company(64, routing)
        for buffer, x in zip(buffers, call, strict=True):
            buffer[...] = x
        poison(out)
        cupy.cuda.Device().synchronize()
        replay(graph, stream)
        assert made.same(out, places), routing


def test_reference_on_the_gpu(seed):
    made = Case(seed, "reference", (5, 3, 200, 120), per_act_token=True)
    for tokens in (7, 64, 333):
        made.check(tokens, "skewed")


# ---- what the comparison finds ------------------------------------------------------------------------------------


def test_one_changed_bit_is_found(name, seed):
    made = Case(seed, name, per_act_token=True)
    out, places = made.check(64)
    out.view(np.uint16)[int(places[1]), 7] ^= 1
    assert not made.same(out, places)


def test_dynamic_scales_per_tensor_vary(name, seed):
    made = Case(seed, name, per_act_token=True)
    per_tensor = Experts(**{**made.layer, "per_act_token": False}, backend=name, workspace=WORKSPACE)
    call, places = made.company(64)
    alone = made.one_by_one(per_tensor, made.mine)
    assert not same_bits(per_tensor(*call)[places], alone[cupy.asarray(WHO)])


def test_another_order_along_the_sums_is_found(name, seed):
    """The same layer with its intermediate channels in another order, which is that of the second product's sums."""
    if name == "mma":
        pytest.skip("on this device its sums of 64 columns are so exact that their order does not show")
    made = Case(seed, name, per_act_token=True)
    num_experts, _, hidden, inner = made.shape
    w1, w2 = made.layer["w1"].reshape(num_experts, 2, inner, hidden), made.layer["w2"]
    # by 48: other columns share an instruction, which adds 16 or 32 of them
    turned = {"w1": cupy.roll(w1, 48, axis=2).reshape(made.layer["w1"].shape), "w2": cupy.roll(w2, 48, axis=2)}
    experts = Experts(**{**made.layer, **turned}, backend=name, batch_invariant=True, workspace=WORKSPACE)
    got = made.one_by_one(experts, made.mine)
    assert not same_bits(got, made.alone)
    assert relative_error(got, made.alone) < LAYER_LIMIT


def test_explanation(name, seed):
    made = Case(seed, name, per_act_token=True)
    assert f"{name} runs" in made.experts.explain()
    for other in backend.VARIES:
        assert f"{other} is available" not in made.experts.explain()
        with pytest.raises(ValueError, match=f"got '{other}', but batch_invariant=True"):
            Experts(**made.layer, batch_invariant=True, backend=other)
