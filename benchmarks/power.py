# SPDX-License-Identifier: Apache-2.0
"""What ``docs/performance.md`` says of power: calls that follow one another, and the clock that one kernel leaves."""

from __future__ import annotations

from typing import Any

from benchmarks.summary import CLOCKS, SUSTAINED, Cells, cells, device_of, joules, load
from benchmarks.tables import named, table

MANY_TOKENS = 4096
"""From which on GEMMs multiply more than they wait for memory."""


def kept_busy() -> list[str]:
    """What calls take of a device that has no pauses."""
    content = load(SUSTAINED)
    if not content["records"]:
        return []
    header = content["header"]
    watts = [record["watts"] for record in content["records"] if record["power_capped"] == 1]
    spread = f": between {min(watts):.0f} and {max(watts):.0f} W where every reading found the limit" if watts else ""

    def dense(rate: float) -> str:
        return f"{rate / 1e12:.0f} TFLOP/s"

    times = [
        f"{dense(of['fp8_flop_s'])} {when} all calls ({of['sm_mhz']:.0f} MHz, {of['watts']:.0f} W)"
        for when, of in header["dense"].items()
    ]
    return [
        "## When the device is kept busy", "",
        f"{header['device']}. Each call is replayed for {header['seconds']} s. Scales per tensor, uniform routing, "
        "CUDA graph, warm L2 cache. MHz is the clock of the multiprocessors, the last column the share of NVML's "
        "readings that found a "
        f"power limit in force, which is {header['power_limit_watts']:.0f} W. W and the energy come from NVML's "
        f"counter, which is coarse for so short a time{spread}. The dense product that the floor is made with reaches "
        f"{dense(header['rates']['fp8_flop_s'])} in a few milliseconds, and kept busy {' and '.join(times)}.", "",
        *sustained_table(cells(SUSTAINED)), "",
    ]


def sustained_table(of: Cells) -> list[str]:
    """Calls of a device that is kept busy, and what holds its clock down."""
    rows = []
    for key, cell in of.items():
        ours, theirs = cell["cupy_moe"], cell.get("vllm")
        _, topk, k, n, tokens = key
        rate = 6e-6 * tokens * topk * k * n / ours["us"]
        beside = (f"{theirs['us'] / ours['us']:.2f}", f"{joules(theirs) / joules(ours):.2f}") if theirs else "--"
        rows.append([
            named(key[:4]), str(tokens), f"{ours['us']:.1f}", *beside, f"{rate:.0f}", f"{ours['sm_mhz']:.0f}",
            f"{ours['watts']:.0f}", f"{ours['power_capped']:.0%}",
        ])
    titles = ["E, topk, K, N", "M", "cupy_moe us", "vLLM / cupy_moe", "energy, vLLM / cupy_moe", "TFLOP/s", "MHz", "W"]
    return table([*titles, "at the power limit"], rows)


def clocks() -> list[str]:
    """What one kernel alone does to the clock."""
    content = load(CLOCKS)
    if not content["records"]:
        return []
    dense = content["header"]["dense"]
    return [
        "## The clock of one GEMM", "",
        f"{device_of(CLOCKS)}, scales per tensor, uniform routing. Nsight Compute counts nanoseconds and cycles of one "
        "kernel, which has the device for itself and a pause in front. \"Busy\" is the rate over what the tensor cores "
        f"could do at that clock. The highest clock is {content['header']['clocks']['clocks.max.sm']}. The dense "
        f"product runs at {dense['sm_mhz']:.0f} MHz, {dense['flop_s'] / 1e12:.0f} TFLOP/s, {dense['tensor_busy']:.0%} "
        "busy.", "", *clocks_table([record for record in content["records"] if record["M"] >= MANY_TOKENS]), "",
    ]


def clocks_table(records: list[dict[str, Any]]) -> list[str]:
    """Both GEMMs of a call, the clock meanwhile, and how busy the tensor cores are at that clock."""
    rows = []
    for record in records:
        both = (record["gemm1"], record["gemm2"])
        values = (
            (f"{of['us']:.0f}", f"{of['flop_s'] / 1e12:.0f}", f"{of['sm_mhz']:.0f}", f"{of['tensor_busy']:.0%}")
            for of in both
        )
        rows.append([named(record["shape"]), str(record["M"]), *(text for of in values for text in of)])
    titles = [f"GEMM {gemm}: {what}" for gemm in (1, 2) for what in ("us", "TFLOP/s", "MHz", "busy")]
    return table(["E, topk, K, N", "M", *titles], rows)
