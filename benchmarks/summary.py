# SPDX-License-Identifier: Apache-2.0
"""What the report and its plots read from ``benchmarks/results``; a file that is missing has no records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("h200", "h100")
"""What results are of, the newest first: the names of their files end with it."""


def newest(kind: str) -> str:
    """The file with the results of a kind, of the newest device that has been measured."""
    names = [f"{kind}_{device}.json" for device in DEVICES]
    return next((name for name in names if (RESULTS / name).exists()), names[0])


def on(device: str, name: str) -> str:
    """The file of the same kind of another device."""
    return f"{name.rpartition('_')[0]}_{device}.json"


TABLE = newest("table")
DEVICE = TABLE.removesuffix(".json").rpartition("_")[2]
"""That of the tables of cells, which are put together."""
PREFILL, SWEEP, SKEWED, MODELS = (f"{kind}_{DEVICE}.json" for kind in ("prefill", "sweep", "skewed", "models"))
EAGER, BACKENDS = map(newest, ("eager", "backends"))
TIMELINE, STEPS, FIRST_CALL = map(newest, ("timeline", "steps", "first_call"))
PRECISION, INVARIANCE, EARLY = map(newest, ("precision", "invariance", "early"))
SUSTAINED, CLOCKS = map(newest, ("sustained", "clocks"))
HISTORY = "history.json"

DISTURBED = 1.25
"""Replays of a graph take the same time again: a median so many times the minimum is not that of the call alone."""

Cells = dict[tuple[int, ...], dict[str, dict[str, Any]]]
"""(E, topk, K, N, M) to the record of each implementation."""


def load(name: str) -> dict[str, Any]:
    """One file of results."""
    path = RESULTS / name
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"header": {}, "records": []}
    return content


def device_of(name: str) -> str:
    """The device that a file of results is of."""
    return str(load(name)["header"].get("device", "no device"))


def sources() -> dict[str, str]:
    """Each file of results to the commit that was measured."""
    return {path.name: json.loads(path.read_text())["header"]["commit"] for path in sorted(RESULTS.glob("*.json"))}


def digests(names: Iterable[str]) -> str:
    """Which contents of which files something was made from."""
    found = {name: (RESULTS / name).read_bytes() for name in names if (RESULTS / name).exists()}
    return " ".join(f"{name}:{hashlib.sha256(content).hexdigest()[:16]}" for name, content in found.items())


def mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))  # `sum` of floats has other last bits from Python 3.12 on


PLAIN = {"scheme": "tensor", "routing": "uniform", "mode": "graph", "l2": "warm"}
"""What records are of unless something else is asked for."""


def cells(*names: str, **wanted: str) -> Cells:
    """The records of one kind in these files, cell by cell; of cells in several files those of the first."""
    found: Cells = {}
    for name in names:
        of_file = cells_of(load(name)["records"], **wanted)
        found |= {key: cell for key, cell in of_file.items() if key not in found}
    return found


def cells_of(records: Iterable[dict[str, Any]], **wanted: str) -> Cells:
    """Those of one kind, cell by cell: `PLAIN` but for what is ``wanted``.

    Of several backends of cupy_moe in a cell, the first to be measured goes by that name, others by their own.
    """
    found: Cells = {}
    for record in records:
        if all(record[key] == value for key, value in (PLAIN | wanted).items()):
            cell = found.setdefault((*record["shape"], record["M"]), {})
            cell[record["backend"] if record["impl"] in cell else record["impl"]] = record
    return found


def over_fastest(of: Cells) -> dict[str, list[float]]:
    """For each backend its time over that of the fastest, cell by cell."""
    ratios: dict[str, list[float]] = {}
    for cell in of.values():
        times = {record["backend"]: record["us"] for record in cell.values()}
        for backend, us in times.items():
            ratios.setdefault(backend, []).append(us / min(times.values()))
    return ratios


def disturbed(record: dict[str, Any]) -> bool:
    """Whether something else ran beside most of the replays."""
    return bool(record["mode"] == "graph" and record["us"] > DISTURBED * record["us_min"])


def joules(record: dict[str, Any]) -> float:
    """Energy of one call of a device that is kept busy."""
    return float(record["watts"] * record["us"] * 1e-6)


def speedups(of: Cells) -> dict[tuple[int, ...], float]:
    """Time of vLLM over that of cupy_moe, where both were measured and neither was `disturbed`."""
    both = {key: (cell["vllm"], cell["cupy_moe"]) for key, cell in of.items() if {"vllm", "cupy_moe"} <= cell.keys()}
    return {key: pair[0]["us"] / pair[1]["us"] for key, pair in both.items() if not any(map(disturbed, pair))}


def over_floor(of: Cells, name: str = "cupy_moe") -> dict[tuple[int, ...], float]:
    """Time of an implementation over the floor, where it was not `disturbed`."""
    own = {key: cell[name] for key, cell in of.items() if name in cell and not disturbed(cell[name])}
    return {key: record["us"] / record["floor_us"] for key, record in own.items()}


def in_turns(records: list[dict[str, Any]], choice: str) -> dict[tuple[int, ...], float]:
    """Time with a ``choice`` over the time without it, cell by cell."""
    us = {(*record["shape"], record["M"], record[choice]): record["us"] for record in records}
    return {key[:-1]: with_it / us[(*key[:-1], False)] for key, with_it in us.items() if key[-1]}


def choice(records: list[dict[str, Any]], name: str) -> str:
    """What a choice costs or brings, in a sentence or two; nothing where nothing was measured."""
    ratios = in_turns(records, name).values()
    if not ratios:
        return ""
    spread = median((record["us_max"] - record["us_min"]) / record["us"] for record in records)
    same = sum(record["same_bits"] for record in records if record[name])
    return (
        f"With it a call takes {mean(ratios):.3f} times as long as without it (geometric mean of "
        f"{len(ratios)} cells, from {min(ratios):.3f} to {max(ratios):.3f}). The slowest and the fastest round of one "
        f"timing differ by {spread:.1%} in the median. In {same} of {len(ratios)} cells both have the same bits."
    )
