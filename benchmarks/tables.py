# SPDX-License-Identifier: Apache-2.0
"""The tables of the README and of ``docs/performance.md``, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.models import MODELS
from benchmarks.summary import (
    STEPS,
    TIMELINE,
    Cells,
    cells,
    load,
    mean,
    over_fastest,
    over_floor,
    speedups,
)

SHOWN = (1, 8, 64, 512, 4096)
KINDS = {"cold L2": {"l2": "cold"}, "skewed routing": {"routing": "skewed"}, "scales per token": {"scheme": "token"}}
"""What differs from the plain kind: scales per tensor, uniform routing, CUDA graph, warm L2."""


def table(titles: list[str], rows: list[list[str]], texts: int = 1) -> list[str]:
    """Lines of a table whose first ``texts`` columns are no numbers."""
    rule = ["---"] * texts + ["--:"] * (len(titles) - texts)
    return [f"| {' | '.join(row)} |" for row in (titles, rule, *rows)]


def named(shape: Any) -> str:
    """E, topk, K, N."""
    return ", ".join(map(str, shape))


def named_model(shape: Any) -> str:
    """The model of these, and the same."""
    model = next(name for name, of in MODELS.items() if of == tuple(shape))
    return f"{model}: {named(shape)}"


def speed_table(of: Cells) -> list[str]:
    """A line for each layer: microseconds of cupy_moe, and of vLLM in brackets."""
    shapes = dict.fromkeys(key[:4] for key in of)
    shown = [tokens for tokens in SHOWN if all((*shape, tokens) in of for shape in shapes)]

    def text(cell: dict[str, dict[str, Any]]) -> str:
        theirs = f" ({cell['vllm']['us']:.0f})" if "vllm" in cell else ""
        return f"{cell['cupy_moe']['us']:.0f}{theirs}"

    rows = [[named(shape), *(text(of[(*shape, tokens)]) for tokens in shown)] for shape in shapes]
    return table(["E, topk, K, N", *(f"M = {tokens}" for tokens in shown)], rows)


def cells_table(*names: str, name_of: Callable[[Any], str] = named) -> list[str]:
    """All cells of these files: the plain kind in full, of the others the time relative to vLLM."""
    plain = cells(*names)
    ratios = {"vLLM / cupy_moe": speedups(plain)}
    ratios |= {kind: speedups(cells(*names, **options)) for kind, options in KINDS.items()}
    ratios = {title: of for title, of in ratios.items() if of}
    columns = list(dict.fromkeys(column for cell in plain.values() for column in cell))
    over = over_floor(plain)
    rows = []
    for key, cell in plain.items():
        times = (f"{cell[column]['us']:.1f}" if column in cell else "-" for column in columns)
        shares = (f"{of[key]:.2f}" if key in of else "-" for of in ratios.values())
        ours = cell["cupy_moe"]
        floor = f"{ours['floor_us']:.1f}", f"{over[key]:.2f}" if key in over else "-"
        rows.append([name_of(key[:4]), str(key[4]), *times, *shares, *floor, f"{ours['err']:.1e}"])
    impls = {"vllm": "vLLM", "torch": "torch (the two GEMMs alone)"}
    titles = [f"{impls.get(column, column)} us" for column in columns]
    return table(["E, topk, K, N", "M", *titles, *ratios, "floor us", "cupy_moe / floor", "error"], rows)


def history_table(records: list[dict[str, Any]]) -> list[str]:
    """A line for each step."""
    kinds = ("warm", "cold", "prefill")

    def text(means: dict[str, float] | None) -> str:
        return f"{means['over_floor']:.3f} ({means['vllm']:.3f})" if means else "-"

    rows = [
        [f"`{record['commit'][:10]}`", record["device"], record["step"], *(text(record.get(kind)) for kind in kinds)]
        for record in records
    ]
    return table(["commit", "device", "with", *kinds], rows, texts=3)


def parts_table() -> list[str]:
    """The parts of a call."""
    records = load(TIMELINE)["records"]
    parts = list(records[0]["parts"])
    rows = [
        [named(record["shape"]), str(record["M"]), record["scheme"], *(f"{us:.1f}" for us in record["parts"].values())]
        for record in records
    ]
    return table(["E, topk, K, N", "M", "scales per", *parts], rows)


def steps_table() -> list[str]:
    """The kernels of the steps, with one column for each size."""
    records = load(STEPS)["records"]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        share = f", {100 * record['of_copy']:.0f} %" if record["l2"] == "cold" else ""
        if "copy_bytes_s" in record:
            share += f" ({100 * record['bytes_s'] / record['copy_bytes_s']:.0f} %)"
        row = rows.setdefault((record["step"], record["kernel"], record["scheme"]), {})
        row[named_cell(record)] = f"{record['us']:.1f} us, {record['bytes_s'] / 1e9:.0f} GB/s{share}"
    sizes = dict.fromkeys(map(named_cell, records))
    lines = [[*names, *(row.get(size, "-") for size in sizes)] for names, row in rows.items()]
    return table(["step", "kernel", "scales per", *sizes], lines, texts=3)


def backends_table(of: Cells) -> list[str]:
    """How each backend of cupy_moe stands to the fastest one."""
    rows = [
        [f"`{name}`", str(sum(ratio == 1 for ratio in ratios)), f"{mean(ratios):.2f}", f"{max(ratios):.2f}"]
        for name, ratios in over_fastest(of).items()
    ]
    return table(["backend", "fastest in", "time over the fastest, mean", "most"], rows)


def named_cell(record: dict[str, Any]) -> str:
    return f"{named(record['shape'])}, M = {record['M']}"
