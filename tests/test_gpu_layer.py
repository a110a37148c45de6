# SPDX-License-Identifier: Apache-2.0
"""The whole layer against the reference: real shapes, numbers of tokens, routing, large offsets, random cases."""

import numpy as np
import pytest
from gpu_cases import (
    ACTIVATIONS,
    DTYPES,
    LAYER_LIMIT,
    ROUTINGS,
    SCHEMES,
    STEP_LIMIT,
    W1_KINDS,
    W2_KINDS,
    WORKSPACE,
    call_repeatedly,
    check_layer,
    cupy,
    free_device_memory,
    make_layer,
    make_routing,
    make_weights,
    normal,
    poison,
    poisoned,
    random_codes,
    relative_error,
    run_layer,
    same_bits,
)

from cupy_moe import Experts, Workspace, backend, products, reference

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

SHAPES = ((8, 2, 4096, 28672), (8, 2, 14336, 4096), (64, 6, 2048, 1408), (32, 8, 1024, 1024), (40, 8, 1024, 1536))
REAL_SHAPES = (
    (16, 4, 2048, 768), (16, 4, 2880, 2880), (16, 4, 4096, 1536), (16, 4, 5120, 1536), (16, 4, 7168, 2048)
)
TOKENS = (0, 1, 2, 3, 7, 16, 17, 64, 65, 222, 1000, 4096)
DTYPE_OF = {tokens: list(DTYPES)[i % 3] for i, tokens in enumerate(TOKENS)}


class Shape:
    """The weights of a shape, and an `Experts` for each scheme, made at its first use."""

    def __init__(self, experts, topk, hidden, inner):
        self.experts, self.topk, self.hidden, self.inner = experts, topk, hidden, inner
        self.weights = make_weights(experts + hidden, experts, hidden, inner)
        self._made = {}

    def of(self, scheme):
        if scheme not in self._made:
            layer = make_layer(
                5, self.experts, self.hidden, self.inner, weights=self.weights, **SCHEMES[scheme]
            )
            self._made[scheme] = layer, Experts(**layer, workspace=WORKSPACE)
        return self._made[scheme]

    def clear(self):
        self.weights = None
        self._made.clear()
        free_device_memory()


NAME = "E{0[0]}-top{0[1]}-K{0[2]}-N{0[3]}".format


@pytest.fixture(scope="module", params=SHAPES, ids=NAME)
def shape(request):
    made = Shape(*request.param)
    yield made
    made.clear()


@pytest.fixture(scope="module", params=REAL_SHAPES, ids=NAME)
def real_shape(request):
    made = Shape(*request.param)
    yield made
    made.clear()


def check_cell(shape, scheme, tokens, routing, seed, dtype):
    """The layer at one number of tokens against the reference, a few tokens drawn several times.

    In a few tokens one flipped code counts for much, most of all where all slots of a token are copies at one expert:
    such a draw may exceed LAYER_LIMIT by itself, so those cells have to keep it over all draws.
    """
    layer, experts = shape.of(scheme)
    pairs = []
    for draw in range(seed, seed + (16 if 0 < tokens < 7 else 1)):
        hidden = normal(draw, (tokens, shape.hidden), dtype)
        call = make_routing(draw, tokens, shape.topk, shape.experts, routing)
        pairs.append(run_layer(layer, hidden, *call, experts=experts))
    if routing != "one" or shape.inner >= 4096:
        error = relative_error(*pairs[0])
        assert error <= LAYER_LIMIT, f"relative error {error:.2e}"
    got, want = (cupy.concatenate(results) for results in zip(*pairs, strict=True))
    error = relative_error(got, want)
    assert error <= LAYER_LIMIT, f"relative error {error:.2e} over {len(pairs)} draws"
    assert got.dtype == hidden.dtype
    assert experts.backend == backend.choose(0, None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_seed_shapes(shape, scheme, tokens, routing, seed):
    check_cell(shape, scheme, tokens, routing, seed, DTYPE_OF[tokens])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_hidden_sizes(real_shape, scheme, tokens, seed):
    for dtype in DTYPES if tokens == 17 else ["bfloat16"]:
        check_cell(real_shape, scheme, tokens, "skewed", seed, dtype)


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_every_algorithm(shape, tokens, seed):
    _, ids = make_routing(seed, tokens, shape.topk, shape.experts, "skewed")
    offsets = reference.route(ids, shape.experts).expert_offsets
    if backend.backends(0)["cublaslt"] != "available":
        pytest.skip("needs the backend cublaslt")
    for weights in shape.weights:
        a = random_codes(seed, (ids.size, weights.shape[2]))
        want = reference.grouped_gemm_fp8(a, weights, offsets, out_dtype="float32")
        for choice in range(100):
            try:
                product, unit, owners = products.multiply(0, "cublaslt", a, weights, offsets, choice=choice)
            except IndexError:
                break
            error = relative_error(product.astype(np.float32) * np.float32(unit), want)
            assert error <= STEP_LIMIT, f"algorithm {choice}: relative error {error:.2e}"
            assert (owners >= 0).all()
        assert choice > 0


@pytest.fixture
def large():
    """Room for the largest cases: nothing else is held before, nothing stays behind."""
    free_device_memory()
    yield
    free_device_memory()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize(("tokens", "scheme"), [(7232, "tensor"), (7232, "token"), (40000, "tensor")])
def test_many_tokens(tokens, scheme, routing, seed):
    hidden_size, inner = 2048, 5120
    layer = make_layer(seed, 8, hidden_size, inner, **SCHEMES[scheme])
    hidden, workspace = normal(seed, (tokens, hidden_size), "bfloat16"), Workspace()
    experts = Experts(**layer, workspace=workspace)
    call = make_routing(seed, tokens, 2, 8, routing)
    out = call_repeatedly(lambda out: experts(hidden, *call, out), poisoned(hidden.shape, "bfloat16"), workspace)
    want = reference.fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], out_dtype="float32", **layer)
    assert relative_error(out, want) <= LAYER_LIMIT


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("routing", ["uniform", "one"])
def test_more_than_2_to_31_elements(routing, seed):
    tokens, topk, hidden_size, inner = 40000, 6, 2048, 5120
    assert tokens * topk * 2 * inner > 2**31
    layer = make_layer(seed, 8, hidden_size, inner, **SCHEMES["token"])
    hidden, workspace = normal(seed, (tokens, hidden_size), "bfloat16"), Workspace()
    experts = Experts(**layer, workspace=workspace)
    weights, ids = make_routing(seed, tokens, topk, 8, routing)
    out = call_repeatedly(lambda out: experts(hidden, weights, ids, out), poisoned(hidden.shape, "bfloat16"), workspace)
    assert bool(cupy.isfinite(out.astype(np.float32)).all())
    # Per token nothing depends on the other tokens: some stand for all, the first, the last and any between them.
    some = np.random.default_rng(seed).choice(tokens, 600, replace=False)
    some = cupy.asarray(np.concatenate([np.arange(50), some, np.arange(tokens - 50, tokens)]))
    want = reference.fused_experts(
        hidden.view(np.uint16)[some].view(hidden.dtype), topk_weights=weights[some], topk_ids=ids[some],
        out_dtype="float32", **layer,
    )
    assert relative_error(out.view(np.uint16)[some].view(out.dtype), want) <= LAYER_LIMIT


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 40, 300, 1500])
def test_layers_in_a_row(scheme, tokens, seed):
    """Each layer reads what the one in front has just written, with nothing in between to wait for it."""
    layers = [make_layer(seed + i, 8, 512, 256, **SCHEMES[scheme]) for i in range(4)]
    experts = [Experts(**layer, workspace=WORKSPACE) for layer in layers]
    hidden = normal(seed, (tokens, 512), "bfloat16")
    calls = [make_routing(seed + i, tokens, 2, 8) for i in range(4)]
    states = [hidden]
    for each, call in zip(experts, calls, strict=True):
        states.append(each(states[-1], *call))
        cupy.cuda.Device().synchronize()
    first, second = (poisoned(hidden.shape, "bfloat16") for _ in range(2))
    for _ in range(50):
        poison(first)
        poison(second)
        experts[0](hidden, *calls[0], first)
        experts[1](first, *calls[1], second)
        experts[2](second, *calls[2], first)
        experts[3](first, *calls[3], second)
        assert same_bits(second, states[-1])


@pytest.mark.parametrize("case", range(40))
def test_random_layers(case):
    rng = np.random.default_rng(case)
    experts, hidden, inner = (int(rng.integers(low, high)) for low, high in ((1, 20), (24, 500), (24, 300)))
    topk = int(rng.integers(1, min(experts, 8) + 1))
    tokens = -(-60000 // (topk * inner)) + int(rng.integers(0, 30))

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    activation = pick(*ACTIVATIONS)
    kinds = pick(*(kind for kind in W1_KINDS if kind != "(E, 2)" or not activation.endswith("no_mul"))), pick(*W2_KINDS)
    options = {
        "kinds": kinds, "activation": activation, "bias": pick(None, *DTYPES), "per_act_token": pick(False, True),
        "apply_router_weight_on_input": pick(False, False, True),
        "a1_scale": pick(None, None, 0.011, cupy.asarray(rng.uniform(0.008, 0.014, experts), np.float32)),
        "a2_scale": pick(None, None, 0.02, cupy.asarray(rng.uniform(0.01, 0.03, experts), np.float32)),
    }
    if pick(False, False, True):
        options["expert_map"] = cupy.asarray(rng.permutation(experts + 3) - pick(0, 3), np.int32)
    dtype, routing, offset = pick(*DTYPES), pick(*ROUTINGS, "wild"), pick(0, 0, 1, 8)
    print(case, experts, topk, hidden, inner, tokens, dtype, routing, offset, options)
    layer = make_layer(case, experts, hidden, inner, **options)
    ids_of = experts + 3 if "expert_map" in options else experts
    wide = normal(case, (tokens, hidden + offset), dtype)
    check_layer(layer, wide[:, offset:], *make_routing(case, tokens, topk, ids_of, routing))
