# SPDX-License-Identifier: Apache-2.0
"""What ``docs/performance.md`` says of the bytes that the kernels of a call move beyond the L2 cache."""

from __future__ import annotations

from typing import Any

from benchmarks.summary import CLOCKS, device_of, load
from benchmarks.tables import named, table

COLUMNS = ("maximum", "codes", "GEMM 1", "codes again", "GEMM 2", "combine")


def traffic() -> list[str]:
    """What each kernel reads and writes of the device's memory."""
    records = [record for record in load(CLOCKS)["records"] if "traffic" in record]
    if not records:
        return []
    return [
        "## What goes to memory", "",
        f"{device_of(CLOCKS)}, scales per tensor, uniform routing. MB that each kernel of a call reads / writes beyond "
        "the L2 cache, as Nsight Compute counts them; each kernel was started when the one in front of it was done. "
        "Writes are those that leave the L2 cache meanwhile, some of them what kernels before have written. "
        "\"Hidden states\" is their size: the kernel that finds their maximum reads them once, and the one that makes "
        "their codes has them again.", "",
        *traffic_table(records), "",
    ]


def traffic_table(records: list[dict[str, Any]]) -> list[str]:
    """One row for each layer and number of tokens."""
    rows = []
    for record in records:
        moved = by_column(record["traffic"])
        size = record["M"] * record["shape"][2] * 2 / 1e6
        rows.append([
            named(record["shape"]), str(record["M"]), f"{size:.1f}",
            *(" / ".join(f"{of / 1e6:.{int(of < 1e7)}f}" for of in moved[name]) for name in COLUMNS),
        ])
    return table(["E, topk, K, N", "M", "hidden states", *COLUMNS], rows)


def by_column(kernels: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Bytes read and written in each of `COLUMNS`, from the kernels of a call in their order; routing is left out."""
    moved, gemms = dict.fromkeys(COLUMNS, (0.0, 0.0)), 0
    for kernel in kernels:
        name = kernel["kernel"]
        gemms += name.startswith("grouped_gemm")
        if name.startswith("grouped_gemm"):
            column = f"GEMM {gemms}"
        elif name.startswith(("amax", "combine")):
            column = "maximum" if name.startswith("amax") else "combine"
        elif "quantize" in name:
            column = "codes again" if gemms else "codes"
        else:
            continue
        moved[column] = kernel["read_bytes"], kernel["written_bytes"]
    return moved
