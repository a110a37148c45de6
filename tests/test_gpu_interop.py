# SPDX-License-Identifier: Apache-2.0
"""CuPy and torch: results of the caller's kind without copies, on the caller's current stream, from several threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gpu_cases import (
    DTYPES,
    SCHEMES,
    cupy,
    make_layer,
    make_routing,
    make_small,
    normal,
    poison,
    random_codes,
    same_bits,
    to_torch,
    weight_scale,
)

import cupy_moe
from cupy_moe import Experts, fused_experts

pytestmark = [pytest.mark.gpu, pytest.mark.gemm]

SPIN_CYCLES = 40_000_000  # about 20 ms: longer than the host takes to enqueue what follows
_spin = cupy.RawKernel(
    'extern "C" __global__ void spin(long long cycles)'
    "{ const long long begin = clock64(); while (clock64() - begin < cycles) {} }",
    "spin",
)


def spin():
    """Keep CuPy's current stream busy for a while."""
    _spin((1,), (1,), (np.int64(SPIN_CYCLES),))


def bits(torch, x):
    """A torch tensor as CuPy bytes over the same memory."""
    return cupy.from_dlpack(x.contiguous().view(torch.uint8))


def equal(torch, tensor, array):
    """Whether a torch tensor and a CuPy array hold the same bits."""
    return tuple(tensor.shape) == array.shape and same_bits(
        bits(torch, tensor).reshape(-1), cupy.ascontiguousarray(array).reshape(-1).view(np.uint8)
    )


# ---- torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_layer(torch, dtype, scheme, seed):
    layer, hidden, *call = make_small(seed, dtype=dtype, bias=dtype, **SCHEMES[scheme])
    want = Experts(**layer)(hidden, *call)
    options, tensors = to_torch(torch, layer), [torch.from_dlpack(x) for x in (hidden, *call)]
    experts = Experts(**options)
    got = experts(*tensors)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == getattr(torch, dtype)
    assert got.device == tensors[0].device
    assert equal(torch, got, want)
    out = torch.full_like(tensors[0], float("nan"))
    assert experts(*tensors, out=out) is out
    assert equal(torch, out, want)
    by_name = {"topk_weights": tensors[1], "topk_ids": tensors[2]}
    assert equal(torch, fused_experts(tensors[0], **by_name, **options), want)
    assert equal(torch, experts(tensors[0], tensors[1], tensors[2].long()), want)
    as_bytes = {name: x.view(torch.uint8) if name in ("w1", "w2") else x for name, x in options.items()}
    assert equal(torch, Experts(**as_bytes)(*tensors), want)
    wide = torch.zeros((len(hidden), hidden.shape[1] + 8), dtype=tensors[0].dtype, device="cuda")
    wide[:, :-8] = tensors[0]
    assert equal(torch, experts(wide[:, :-8], *tensors[1:]), want)
    assert Experts(**options, out_dtype=torch.float16)(*tensors).dtype == torch.float16


@pytest.mark.parametrize("kind", ["number", "(1,)", "(M, 1)"])
def test_torch_fp8_hidden_states(torch, kind, seed):
    layer, hidden, *call = make_small(seed)
    codes = random_codes(seed, hidden.shape)
    per_token = abs(normal(seed, (65, 1))) * 0.01 + 0.001
    scale = {"number": 0.01, "(1,)": cupy.asarray([0.01], np.float32), "(M, 1)": per_token}[kind]
    want = Experts(**layer)(codes, *call, a1_scale=scale)
    tensor = torch.from_dlpack(codes).view(torch.float8_e4m3fn)
    scale = scale if kind == "number" else torch.from_dlpack(scale)
    tensors = [torch.from_dlpack(x) for x in call]
    got = Experts(**to_torch(torch, layer))(tensor, *tensors, a1_scale=scale)
    assert got.dtype == torch.bfloat16
    assert equal(torch, got, want)
    by_name = {"topk_weights": tensors[0], "topk_ids": tensors[1], "a1_scale": scale}
    assert equal(torch, fused_experts(tensor, **by_name, **to_torch(torch, layer)), want)


def test_torch_batched(torch, seed):
    layer = make_layer(seed, 5, 128, 256)
    hidden, counts = normal(seed, (5, 30, 128), "float16"), cupy.asarray([30, 0, 7, 1, 12], np.int32)
    want, out = (poison(cupy.empty_like(hidden)) for _ in range(2))
    Experts(**layer).batched(hidden, counts, want)
    tensors = [torch.from_dlpack(x) for x in (hidden, counts, out)]
    assert Experts(**to_torch(torch, layer)).batched(*tensors) is tensors[2]
    assert same_bits(out, want)
    assert isinstance(Experts(**to_torch(torch, layer)).batched(*tensors[:2]), torch.Tensor)


def test_torch_steps(torch, seed):
    """Every step gives for torch tensors the bits that it gives for CuPy arrays, in the dtypes of torch."""
    rng = np.random.default_rng(seed)
    x, (weights, ids) = normal(seed, (50, 96), "bfloat16"), make_routing(seed, 50, 3, 6, "wild")
    product, w = normal(seed + 1, (150, 64)), random_codes(seed + 2, (6, 64, 96))
    w1_scale, bias = weight_scale(rng, "(E, n)", 6, 64, 1), normal(seed + 3, (6, 64), "float16")
    routing = cupy_moe.route(ids, 6)
    rows = cupy_moe.shuffle_rows(random_codes(seed + 4, (50, 96)), routing.dst2src_map)
    scales = abs(normal(seed, (50, 1))) + 0.1
    per_expert = {"w_scale": w1_scale, "bias": bias, "row_experts": routing.row_experts}

    def both(function, *args, **options):
        """The results of a step for CuPy and for torch, as tuples."""

        def convert(value):
            return torch.from_dlpack(value) if isinstance(value, cupy.ndarray) else value

        converted = {name: convert(value) for name, value in options.items()}
        results = function(*args, **options), function(*map(convert, args), **converted)
        return [result if isinstance(result, tuple) else (result,) for result in results]

    pairs = [
        both(cupy_moe.route, ids, 6),
        both(cupy_moe.shuffle_rows, x, routing.dst2src_map),
        both(cupy_moe.gather_scales, scales, routing.dst2src_map),
        both(cupy_moe.quantize_fp8, x),
        both(cupy_moe.quantize_fp8, x, per_token=True),
        both(cupy_moe.quantize_fp8, x, scales),
        both(cupy_moe.activation_quantize, product, "gelu", per_token=True, **per_expert),
        both(cupy_moe.activation_quantize, product, x_scale=2.0, scale=0.01, **per_expert),
        both(cupy_moe.grouped_gemm_fp8, rows, w, routing.expert_offsets, a_scale=0.01, b_scale=w1_scale, bias=bias),
        both(cupy_moe.combine, product, routing.src2dst_map, topk_weights=weights, out_dtype="bfloat16", **per_expert),
        both(cupy_moe.topk_softmax, x[:, :8].astype(np.float32), 3, renormalize=True),
    ]
    for step, (arrays, tensors) in enumerate(pairs):
        for array, tensor in zip(arrays, tensors, strict=True):
            assert isinstance(tensor, torch.Tensor)
            assert equal(torch, tensor, array), f"step {step}"
    assert [pairs[i][1][0].dtype for i in (3, 6)] == [torch.float8_e4m3fn] * 2
    assert pairs[8][1][0].dtype == torch.bfloat16


def test_mixed_kinds(torch, seed):
    layer, hidden, *call = make_small(seed)
    experts = Experts(**layer)
    with pytest.raises(TypeError, match=r"^hidden_states: expected a cupy array .* got a torch array"):
        experts(torch.from_dlpack(hidden), *call)
    with pytest.raises(TypeError, match=r"^topk_ids: expected a cupy array .* got a numpy array"):
        experts(hidden, call[0], call[1].get())


# ---- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("function", ["Experts", "fused_experts", "steps"])
def test_cupy_current_stream(function, non_blocking, seed):
    """The input arrives on the stream after a while: work on any other stream would come too early."""
    layer, hidden, *call = make_small(seed)
    experts = Experts(**layer)

    def run(x):
        if function == "Experts":
            return experts(x, *call)
        if function == "fused_experts":
            return fused_experts(x, topk_weights=call[0], topk_ids=call[1], **layer)
        routing = cupy_moe.route(call[1], 6)
        codes, scale = cupy_moe.quantize_fp8(x)
        rows = cupy_moe.shuffle_rows(codes, routing.dst2src_map)
        product = cupy_moe.grouped_gemm_fp8(rows, layer["w1"], routing.expert_offsets, a_scale=scale)
        return cupy_moe.activation_quantize(product, row_experts=routing.row_experts, w_scale=layer["w1_scale"])[0]

    stream, buffer = cupy.cuda.Stream(non_blocking=non_blocking), poison(cupy.empty_like(hidden))
    want = run(hidden)
    cupy.cuda.Device().synchronize()  # a layer runs on one stream at a time
    with stream:
        run(hidden)  # compiles, allocates
    cupy.cuda.Device().synchronize()
    with stream:
        spin()
        buffer.view(np.uint8)[...] = hidden.view(np.uint8)
        got = run(buffer)
    stream.synchronize()
    assert same_bits(got, want)


def test_torch_current_stream(torch, seed):
    layer, hidden, *call = make_small(seed)
    experts = Experts(**to_torch(torch, layer))
    hidden, *call = (torch.from_dlpack(x) for x in (hidden, *call))
    stream, buffer = torch.cuda.Stream(), torch.full_like(hidden, float("nan"))
    want = experts(hidden, *call)
    torch.cuda.synchronize()  # a layer runs on one stream at a time
    with torch.cuda.stream(stream):
        experts(hidden, *call)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
        buffer.copy_(hidden)
        got = experts(buffer, *call)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("function", ["Experts", "fused_experts"])
def test_two_streams(function, seed):
    """Calls that overlap on two streams, each with scratch memory of its own."""
    cases = [make_small(seed + i, tokens=300, hidden=512, inner=1024, per_act_token=i == 1) for i in range(2)]
    experts = [Experts(**case[0]) for case in cases]

    def run(i):
        layer, hidden, weights, ids = cases[i]
        if function == "Experts":
            return experts[i](hidden, weights, ids)
        return fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer)

    wants, streams = [run(i) for i in range(2)], [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    wrong = [0, 0]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with stream:
                wrong[i] = wrong[i] + (run(i).view(np.uint8) != wants[i].view(np.uint8)).sum()
    for stream in streams:
        stream.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


def test_two_threads_of_fused_experts(seed):
    """On a stream each, with the same layers: each finds its own."""
    layers = [make_small(seed + i, tokens=40)[0] for i in range(3)]
    hidden, weights, ids = make_small(seed, tokens=40)[1:]
    wants = [fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layer) for layer in layers]
    cupy.cuda.Device().synchronize()

    def work(_):
        wrong = 0
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for i in range(90):
                got = fused_experts(hidden, topk_weights=weights, topk_ids=ids, **layers[i % 3])
                wrong = wrong + (got.view(np.uint8) != wants[i % 3].view(np.uint8)).sum()
            stream.synchronize()
        return int(wrong)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [0] * 4


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads(shared, seed):
    """Two threads: an `Experts` and a stream each, or one `Experts` on one stream for both."""
    cases = [make_small(seed + i, tokens=40 + 200 * i) for i in range(2)]
    if shared:
        cases[1] = (cases[0][0], *cases[1][1:])
    experts = [Experts(**case[0]) for case in cases]
    wants = [each(*case[1:]) for each, case in zip(experts, cases, strict=True)]
    if shared:
        experts[1] = experts[0]
    cupy.cuda.Device().synchronize()

    def work(i):
        wrong = 0
        with cupy.cuda.Stream.null if shared else cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(150):
                got = experts[i](*cases[i][1:])
                wrong = wrong + (got.view(np.uint8) != wants[i].view(np.uint8)).sum()
            stream.synchronize()
        return int(wrong)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, range(2))) == [0, 0]
