# SPDX-License-Identifier: Apache-2.0
"""What stays behind after calls: nothing that grows, and nothing of arrays that have changed or gone.

What the device has left is looked at too, so nothing else should use it meanwhile.
"""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from gpu_cases import (
    LAYER_LIMIT,
    W1_KINDS,
    W2_KINDS,
    call_repeatedly,
    check_layer,
    cupy,
    make_layer,
    make_routing,
    make_small,
    normal,
    poisoned,
    random_codes,
    relative_error,
    same_bits,
    to_torch,
)

from cupy_moe import Experts, Workspace, backends, fused, fused_experts, reference, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

MIB = 1 << 20


def footprint():
    """Bytes in use: of CuPy's pool, of the device, of the process."""
    gc.collect()
    cupy.cuda.Device().synchronize()
    pool = cupy.get_default_memory_pool()
    free, total = cupy.cuda.runtime.memGetInfo()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "pool in use": pool.used_bytes(), "pool": pool.total_bytes(), "device": total - free,
        "process": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def assert_no_growth(before, after):
    slack = {"pool in use": 0, "pool": MIB, "device": 4 * MIB, "process": 24 * MIB}
    grown = {name: after[name] - before[name] for name in slack if after[name] - before[name] > slack[name]}
    assert not grown, f"grown by {grown} bytes"


def check_fused(layer, hidden, topk_weights, topk_ids):
    """`fused_experts` against the reference."""
    call = {"topk_weights": topk_weights, "topk_ids": topk_ids}
    out = poisoned(hidden.shape, "bfloat16")
    for _ in range(2):
        assert fused_experts(hidden, **call, out=out, **layer) is out
    want = reference.fused_experts(hidden, **call, **{**layer, "out_dtype": "float32"})
    error = relative_error(out, want)
    assert error <= LAYER_LIMIT, f"relative error {error:.2e}"
    return out


# ---- growth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["Experts", "batched", "fused_experts"])
def test_many_calls(function, seed):
    layer, hidden, weights, ids = make_small(seed, tokens=8)
    experts = Experts(**layer)
    batch, counts = normal(seed, (6, 4, 128)), cupy.asarray([4, 0, 1, 2, 3, 4], np.int32)

    def run(tokens):
        if function == "batched":
            return experts.batched(batch[:, :tokens].copy() if tokens < 4 else batch, counts)
        if function == "Experts":
            return experts(hidden[:tokens], weights[:tokens], ids[:tokens])
        return fused_experts(hidden[:tokens], topk_weights=weights[:tokens], topk_ids=ids[:tokens], **layer)

    want = run(4)
    calls = 100_000 if function == "Experts" else 10_000
    for i in range(500):
        run(1 + i % 8)
    before = footprint()
    for i in range(calls):
        run(1 + i % 8)
    assert_no_growth(before, footprint())
    assert function == "batched" or same_bits(run(4), want)


def test_many_sizes(seed):
    """More numbers of tokens than a layer remembers, each often enough for all that is remembered of one."""
    layer, hidden, *call = make_small(seed, tokens=600)
    experts = Experts(**layer)
    for rounds in range(3):
        for tokens in range(600, 0, -1):
            for _ in range(4):
                got = experts(hidden[:tokens], call[0][:tokens], call[1][:tokens])
        if rounds == 0:
            before = footprint()
    assert_no_growth(before, footprint())
    assert same_bits(got, Experts(**layer)(hidden[:1], call[0][:1], call[1][:1]))


def test_many_layers(seed, monkeypatch):
    """Layers come and go: `Experts` leave nothing behind, `fused_experts` remembers a limited number."""
    monkeypatch.setattr(fused, "LAYERS_KEPT", 128)
    _, hidden, *call = make_small(seed, hidden=64, inner=64)
    codes = random_codes(seed, (6 * 128 * 64 + 16 * 700,))
    w2, scale = random_codes(seed + 1, (6, 64, 64)), cupy.full(6, 0.001, np.float32)

    def layer(i):
        """Weights at an address of their own."""
        w1 = codes[16 * i :][: 6 * 128 * 64].reshape(6, 128, 64)
        return {"w1": w1, "w2": w2, "w1_scale": scale, "w2_scale": scale}

    def run(first, last):
        for i in range(first, last):
            fused_experts(hidden, topk_weights=call[0], topk_ids=call[1], **layer(i))
            Experts(**layer(i))(hidden, *call)

    run(0, 200)
    before = footprint()
    run(200, 500)
    assert_no_growth(before, footprint())


def test_tuning(seed, monkeypatch, tmp_path):
    """The memory of the variants that were tried is given back."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(tuning, "CACHE", tuning.Cache())
    experts = Experts(**make_layer(seed, 8, 1024, 512))
    experts.tune([64, 512], topk=2)
    cupy.get_default_memory_pool().free_all_blocks()
    before = footprint()
    for _ in range(3):
        experts.tune([64, 512], topk=2)
    cupy.get_default_memory_pool().free_all_blocks()
    assert_no_growth(before, footprint())


def test_torch_copies_nothing(torch, seed):
    layer, hidden, *call = make_small(seed, hidden=512, inner=1024)
    experts, tensors = Experts(**to_torch(torch, layer)), [torch.from_dlpack(x) for x in (hidden, *call)]
    experts(*tensors)
    assert experts._layer.copies == []
    pool = cupy.get_default_memory_pool()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), pool.used_bytes(), cupy.cuda.runtime.memGetInfo()[0]
    torch.cuda.reset_peak_memory_stats()
    got = experts(*tensors)
    rounded = -(-got.nbytes // 512) * 512
    assert torch.cuda.max_memory_allocated() - before[0] == rounded, "torch allocates the result and nothing else"
    assert pool.used_bytes() == before[1]
    assert cupy.cuda.runtime.memGetInfo()[0] >= before[2] - 4 * MIB  # torch may have taken a new block for the result


def test_workspace_is_shared(seed):
    workspace, sizes = Workspace(), set()
    for i in range(4):
        layer, hidden, *call = make_small(seed + i, tokens=100 - 20 * i)
        experts = Experts(**layer, workspace=workspace)
        out = poisoned(hidden.shape, "bfloat16")
        call_repeatedly(lambda out, e=experts, x=(hidden, *call): e(*x, out), out, workspace)
        assert same_bits(out, Experts(**layer)(hidden, *call))
        sizes.add(workspace.nbytes)
    assert len(sizes) == 1, "smaller calls do not need more"


@pytest.mark.parametrize(("hidden", "inner"), [(128, 256), (100, 200), (512, 64)])
def test_bytes_of_the_workspace(hidden, inner, seed):
    """`workspace_nbytes` is what a call takes."""
    for tokens in (1, 65, 3000):
        workspace = Workspace()
        layer, x, *call = make_small(seed, tokens=tokens, hidden=hidden, inner=inner)
        experts = Experts(**layer, workspace=workspace)
        assert workspace.nbytes == 0
        experts(x, *call)
        assert workspace.nbytes == experts.workspace_nbytes(tokens, 3)
        batch, counts = normal(seed, (6, tokens, hidden), "bfloat16"), cupy.full(6, tokens, np.int32)
        experts.batched(batch, counts)
        assert workspace.nbytes == max(experts.workspace_nbytes(tokens, 3), experts.workspace_nbytes(6 * tokens, 1))
    assert Experts(**layer, backend="reference").workspace_nbytes(3000, 3) == 0


def test_memory_beside_the_workspace(seed):
    """What a layer holds after calls of all sizes: less than 128 MiB, the library's scratch memory included."""
    if backends()["cublaslt"] != "available":
        pytest.skip("needs the backend cublaslt: the others have none")
    layer = make_layer(seed, 32, 1024, 1024)
    experts = Experts(**layer, backend="cublaslt")
    x, *call = normal(seed, (8192, 1024), "bfloat16"), *make_routing(seed, 8192, 8, 32)
    for power in range(14):
        experts(x[: 1 << power], *(each[: 1 << power] for each in call))
    gemms = experts._layer.gemms
    own = [[scratch.nbytes for scratch in gemm._workspaces] for gemm in (gemms._gemm1, gemms._gemm2)]
    print("bytes of cuBLASLt's workspaces:", own)
    assert sum(map(sum, own)) + 5 * MIB <= 128 * MIB  # 5: what the bound of the workspace leaves to fixed buffers


# ---- fused_experts: what it remembers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "inner"), [(128, 256), (100, 200)])
def test_contents_changed_in_place(hidden, inner, seed):
    """The same arrays with other contents, sizes that need padding included."""
    rng = np.random.default_rng(seed)

    def make(seed):
        return make_small(
            seed, hidden=hidden, inner=inner, kinds=("(E, n)", "(E,)"), bias="float32",
            a1_scale=cupy.asarray(rng.uniform(0.008, 0.012, 6), np.float32),
            a2_scale=cupy.asarray(rng.uniform(0.015, 0.03, 1), np.float32),
            expert_map=cupy.asarray(rng.permutation(6), np.int32),
        )

    layer, x, *call = make(seed)
    results = [check_fused(layer, x, *call)]
    for i in range(1, 4):
        for name, value in make(seed + 100 * i)[0].items():
            if isinstance(value, cupy.ndarray):
                layer[name][...] = value
        results.append(check_fused(layer, x, *call))
        assert not same_bits(results[-1], results[-2])


def test_arrays_freed_and_made_again():
    """Other arrays of other shapes at addresses that were in use before."""
    for case in range(40):
        rng = np.random.default_rng(case)
        hidden, inner, experts = (int(rng.choice(sizes)) for sizes in ((64, 128, 100), (256, 512, 200), (4, 6)))
        options = {
            "kinds": (str(rng.choice(W1_KINDS)), str(rng.choice(W2_KINDS))),
            "per_act_token": bool(rng.integers(2)),
            "bias": [None, "float32"][rng.integers(2)],
            "a2_scale": [None, 0.02, cupy.asarray([0.02], np.float32)][rng.integers(3)],
        }
        print(case, hidden, inner, experts, options)
        check_fused(*make_small(case, hidden=hidden, inner=inner, experts=experts, **options))


@pytest.mark.parametrize("name", ["a1_scale", "a2_scale"])
def test_numbers_as_scales(name, seed):
    layer, x, *call = make_small(seed)
    results = [check_fused({**layer, name: scale}, x, *call) for scale in (0.01, 0.03, 0.01, np.float32(0.01), None)]
    assert same_bits(results[0], results[2])
    assert not same_bits(results[0], results[1])
    codes = random_codes(seed, x.shape)
    numbers = [{**layer, "a1_scale": scale} for scale in (0.01, 0.02, 0.01)]
    results = [check_fused(each, codes, *call) for each in numbers]
    assert same_bits(results[0], results[2])
    assert not same_bits(results[0], results[1])


def test_options_are_told_apart(seed):
    layer, x, *call = make_small(seed)
    variants = [
        {}, {"per_act_token": True}, {"activation": "gelu"}, {"apply_router_weight_on_input": True},
        {"expert_map": cupy.asarray([5, 4, 3, 2, 1, 0], np.int32)}, {"w1_bias": normal(seed, (6, 512))},
    ]
    results = [check_fused({**layer, **options}, x, *call) for options in variants + variants]
    for i in range(len(variants)):
        assert same_bits(results[i], results[i + len(variants)])
        assert all(not same_bits(results[i], results[j]) for j in range(i))


@pytest.mark.parametrize("form", ["call", "weight on input", "fp8 number", "fp8 (1,)", "fp8 (M, 1)", "batched"])
def test_other_arrays_in_every_call(form, seed):
    """Calls that differ in nothing but the addresses of their arrays, and numbers."""
    layer = make_layer(seed, 6, 1024, 256, apply_router_weight_on_input=form == "weight on input")
    experts, alive, pairs = Experts(**layer), [], []
    for i in range(7):
        shape = (6, 20, 1024) if form == "batched" else (65, 1024)
        hidden = random_codes(seed + i, shape) if form.startswith("fp8") else normal(seed + i, shape, "bfloat16")
        call, options = make_routing(seed + i, 65, 3, 6, "wild"), {}
        if form.startswith("fp8"):
            per_token = abs(normal(seed + i, (65, 1))) * 0.005 + 0.005
            one = 0.005 * (i + 1)
            numbers = {"fp8 number": one, "fp8 (1,)": cupy.asarray([one], np.float32), "fp8 (M, 1)": per_token}
            options["a1_scale"] = numbers[form]
        if form == "batched":
            tokens = cupy.asarray(np.random.default_rng(seed + i).integers(0, 21, 6), np.int32)
            got = experts.batched(hidden, tokens, cupy.zeros(shape, np.float32))
            want = reference.batched(hidden, tokens, out_dtype="float32", **layer)
        else:
            got = experts(hidden, *call, **options)
            by_name = {"topk_weights": call[0], "topk_ids": call[1], "out_dtype": "float32"}
            want = reference.fused_experts(hidden, **by_name, **options, **layer)
        assert relative_error(got, want) <= 3 * LAYER_LIMIT  # about 1 if an address is wrong
        alive.append((hidden, call, options, got))
        pairs.append((got.astype(np.float32), want))
    assert relative_error(*map(cupy.concatenate, zip(*pairs, strict=True))) <= LAYER_LIMIT


def test_experts_follow_their_arrays_where_they_hold_no_copy(seed):
    layer, hidden, *call = make_small(seed)
    experts = Experts(**layer)
    check_layer(layer, hidden, *call)
    layer["w1"][...] = make_layer(seed + 50, 6, 128, 256)["w1"]
    got = experts(hidden, *call)
    assert same_bits(got, check_layer(layer, hidden, *call)[0])
    weights, ids = make_routing(seed + 9, len(hidden), 3, 6, "skewed")
    assert same_bits(experts(hidden, weights, ids), check_layer(layer, hidden, weights, ids)[0])
