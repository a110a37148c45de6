# SPDX-License-Identifier: Apache-2.0
"""Where the time of a call goes: ``python -m benchmarks.timeline --out FILE.json``.

Runs calls of the benchmark's layers, kernel by kernel, under torch's profiler and records the median duration of each
part in microseconds: route, quantize, gemm1, activation, gemm2 and combine. Gaps between kernels are in none of them;
``us`` is the median of their sum. The result is checked first.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cupy_moe
from benchmarks import cases
from benchmarks.records import make_header, make_parser, save
from benchmarks.table import ERROR_LIMITS, Check
from cupy_moe import pipeline

CALLS, TOKENS = 20, (1, 64, 512, 4096)
PARTS = {
    "route": "route", "amax_tokens": "quantize", "quantize_shuffle": "quantize", "amax_rows": "activation",
    "activation_quantize": "activation", "requantize": "activation", "combine": "combine",
}
"""Part of each kernel of ours, by the start of its name; all others belong to the GEMM that is due."""


def parts_of(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds of each part of a call, from (name, us) of its kernels in the order of execution."""
    total = dict.fromkeys(("route", "quantize", "gemm1", "activation", "gemm2", "combine"), 0.0)
    due, multiplied = "gemm1", False
    for name, us in kernels:
        part = next((part for start, part in PARTS.items() if name.startswith(start)), None)
        multiplied = (multiplied or part is None) and part != "route"
        if part == "quantize" and multiplied:  # GEMM 1 ended with the activation; these are its codes
            part = "activation"
        due = {"route": "gemm1", "quantize": "gemm1", "activation": "gemm2"}.get(part or "", due)
        total[part or due] += us
    return total


def summed_up(calls: list[dict[str, float]]) -> dict[str, Any]:
    """What a record says of these calls' parts."""
    sums = [sum(parts.values()) for parts in calls]
    return {
        "us": statistics.median(sums), "us_min": min(sums), "us_max": max(sums),
        "parts": {part: statistics.median(parts[part] for parts in calls) for part in calls[0]},
    }


def measure(experts: Any, inputs: cases.Inputs) -> dict[str, Any]:
    """Check the result on one cell's inputs, then profile calls."""

    def call() -> torch.Tensor:
        return experts(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)

    error, unquantized = Check(inputs)(call())
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    kernels = [(event.name, event.time_range.elapsed_us()) for event in events]
    count, rest = divmod(len(kernels), CALLS)
    assert rest == 0, f"{len(kernels)} kernels of {CALLS} calls"
    calls = [parts_of(kernels[i * count : (i + 1) * count]) for i in range(CALLS)]
    return {"err": error, "err_unquantized": unquantized, **summed_up(calls)}


def main() -> int:
    """Run all layers."""
    parser = make_parser("benchmarks.timeline", __doc__)
    parser.add_argument("--backend", help="a name of cupy_moe.backends()")
    options = parser.parse_args()
    header = make_header("benchmarks.timeline", sys.argv[1:], out=options.out, commit=options.commit)
    pipeline.CALLS_BEFORE_REPLAY = sys.maxsize  # the profiler names kernels, not graphs
    pipeline.OVERLAP = header["overlap"] = False  # it would count a kernel's wait for the one in front
    records: list[dict[str, Any]] = []
    for shape in cases.SHAPES:
        for scheme in cases.SCHEMES:
            w = cases.make_weights(shape, scheme)
            experts = cupy_moe.Experts(
                w.w1, w.w2, w1_scale=w.w1_scale, w2_scale=w.w2_scale, per_act_token=scheme == "token",
                backend=options.backend,
            )
            for tokens in TOKENS:
                inputs = cases.make_inputs(shape, tokens, scheme, weights=w)
                rates, active = header["rates"], cases.active_experts(inputs.topk_ids)
                record = measure(experts, inputs)
                records.append({
                    "device": header["device"], "impl": "cupy_moe", "backend": experts.backend, "shape": list(shape),
                    "M": tokens, "scheme": scheme, "routing": "uniform", "mode": "eager", "l2": "warm",
                    "floor_us": cases.floor_us(shape, tokens, active, rates["read_bytes_s"], rates["fp8_flop_s"]),
                    **record,
                })
                text = ", ".join(f"{part} {us:.1f}" for part, us in record["parts"].items())
                print(*shape, "M", tokens, scheme, text, f"error {record['err']:.1e}", flush=True)
    save(options.out, header, records)
    return int(any(not record["err"] <= ERROR_LIMITS["cupy_moe"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
