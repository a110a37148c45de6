# SPDX-License-Identifier: Apache-2.0
"""`Experts.tune`: what it finds, who uses it, and what stays as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_cases import (
    LAYER_LIMIT,
    SCHEMES,
    WORKSPACE,
    check_layer,
    cupy,
    make_layer,
    make_routing,
    make_small,
    normal,
    poison,
    poison_workspace,
    poisoned,
    relative_error,
    same_bits,
    to_torch,
)
from test_gpu_graphs import capture, replay
from tuning_choices import choices, chosen, store_other_choices

import cupy_moe
from cupy_moe import Experts, Workspace, arrays, reference, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

ROOT = Path(cupy_moe.__file__).parents[1]
TOPK = 3


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Records of this test alone."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(tuning, "CACHE", tuning.Cache())
    return tuning.CACHE


def check_call(experts, layer, hidden, topk_weights, topk_ids):
    """A call against the reference, on poisoned memory."""
    out = poisoned(hidden.shape, "bfloat16")
    poison_workspace(experts._workspace)
    experts(hidden, topk_weights, topk_ids, out)
    named = {"topk_weights": topk_weights, "topk_ids": topk_ids, "out_dtype": "float32"}
    error = relative_error(out, reference.fused_experts(hidden, **named, **layer))
    assert error <= LAYER_LIMIT, f"relative error {error:.2e}"
    return out


# ---- what tuning finds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("hidden", "inner"), [(1024, 512), (200, 120)])
def test_results_are_right_after_tuning(scheme, hidden, inner, seed):
    layer = make_layer(seed, 8, hidden, inner, **SCHEMES[scheme])
    experts = Experts(**layer, workspace=WORKSPACE)
    tokens = (17, 60, 300, 2000)
    calls = {n: (normal(seed + n, (n, hidden), "bfloat16"), *make_routing(seed, n, 2, 8)) for n in tokens}
    for call in calls.values():
        check_layer(layer, *call, experts=experts)
    found = experts.tune(tokens, topk=2)
    assert len(found) == 2 * len(tokens)
    for each, call in calls.items():
        of = choices(experts, 2 * each)
        assert of.chosen() == [of.choice(found[key]) for key in of.tuning_keys()]
        check_layer(layer, *call, experts=experts)


def test_records(seed, cache):
    """Their keys name library, device, GEMM and rows; their times are those of the choice and the default.

    The second time, the default is compared with, and not what the first time found.
    """
    experts = Experts(**make_layer(seed, 8, 1024, 512))
    first, again = experts.tune([64, 65], topk=2), experts.tune(64, topk=2)
    assert len(first) == 4
    assert len(again) == 2
    assert again.keys() < first.keys()
    of = choices(experts, 128)
    for key, record in first.items():
        library, device, shape, *result, rows = key.split(" | ")
        assert [library, device] == [of.library, cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()]
        assert shape in ("8 x 1024 x 1024", "8 x 1024 x 512")
        assert result in ([["float16"], ["float32"]] if experts.backend == "cublaslt" else [[]])
        assert rows in ("128 rows", "256 rows")
        assert record.keys() == {*of.fields, "us", "default_us"}
        assert 0 < record["us"] <= record["default_us"]
        print(key, record)
    assert all(cache.find(key) == record for key, record in {**first, **again}.items())
    assert json.loads(tuning.path().read_text())["records"] == {**first, **again}


@pytest.mark.parametrize("options", [
    {"expert_map": np.array([3, -1, 0, -1, 1, 5, 4, 2, -1, -1], np.int32)}, {"expert_map": np.full(200, -1, np.int32)},
    {"expert_map": np.array([3, -1, 0, 5], np.int32)},
    {"apply_router_weight_on_input": True}, {"activation": "relu2_no_mul"}, {"bias": "float16"},
], ids=["map", "map to nothing", "short map", "weight on input", "no gates", "bias"])
def test_layers_of_every_kind(options, seed):
    options = {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    layer, hidden, *call = make_small(seed, hidden=512, **options)
    experts = Experts(**layer, workspace=WORKSPACE)
    assert experts.tune([1, len(hidden)], topk=TOPK)
    if options.get("expert_map") is None or len(options["expert_map"]) <= 10:
        check_layer(layer, hidden, *call, experts=experts)
    else:
        assert not experts(hidden, *call).view(np.uint8).any()


def test_torch(torch, seed):
    layer, hidden, *call = make_small(seed)
    experts = Experts(**to_torch(torch, layer))
    arguments = [torch.from_dlpack(x) for x in (hidden, *call)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts.tune(len(hidden), topk=TOPK)
        got = experts(*arguments)
    side.synchronize()
    assert same_bits(cupy.from_dlpack(got), Experts(**layer)(hidden, *call))


def test_what_is_wrong_or_fails_is_left_out(monkeypatch):
    result = cupy.zeros((64, 512), np.float16)

    def fill(value, nbytes=result.nbytes, times=1):
        def call(stream):
            for _ in range(times):
                result.data.memset_async(value, nbytes, arrays.cupy_stream(stream))

        return call

    def fail(stream):
        raise RuntimeError("not supported")

    slow, fast = fill(0x3C, times=40), fill(0x3C)
    wrong = fill(0x3D), fill(0x3C, result.nbytes - 1024), fill(0xFF), fail
    candidates = [({"tile": i}, call) for i, call in enumerate((slow, *wrong, fast))]
    found = tuning.fastest(candidates, result)
    assert found["tile"] == 5
    assert found["us"] < found["default_us"]
    assert tuning.fastest(candidates[:-1], result)["tile"] == 0
    with pytest.raises(RuntimeError, match="not supported"):
        tuning.fastest([({}, fail), *candidates], result)
    same = [({"tile": i}, fast) for i in range(3)]
    for times, best in (([3.0, 5.0, 2.0], 2), ([3.0, 5.0, 2.95], 0)):
        monkeypatch.setattr(tuning, "_times", lambda graphs, times=times: times)
        assert tuning.fastest(same, result) == {"tile": best, "us": times[best], "default_us": 3.0}


def test_codes_are_finite():
    for size in (1, 1000, (1 << 22) + 5):
        codes = cupy.full(size, 0x7F, np.uint8)
        tuning.fill_with_codes(codes)
        assert int(((codes & 0x7F) == 0x7F).sum()) == 0
        assert size <= 1000 or int(codes.max()) == 0xFE


# ---- who uses it --------------------------------------------------------------------------------------------------


def test_other_layers_of_the_shape(seed):
    """Those made later, and those that have been called before; others are not touched."""
    layer, hidden, *call = make_small(seed, hidden=512)
    rows = len(hidden) * TOPK
    before, other = Experts(**layer), Experts(**make_layer(seed, 6, 512, 128))
    for _ in range(4):
        check_call(before, layer, hidden, *call)
    usual = chosen(before, rows), chosen(other, rows)
    wanted = store_other_choices(Experts(**layer), rows)
    assert all(one != other for one, other in zip(usual[0], wanted, strict=True))
    plan = before._plans[next(iter(before._plans))]
    assert chosen(before, rows) == chosen(Experts(**layer), rows) == wanted
    assert chosen(other, rows) == usual[1]
    for _ in range(4):
        check_call(before, layer, hidden, *call)
    assert plan is not before._plans[next(iter(before._plans))], "a plan made before is made again"


def test_another_process_reads_the_file(seed):
    layer, *_ = make_small(seed)
    experts = Experts(**layer)
    wanted = store_other_choices(experts, 64 * TOPK)
    program = """
        import sys
        sys.path[:0] = sys.argv[1:]
        from gpu_cases import make_small
        from tuning_choices import chosen
        from cupy_moe import Experts
        layer, hidden, *call = make_small(0)
        experts = Experts(**layer)
        experts(hidden, *call)
        print([tuple(each) for each in chosen(experts, 64 * 3)])
    """
    command = [sys.executable, "-c", "\n".join(map(str.strip, program.splitlines())), str(ROOT), str(ROOT / "tests")]

    def run():
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done

    assert eval(run().stdout) == wanted
    tuning.path().write_text("{")
    done = run()
    assert eval(done.stdout) != wanted
    assert f"{tuning.path()}: is no tuning cache and is ignored" in done.stderr


# ---- CUDA graphs --------------------------------------------------------------------------------------------------


def test_in_a_capture(seed, cache):
    layer, hidden, *call = make_small(seed)
    experts, out = Experts(**layer), poisoned(hidden.shape, "bfloat16")
    want = experts(hidden, *call)

    def both():
        with pytest.raises(RuntimeError, match=r"^Experts\.tune cannot run while a CUDA graph is being captured"):
            experts.tune(64, topk=TOPK)
        experts(hidden, *call, out)

    graph, stream = capture(both)
    replay(graph, stream)
    assert same_bits(out, want), "the capture goes on"
    assert cache.generation == 0
    assert not tuning.path().exists()


@pytest.mark.parametrize("largest", [64, 3000])
def test_graph_captured_before(largest, seed):
    """It stays as it was, bit for bit, also where tuning outgrows the workspace."""
    layer, hidden, *call = make_small(seed)
    workspace = Workspace()
    experts, out = Experts(**layer, workspace=workspace), poisoned(hidden.shape, "bfloat16")
    want = experts(hidden, *call)
    graph, stream = capture(lambda: experts(hidden, *call, out))
    for _ in range(2):
        experts.tune([8, len(hidden), largest], topk=TOPK)
        store_other_choices(experts, len(hidden) * TOPK)
        for _ in range(4):
            check_call(experts, layer, hidden, *call)
        more = make_small(seed, tokens=largest)[1:]
        check_call(experts, layer, *more)
        poison_workspace(workspace)
        poison(out)
        cupy.cuda.Device().synchronize()
        replay(graph, stream)
        assert same_bits(out, want)


def test_capture_right_after_tuning(seed):
    """Of a layer that has been called, whose plan and graph of its own are replaced during the capture."""
    layer, hidden, *call = make_small(seed)
    experts, out = Experts(**layer), poisoned(hidden.shape, "bfloat16")
    for _ in range(5):
        experts(hidden, *call, out)
    store_other_choices(experts, len(hidden) * TOPK)
    Experts(**layer)(hidden, *call)  # has loaded the kernels, as tuning has
    graph, stream = capture(lambda: experts(hidden, *call, out))
    for _ in range(3):
        poison(out)
        cupy.cuda.Device().synchronize()
        replay(graph, stream)
        assert same_bits(out, check_call(experts, layer, hidden, *call))
