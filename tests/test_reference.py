# SPDX-License-Identifier: Apache-2.0
"""The reference layer against a loop over tokens and slots in torch, in float64 on dequantised weights."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import reference

torch = pytest.importorskip("torch")
F = torch.nn.functional

M, K, N, E, TOPK = 11, 40, 24, 4, 3


def swigluoai(gate, up):
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swigluoai": swigluoai,
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "relu2_no_mul": lambda x: F.relu(x).square(),
}

# How a table of one scale per output row (E, rows) is narrowed to what the caller passes.
SCALE_KINDS = {
    "(E,)": lambda table: table[:, 0],
    "(E, 1)": lambda table: table[:, :1],
    "(E, 1, 1)": lambda table: table[:, :1, None],
    "(E, 2)": lambda table: table[:, [0, -1]],
    "(E, rows)": lambda table: table,
    "(E, rows, 1)": lambda table: table[:, :, None],
}


def scale_table(rng, rows, kind):
    """Draw a scale per output row, constant over whatever `kind` has one scale for."""
    table = rng.uniform(0.004, 0.02, (E, rows)).astype(np.float32)
    if "rows" in kind:
        return table
    half = rows // 2 if kind == "(E, 2)" else rows
    return np.repeat(table[:, ::half], half, axis=1)


@dataclass
class Case:
    """A random layer; `options` are passed on, `table1` and `table2` are the weight scales per output row."""

    seed: int = 0
    tokens: int = M
    topk: int = TOPK
    activation: str = "silu"
    w1_kind: str = "(E,)"
    w2_kind: str = "(E,)"
    dtype: Any = np.float32
    bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        rows = N if self.activation.endswith("no_mul") else 2 * N
        self.hidden = rng.normal(0, 1, (self.tokens, K)).astype(self.dtype)
        self.w1 = rng.normal(0, 60, (E, rows, K)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        self.w2 = rng.normal(0, 60, (E, K, N)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        self.table1, self.table2 = scale_table(rng, rows, self.w1_kind), scale_table(rng, K, self.w2_kind)
        self.b1 = rng.normal(0, 2, (E, rows)).astype(np.float32) if self.bias else None
        self.b2 = rng.normal(0, 2, (E, K)).astype(np.float32) if self.bias else None
        self.weights = rng.uniform(0.1, 1, (self.tokens, self.topk)).astype(np.float32)
        # Experts may repeat within a token.
        self.ids = rng.integers(0, E, (self.tokens, self.topk)).astype(np.int32)

    def run(self):
        options: dict[str, Any] = {"out_dtype": "float32", "activation": self.activation} | self.options
        return reference.fused_experts(
            self.hidden, self.w1, self.w2, self.weights, self.ids,
            w1_scale=SCALE_KINDS[self.w1_kind](self.table1), w2_scale=SCALE_KINDS[self.w2_kind](self.table2),
            w1_bias=self.b1, w2_bias=self.b2, **options,
        )

    def run_torch(self):
        return torch_layer(self).numpy()


def round_e4m3(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


def dynamic_scale(values):
    finite = [v[v.isfinite()].abs() for v in values]
    return torch.cat([*finite, torch.tensor([1e-30])]).max() / 448


def quantise(rows, experts, static, per_token):
    """Round float32 rows to e4m3; return them and the scale of each."""
    if static is not None:
        static = torch.as_tensor(static, dtype=torch.float32).reshape(-1)
        scales = [static[e if len(static) > 1 else 0] for e in experts]
    elif per_token:
        scales = [dynamic_scale([x]) for x in rows]
    else:
        scales = [dynamic_scale(rows)] * len(rows)
    return [round_e4m3(x / s) for x, s in zip(rows, scales, strict=True)], scales


def torch_layer(case):
    options = case.options
    per_token = options.get("per_act_token", False)
    on_input = options.get("apply_router_weight_on_input", False)
    w1, w2 = (torch.from_numpy(w.astype(np.float64) * table[:, :, None].astype(np.float64))
              for w, table in ((case.w1, case.table1), (case.w2, case.table2)))
    pairs = []  # (token, local expert, router weight) in slot order
    for token, slot in np.ndindex(case.ids.shape):
        expert = int(case.ids[token, slot])
        if "expert_map" in options:
            known = 0 <= expert < len(options["expert_map"])
            expert = int(options["expert_map"][expert]) if known else -1
        if 0 <= expert < E:
            pairs.append((token, expert, torch.tensor(case.weights[token, slot])))
    tokens, experts, weights = ([p[i] for p in pairs] for i in range(3))

    a1 = options.get("a1_scale")
    if case.hidden.dtype in (np.uint8, ml_dtypes.float8_e4m3fn):
        codes = torch.from_numpy(case.hidden.view(np.uint8)).view(torch.float8_e4m3fn).to(torch.float32)
        a1 = np.broadcast_to(np.reshape(a1, (-1, 1)), (case.tokens, 1))[:, 0]
        q1 = [codes[t] for t in tokens]
        s1 = [torch.tensor(a1[t]) * (w if on_input else 1) for t, w in zip(tokens, weights, strict=True)]
    else:
        hidden = torch.from_numpy(case.hidden.astype(np.float32))
        rows = [hidden[t] * (w if on_input else 1) for t, w in zip(tokens, weights, strict=True)]
        if a1 is None and not per_token and not on_input:
            a1 = dynamic_scale(list(hidden))  # tokens without a valid expert count as well
        q1, s1 = quantise(rows, experts, a1, per_token)

    activated = []
    for q, s, e in zip(q1, s1, experts, strict=True):
        h = (w1[e] @ q.double()) * s.double()
        h = (h if case.b1 is None else h + torch.from_numpy(case.b1[e]).double()).float()
        gated = not case.activation.endswith("no_mul")
        activated.append(ACTIVATIONS[case.activation](*(h.split(N) if gated else (h,))))
    q2, s2 = quantise(activated, experts, options.get("a2_scale"), per_token)

    out = torch.zeros(case.tokens, K, dtype=torch.float64)
    for t, e, w, q, s in zip(tokens, experts, weights, q2, s2, strict=True):
        y = (w2[e] @ q.double()) * s.double()
        y = y if case.b2 is None else y + torch.from_numpy(case.b2[e]).double()
        out[t] += y * (1 if on_input else w.double())
    return out.float()


def assert_agrees(case):
    """Token by token: a code that falls to the other side of a tie may move a few of them, never by much."""
    got, expected = case.run().astype(np.float32), case.run_torch()
    assert got.shape == expected.shape
    size = np.linalg.norm(expected, axis=1)
    error = np.linalg.norm(got - expected, axis=1) / np.where(size == 0, 1, size)
    assert np.count_nonzero(size) > case.tokens // 2, "the case tests nothing"
    assert np.median(error) < 2e-6, f"{case.seed=} {error=}"
    assert error.max() < 2e-2, f"{case.seed=} {error=}"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, bias):
    assert_agrees(Case(seed=1, activation=activation, bias=bias))


@pytest.mark.parametrize("w2_kind", [kind for kind in SCALE_KINDS if kind != "(E, 2)"])
@pytest.mark.parametrize("w1_kind", SCALE_KINDS)
def test_weight_scales(w1_kind, w2_kind):
    assert_agrees(Case(seed=2, w1_kind=w1_kind, w2_kind=w2_kind, bias=True))


@pytest.mark.parametrize("kind", ["(E,)", "(E, rows)"])
def test_weight_scales_without_gate(kind):
    assert_agrees(Case(seed=3, w1_kind=kind, w2_kind=kind, activation="silu_no_mul"))


PER_EXPERT = np.array([0.004, 0.008, 0.012, 0.02], np.float32)
QUANTISATION = {
    "per tensor": {},
    "per token": {"per_act_token": True},
    "static scalars": {"a1_scale": 0.01, "a2_scale": np.float32(0.3)},
    "static (1,)": {"a1_scale": np.array([0.01], np.float32), "a2_scale": np.array([0.3], np.float32)},
    "static per expert": {"a1_scale": PER_EXPERT, "a2_scale": 40 * PER_EXPERT},
    "static saturating": {"a1_scale": 0.002, "a2_scale": 0.01},
    "static a1, a2 per token": {"a1_scale": 0.01, "per_act_token": True},
    "a1 per tensor, static a2": {"a2_scale": 40 * PER_EXPERT},
}


@pytest.mark.parametrize("on_input", [False, True], ids=["weight on output", "weight on input"])
@pytest.mark.parametrize("options", QUANTISATION.values(), ids=QUANTISATION)
def test_activation_quantisation(options, on_input):
    assert_agrees(Case(seed=4, bias=True, options=options | {"apply_router_weight_on_input": on_input}))


@pytest.mark.parametrize("on_input", [False, True], ids=["weight on output", "weight on input"])
@pytest.mark.parametrize("per_token", [False, True], ids=["scalar", "(M, 1)"])
@pytest.mark.parametrize("bits", [False, True], ids=["float8", "uint8"])
def test_fp8_input(bits, per_token, on_input):
    scale = np.linspace(0.005, 0.03, M, dtype=np.float32)[:, None] if per_token else 0.01
    case = Case(seed=5, options={"a1_scale": scale, "apply_router_weight_on_input": on_input})
    case.hidden = (case.hidden * 100).astype(ml_dtypes.float8_e4m3fn)
    if bits:
        case.hidden = case.hidden.view(np.uint8)
    assert_agrees(case)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_input_types(dtype):
    assert_agrees(Case(seed=6, dtype=dtype))


@pytest.mark.parametrize("topk", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_shapes(tokens, topk):
    assert_agrees(Case(seed=7, tokens=tokens, topk=topk))


@pytest.mark.parametrize("on_input", [False, True], ids=["weight on output", "weight on input"])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "expert_map"])
def test_invalid_ids_add_nothing(mapped, on_input):
    case = Case(seed=8, tokens=20, bias=True, options={"apply_router_weight_on_input": on_input})
    if mapped:
        case.options["expert_map"] = np.array([-1, 3, 0, -1, 1, E, 2, -5], np.int32)
    case.ids = np.random.default_rng(9).integers(-2, 10, case.ids.shape)
    case.ids[3] = [2**31, -(2**33), 2**32]  # no valid expert at all; 2**32 is 0 if cut to 32 bits
    case.hidden[3] *= 50  # and yet in the maximum, unless the weight goes on the input
    valid = (case.ids >= 0) & (case.ids < (8 if mapped else E))
    assert 0 < valid.sum() < valid.size
    case.weights[~valid] = np.nan
    assert_agrees(case)
    assert not case.run()[3].any()


def test_every_token_to_one_expert():
    case = Case(seed=10)
    case.ids[:] = 2
    assert_agrees(case)
