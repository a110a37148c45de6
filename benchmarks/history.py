# SPDX-License-Identifier: Apache-2.0
"""What each step brought: ``python -m benchmarks.history --out FILE.json``, without a GPU.

Reads the tables of the 45 cells and of prefill that this repository's git history has, and records their geometric
means, scales per tensor and uniform routing, by the commit that was measured: ``over_floor`` is the time over the
floor of the same run, ``vllm`` that of vLLM's operators over the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.records import save
from benchmarks.summary import DEVICES, PREFILL, ROOT, TABLE, cells_of, load, mean, on, over_floor, speedups

STEPS = {
    "1a4bb280fd": "the products of cuBLASLt, kernels of our own around them",
    "0ba868f3de": "the backend `sm90`: the activation in the end of GEMM 1, tiles of as many rows as there are",
    "f8d148fabb": "clusters share the rows of a tile; routing in one launch; several loads of a thread in flight",
    "df40cd3ed0": "tensor cores add two stages; short last tiles multiply only eighths with rows; ends' rows overlap",
    "374a7351fc": "tiles of up to 208 rows in one pass; lines that have been read are dropped",
    "30f0f9eb54": "24 bits for a value between the GEMMs; few hidden states without a kernel for their maximum",
    "d18e098898": "GEMM 1 starts beside routing and asks for weights first; small tiles leave registers to others",
    "7aaf99d3de": "few pairs are routed while their tokens are quantised; more slots of `combine` in flight",
    "e8be730f8c": "one warp of a block reads the partial maxima",
    "ef7e9908ea": "clusters keep in step where rows are long; 24 bits with scales per token too",
    "9e4322f262": "the producer is one warp, whose first copies come earlier; up to 2048 pairs beside the codes",
    "34a5554585": "nothing that a call would notice: what differs is the run",
    "b373d32200": "the same: what differs is the device",
    "345fc55ed7": "weights read once leave the L2 cache first; copies fetch no more than they take; narrow tiles",
    "0919a3fade": "short row tiles load and multiply what they have; no tile waits for its scale",
    "76cf280c96": "kernels beside the GEMMs ask for more before they use any of it; fewer instructions per value",
    "15cd3d0954": "a block of `combine` takes several tokens only where their slots are few",
    "5f68009091": "fewer instructions in `combine`: nothing that a call would notice, what differs is the run",
    "6d17c194c5": "GEMM 2 of many rows in turns: one warpgroup multiplies while the other ends its tile",
    "afc8966852": "nothing new with one scale, what differs is the run; scales per token need no clusters",
    "fe58d650e9": "the same with one scale; with one per token, of much data nothing is dropped from the L2 cache",
    "ccc13a4c80": "nothing new in these cells: what differs is the device, another H200 with a dense rate 3 % lower",
    "bfda67cd1b": "an expert's rows are spread evenly over its row tiles; tiles for what lies between powers of two",
    "f7bc779918": "clusters claim their tiles instead of taking turns; large tiles by what their row tiles cost",
}
"""What was new when a commit, by its first ten digits, was measured."""
Content = dict[str, Any]


def versions_of(kind: str) -> dict[str, Content]:
    """Every content of the files like ``kind``, by the first ten digits of the commit measured; those of now too."""
    found = {}
    for name in (on(device, kind) for device in DEVICES):
        path = f"benchmarks/results/{name}"
        for commit in _git("log", "--reverse", "--diff-filter=AM", "--format=%H", "--", path).split():
            content = json.loads(_git("show", f"{commit}:{path}"))
            found[content["header"]["commit"][:10]] = content
        now = load(name)
        if now["records"]:
            found[now["header"]["commit"][:10]] = now
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def means(content: Content, l2: str) -> dict[str, float]:
    """The geometric means of one kind of cells."""
    of = cells_of(content["records"], l2=l2)
    return {"cells": len(of), "over_floor": mean(over_floor(of).values()), "vllm": mean(speedups(of).values())}


def main(arguments: list[str] | None = None) -> int:
    """Write the records of `STEPS`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__)
    parser.add_argument("--out", metavar="FILE.json", required=True)
    out = parser.parse_args(arguments).out
    tables, prefills = versions_of(TABLE), versions_of(PREFILL)
    records = []
    for commit, step in STEPS.items():
        kinds = {l2: means(tables[commit], l2) for l2 in ("warm", "cold")}
        if commit in prefills:
            kinds["prefill"] = means(prefills[commit], "warm")
        measured = tables[commit]["header"]
        records.append({"device": measured["device"], "commit": measured["commit"], "step": step, **kinds})
    save(out, load(TABLE)["header"] | {"command": "python -m benchmarks.history --out FILE.json"}, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
