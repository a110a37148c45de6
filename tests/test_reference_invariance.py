# SPDX-License-Identifier: Apache-2.0
"""The reference with `batch_invariant`: a token's output has the same bits whatever shares the call."""

import ml_dtypes
import numpy as np
import pytest

from cupy_moe import Experts, e4m3, fused_experts
from cupy_moe.activations import ACTIVATIONS

K, N, E, TOPK, TOKENS = 200, 115, 5, 3, 40
FP8 = ml_dtypes.float8_e4m3fn
MODES = {
    "token": {"per_act_token": True},
    "static": {"a1_scale": 0.01, "a2_scale": 0.02},
    "static per expert": {"a1_scale": np.linspace(0.01, 0.02, E, dtype=np.float32), "a2_scale": 0.02},
    "mixed": {"per_act_token": True, "a2_scale": 0.02},
}


def make_layer(rng, activation="silu", **options):
    rows = N * (2 if ACTIVATIONS[activation].gated else 1)
    return {
        "w1": rng.normal(0, 60, (E, rows, K)).astype(FP8), "w2": rng.normal(0, 60, (E, K, N)).astype(FP8),
        "w1_scale": rng.uniform(0.001, 0.002, (E, rows)).astype(np.float32),
        "w2_scale": rng.uniform(0.001, 0.002, (E, K)).astype(np.float32),
        "w1_bias": rng.normal(0, 1, (E, rows)).astype(np.float32), "activation": activation, **options,
    }


def make_call(rng, tokens=TOKENS):
    hidden = rng.normal(0, 1, (tokens, K)).astype(np.float32)
    ids = rng.random((tokens, E)).argsort(axis=1)[:, :TOPK].astype(np.int32)
    return hidden, rng.uniform(0.3, 1, (tokens, TOPK)).astype(np.float32), ids


def run(layer, hidden, weights, ids):
    return fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer)


def same_bits(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def companies(rng, call):
    """The first three tokens alone, and in other companies: the call, and where they are in it."""
    for tokens in (1, 2, 7, 64, 333):
        others = make_call(rng, tokens)
        others[0][0] = np.nan
        together = [np.concatenate([mine[:3], other, mine[:1]]) for mine, other in zip(call, others, strict=True)]
        order = rng.permutation(len(together[0]))
        places = [int(np.flatnonzero(order == i)[0]) for i in (0, 1, 2, tokens + 3)]
        yield [x[order] for x in together], places
    yield call, [0, 1, 2, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_are_those_of_a_call_alone(activation, mode):
    rng = np.random.default_rng(1)
    layer = make_layer(rng, activation, batch_invariant=True, **MODES[mode])
    call = make_call(rng)
    alone = [run(layer, *(x[i : i + 1] for x in call))[0] for i in (0, 1, 2, 0)]
    assert all(np.isfinite(x).all() and x.any() for x in alone)
    for (hidden, weights, ids), places in companies(rng, call):
        got = run(layer, hidden, weights, ids)
        assert all(same_bits(got[place], want) for place, want in zip(places, alone, strict=True))


def test_padded_form():
    """Its rows are those of tokens that go to one expert, with a weight of 1."""
    rng = np.random.default_rng(2)
    experts = Experts(**make_layer(rng, batch_invariant=True, per_act_token=True))
    hidden, counts = rng.normal(0, 1, (E, 6, K)).astype(np.float16), np.array([6, 0, 1, 3, 5], np.int32)
    got = experts.batched(hidden, counts)
    for expert, count in enumerate(counts):
        for i in range(count):
            alone = experts(hidden[expert, i : i + 1], np.ones((1, 1), np.float32), np.full((1, 1), expert, np.int32))
            assert same_bits(got[expert, i], alone[0])


def test_fp8_hidden_states_bring_their_scales():
    rng = np.random.default_rng(3)
    experts = Experts(**make_layer(rng, batch_invariant=True, a2_scale=0.02))
    hidden, weights, ids = make_call(rng)
    codes, scale = (100 * hidden).astype(FP8), rng.uniform(0.01, 0.02, (TOKENS, 1)).astype(np.float32)
    got = experts(codes, weights, ids, a1_scale=scale)
    for i in range(TOKENS):
        one = slice(i, i + 1)
        assert same_bits(got[one], experts(codes[one], weights[one], ids[one], a1_scale=scale[one]))


def test_a_scale_per_tensor_varies():
    """The comparison finds what depends on the other tokens."""
    rng = np.random.default_rng(4)
    layer, (hidden, weights, ids) = make_layer(rng), make_call(rng)
    together, alone = run(layer, hidden, weights, ids), run(layer, hidden[:1], weights[:1], ids[:1])
    assert not same_bits(together[0], alone[0])


def test_exact_products():
    """They are the integers that they stand for, rounded once; every order of the columns gives the same bits."""
    rng = np.random.default_rng(5)
    codes = [rng.integers(0, 127, (n, 5000), np.uint8) | rng.integers(0, 2, (n, 5000), np.uint8) << 7 for n in (7, 9)]
    a, b = (e4m3.decode(x) for x in codes)
    whole = [np.rint(x * 2.0**9).astype(np.int64).astype(object) for x in (a, b)]
    want = (whole[0] @ whole[1].T).astype(np.float64) * 2.0**-18
    got = e4m3.exact_matmul(a, b.T)
    np.testing.assert_array_equal(got, want)
    order = rng.permutation(5000)
    assert same_bits(e4m3.exact_matmul(a[:, order], b[:, order].T), got)
    assert e4m3.EXACT_TERMS * e4m3.MAX**2 * 2.0**18 <= 2.0**53


def test_products_longer_than_exact_ones(monkeypatch):
    monkeypatch.setattr(e4m3, "EXACT_TERMS", 64)
    a, b = (e4m3.decode(np.random.default_rng(i).integers(0, 127, (8, 200), np.uint8)) for i in (6, 7))
    got = e4m3.exact_matmul(a, b.T)
    np.testing.assert_allclose(got, a.astype(np.float64) @ b.T.astype(np.float64), rtol=1e-12)
    assert same_bits(got[3:4], e4m3.exact_matmul(a[3:4], b.T))


def test_the_result_is_that_of_the_definition():
    rng = np.random.default_rng(8)
    layer, call = make_layer(rng, per_act_token=True), make_call(rng)
    plain, invariant = (run({**layer, "batch_invariant": on}, *call) for on in (False, True))
    assert np.linalg.norm(plain - invariant) < 1e-3 * np.linalg.norm(plain)
