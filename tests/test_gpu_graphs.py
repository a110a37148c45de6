# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: captured with CuPy and with torch, replayed with other tokens and other routing in the same buffers."""

import ctypes
import gc
from collections import OrderedDict

import numpy as np
import pytest
from gpu_cases import (
    LAYER_LIMIT,
    SCHEMES,
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

import cupy_moe
from cupy_moe import Experts, Workspace, fused, fused_experts, reference

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

MODES = {**SCHEMES, "static": {"a1_scale": 0.01, "a2_scale": 0.02}}
ON_DEVICE = {0, 2}  # CUgraphNodeType of a kernel and of a memset


def capture(function):
    """A graph of ``function()``, and the stream it was captured on."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        try:
            function()
        finally:
            graph = stream.end_capture()
    return graph, stream


def replay(graph, stream):
    graph.launch(stream)
    stream.synchronize()


def node_types(graph):
    """The type of every node of a CuPy graph."""
    cuda = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t()
    assert cuda.cuGraphGetNodes(ctypes.c_void_p(graph.graph), None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert cuda.cuGraphGetNodes(ctypes.c_void_p(graph.graph), nodes, ctypes.byref(count)) == 0
    types = []
    for node in nodes:
        kind = ctypes.c_int(-1)
        assert cuda.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        types.append(kind.value)
    return types


def several_inputs(seed, tokens, hidden, topk, experts, count=25):
    """Different tokens with different routing for one layer."""
    kinds = ("uniform", "skewed", "one", "wild", "uniform")
    return [
        (normal(seed + i, (tokens, hidden), "bfloat16"), *make_routing(seed + i, tokens, topk, experts, kinds[i % 5]))
        for i in range(count)
    ]


def several_batches(seed, experts, max_tokens, hidden, count=25):
    """Different padded batches for one layer."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, max_tokens + 1, (count, experts))
    counts[3], counts[4] = 0, max_tokens
    return [
        (normal(seed + i, (experts, max_tokens, hidden), "bfloat16"), cupy.asarray(counts[i], np.int32))
        for i in range(count)
    ]


# ---- CuPy ---------------------------------------------------------------------------------------------------------


def check_replays(function, inputs, replays):
    """Capture ``function(*buffers, out)`` once; replays have to give what eager calls give, bit for bit."""
    expected = []
    for each in inputs:
        expected.append(poisoned(each[0].shape, "bfloat16"))
        function(*each, expected[-1])
    buffers, out = [x.copy() for x in inputs[0]], poisoned(inputs[0][0].shape, "bfloat16")
    graph, stream = capture(lambda: function(*buffers, out))
    with stream:
        wrong = cupy.zeros((), np.int64)
        for i in range(replays):
            k = 7 * i % len(inputs)
            for buffer, x in zip(buffers, inputs[k], strict=True):
                buffer.view(np.uint8)[...] = x.view(np.uint8)
            poison(out)
            graph.launch(stream)
            wrong += (out.view(np.uint8) != expected[k].view(np.uint8)).any()
    stream.synchronize()
    assert int(wrong) == 0, f"{int(wrong)} of {replays} replays differ from the eager call"
    return expected


@pytest.mark.parametrize(
    ("mode", "tokens", "replays"),
    [("token", 17, 1000), ("tensor", 17, 1000), ("static", 33, 1000), ("tensor", 2100, 100), ("token", 2100, 100)],
)
def test_replays_with_changing_routing(mode, tokens, replays, seed):
    layer = make_layer(seed, 8, 256, 512, **MODES[mode])
    inputs = several_inputs(seed, tokens, 256, 2, 8)
    expected = check_replays(Experts(**layer), inputs, replays)
    for (hidden, weights, ids), got in list(zip(inputs, expected, strict=True))[:5]:
        want = reference.fused_experts(hidden, topk_weights=weights, topk_ids=ids, out_dtype="float32", **layer)
        assert relative_error(got, want) <= LAYER_LIMIT


@pytest.mark.parametrize("mode", MODES)
def test_batched_replays(mode, seed):
    layer = make_layer(seed, 8, 256, 512, **MODES[mode])
    check_replays(Experts(**layer).batched, several_batches(seed, 8, 24, 256), 200)


def test_fused_experts_replays(seed):
    layer = make_layer(seed, 8, 256, 512)
    inputs = several_inputs(seed, 17, 256, 2, 8)
    expected = [fused_experts(x, topk_weights=weights, topk_ids=ids, **layer) for x, weights, ids in inputs]
    buffers, out = [x.copy() for x in inputs[0]], poisoned(expected[0].shape, "bfloat16")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:  # the scratch memory of fused_experts belongs to a stream: warm up on the one that captures
        fused_experts(buffers[0], topk_weights=buffers[1], topk_ids=buffers[2], out=out, **layer)
        stream.begin_capture()
        fused_experts(buffers[0], topk_weights=buffers[1], topk_ids=buffers[2], out=out, **layer)
        graph = stream.end_capture()
        for each, want in zip(inputs, expected, strict=True):
            for buffer, x in zip(buffers, each, strict=True):
                buffer.view(np.uint8)[...] = x.view(np.uint8)
            replay(graph, stream)
            assert same_bits(out, want)


def test_fused_experts_keeps_what_is_recorded(seed, monkeypatch):
    """However many other layers are called afterwards."""
    monkeypatch.setattr(fused, "LAYERS_KEPT", 3)
    monkeypatch.setattr(fused, "_layers", OrderedDict())
    layers = [make_layer(seed + i, 8, 256, 512) for i in range(9)]
    hidden, weights, ids = several_inputs(seed, 17, 256, 2, 8)[0]
    call = {"topk_weights": weights, "topk_ids": ids}
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    out = poisoned(hidden.shape, "bfloat16")
    with stream:
        want = fused_experts(hidden, **call, **layers[0]).copy()
        stream.begin_capture()
        fused_experts(hidden, **call, out=out, **layers[0])
        graph = stream.end_capture()
        for layer in layers[1:]:
            fused_experts(hidden, **call, **layer)
        assert len(fused._layers) == 3
        gc.collect()
        filler = [cupy.cuda.Memory(nbytes) for nbytes in (1 << 10, 1 << 12, 1 << 21)]
        for memory in filler:
            cupy.cuda.runtime.memsetAsync(memory.ptr, 0xFF, memory.size, stream.ptr)
        replay(graph, stream)
        assert same_bits(out, want)


def test_what_cannot_be_captured(seed):
    """It says so, and the capture goes on."""
    layer, hidden, weights, ids = make_small(seed)
    experts, out = Experts(**layer), poisoned(hidden.shape, "bfloat16")
    checking, slow = Experts(**layer, validate=True), Experts(**layer, backend="reference")
    want = experts(hidden, weights, ids)
    w1, many = layer["w1"], cupy.zeros((5000, 2), np.int32)
    offsets = cupy.asarray(np.linspace(0, len(w1[0]), len(w1) + 1), np.int32)

    def everything():
        for each in (checking, slow):
            with pytest.raises(RuntimeError, match=r"^a call with .* waits for the device, which a CUDA graph cannot"):
                each(hidden, weights, ids)
        for step in (
            lambda: cupy_moe.quantize_fp8(hidden), lambda: cupy_moe.activation_quantize(hidden),
            lambda: cupy_moe.route(many, 6), lambda: cupy_moe.grouped_gemm_fp8(w1[0], w1, offsets),
            lambda: cupy_moe.grouped_gemm_fp8(w1[0], w1, offsets, backend="reference"),
        ):
            with pytest.raises(RuntimeError, match=r"^this step takes scratch memory of its own"):
                step()
        experts(hidden, weights, ids, out)

    graph, stream = capture(everything)
    replay(graph, stream)
    assert same_bits(out, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [3, 2100])
def test_a_call_is_kernels_only(mode, tokens, seed):
    """Neither copies nor host work are among the nodes of the graph. A synchronisation would have ended the capture."""
    layer, hidden, *call = make_small(seed, tokens=tokens, **MODES[mode])
    experts, out = Experts(**layer), poisoned(hidden.shape, "bfloat16")
    experts(hidden, *call, out)
    graph, _ = capture(lambda: experts(hidden, *call, out))
    types = node_types(graph)
    # Few tokens are routed while they are quantised, and with a static scale GEMM 1 may leave the codes for GEMM 2.
    assert len(types) >= (4 if (tokens, mode) == (3, "static") else 5)
    assert set(types) <= ON_DEVICE
    batch, counts = normal(seed, (6, 9, 128)), cupy.asarray([1, 2, 3, 4, 9, 0], np.int32)
    experts.batched(batch, counts)
    padded = poisoned(batch.shape, "float32")
    assert set(node_types(capture(lambda: experts.batched(batch, counts, padded))[0])) <= ON_DEVICE


# ---- memory that a graph has recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
def test_growth_of_the_workspace(warm, seed):
    """Graphs stay valid when later calls outgrow the workspace, also one whose capture has made it grow."""
    layer, hidden, *call = make_small(seed)
    want = Experts(**layer)(hidden, *call)  # also compiles the kernels
    workspace = Workspace()
    experts, out = Experts(**layer, workspace=workspace), poisoned(hidden.shape, "bfloat16")
    experts(hidden[: len(hidden) if warm else 2], *(x[: len(hidden) if warm else 2] for x in call))
    graph, stream = capture(lambda: experts(hidden, *call, out))
    recorded = workspace._memory.ptr
    replay(graph, stream)
    assert same_bits(out, want)
    for tokens in (300, 900, 900, 3000):
        more = make_small(seed + tokens, tokens=tokens)[1:]
        poison_workspace(workspace)
        got = experts(*more)
        poison_workspace(workspace)
        call_of = {"topk_weights": more[1], "topk_ids": more[2], "out_dtype": "float32"}
        assert relative_error(got, reference.fused_experts(more[0], **call_of, **layer)) <= LAYER_LIMIT
        held = [workspace._memory, *workspace._kept]
        assert recorded in [memory.ptr for memory in held], "memory that a graph has recorded was given back"
        poison(out)
        cupy.cuda.Device().synchronize()
        replay(graph, stream)
        assert same_bits(out, want)


def test_more_sizes_than_plans_are_kept(seed):
    layer, hidden, *call = make_small(seed, tokens=5)
    experts, out = Experts(**layer), poisoned(hidden.shape, "bfloat16")
    want = experts(hidden, *call)
    graph, stream = capture(lambda: experts(hidden, *call, out))
    more = make_small(seed, tokens=300)[1:]
    for tokens in range(6, 300):
        experts(*(x[:tokens] for x in more))
    assert [*experts._plans.values()][-1].shape.tokens == 299, "the newest stays"
    cupy.cuda.Device().synchronize()
    replay(graph, stream)
    assert same_bits(out, want)


def test_two_graphs_of_one_layer(seed):
    layer = make_layer(seed, 6, 128, 256)
    experts = Experts(**layer)
    calls = [make_small(seed + tokens, tokens=tokens)[1:] for tokens in (1, 40, 700)]
    wants = [experts(*call) for call in calls]
    outs = [poisoned(call[0].shape, "bfloat16") for call in calls]
    graphs = [capture(lambda call=call, out=out: experts(*call, out))[0] for call, out in zip(calls, outs, strict=True)]
    stream = cupy.cuda.Stream(non_blocking=True)
    for i in range(60):
        graphs[i % 3].launch(stream)
        graphs[(i * 7 + 1) % 3].launch(stream)
    stream.synchronize()
    assert all(same_bits(out, want) for out, want in zip(outs, wants, strict=True))


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["call", "batched", "fused_experts", "first call", "growth"])
def test_torch_graph(torch, mode, form, seed):
    options = to_torch(torch, make_layer(seed, 8, 256, 512, **MODES[mode]))
    many = several_batches(seed, 8, 24, 256) if form == "batched" else several_inputs(seed, 17, 256, 2, 8)
    inputs = [tuple(map(torch.from_dlpack, each)) for each in many]
    experts = Experts(**options)

    def run(*each):
        if form == "fused_experts":
            return fused_experts(each[0], topk_weights=each[1], topk_ids=each[2], **options)
        return experts.batched(*each) if form == "batched" else experts(*each)

    expected = [run(*each) for each in inputs]
    if form in ("first call", "growth"):  # has not been called when the capture begins, or with fewer tokens
        experts = Experts(**options)
    if form == "growth":
        experts(*(x[:2] for x in inputs[0]))
    buffers = [x.clone() for x in inputs[0]]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if form not in ("first call", "growth"):
            run(*buffers)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        got = run(*buffers)
    assert got.dtype == torch.bfloat16
    for each, want in zip(inputs, expected, strict=True):
        for buffer, x in zip(buffers, each, strict=True):
            buffer.copy_(x)
        got.fill_(float("nan"))
        graph.replay()
        if form == "batched":  # rows behind an expert's last token are not written
            valid = torch.arange(24, device="cuda")[None, :] < each[1][:, None]
            assert torch.equal(got[valid], want[valid])
        else:
            assert torch.equal(got, want)


def test_steps_in_a_torch_graph(torch, seed):
    """Their scratch memory is the graph's own."""
    made = ((normal(seed + i, (700, 256), "bfloat16"), make_routing(seed + i, 3000, 2, 6)[1]) for i in range(2))
    inputs = [tuple(map(torch.from_dlpack, each)) for each in made]

    def run(x, ids):
        return *cupy_moe.quantize_fp8(x), *cupy_moe.activation_quantize(x), *cupy_moe.route(ids, 6)

    wants = [run(*each) for each in inputs]
    buffers, graph = [x.clone() for x in inputs[0]], torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = run(*buffers)
    for buffer, x in zip(buffers, inputs[1], strict=True):
        buffer.copy_(x)
    filler = torch.full((1 << 22,), 0xFF, dtype=torch.uint8, device="cuda")  # of what has been given back, if anything
    graph.replay()
    torch.cuda.synchronize()
    del filler
    for made, want in zip(got, wants[1], strict=True):
        assert torch.equal(made.view(torch.uint8), want.view(torch.uint8))
