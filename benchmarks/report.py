# SPDX-License-Identifier: Apache-2.0
"""Writes what the README and ``docs/performance.md`` say of speed, and the plots, from ``benchmarks/results``.

``python -m benchmarks.report`` replaces the text between the two markers of each and draws ``docs/images``. The plots
need matplotlib, the text does not. What has not been measured is left out.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

from benchmarks import accuracy, power, traffic
from benchmarks.summary import (
    BACKENDS,
    DEVICE,
    DEVICES,
    EAGER,
    EARLY,
    FIRST_CALL,
    HISTORY,
    INVARIANCE,
    MODELS,
    PRECISION,
    PREFILL,
    ROOT,
    SKEWED,
    STEPS,
    SUSTAINED,
    SWEEP,
    TABLE,
    TIMELINE,
    cells,
    choice,
    device_of,
    disturbed,
    in_turns,
    joules,
    load,
    mean,
    on,
    over_floor,
    sources,
    speedups,
)
from benchmarks.tables import (
    backends_table,
    cells_table,
    history_table,
    named,
    named_cell,
    named_model,
    parts_table,
    speed_table,
    steps_table,
    table,
)

BEGIN, END = "<!-- speed: python -m benchmarks.report -->", "<!-- end of speed -->"


def comparisons(device: str) -> list[str]:
    """A line for each group of cells: how cupy_moe stands to vLLM and to the floor; and what is not among them."""
    groups = [("45 cells", TABLE, "uniform", "warm"), ("45 cells", TABLE, "uniform", "cold")]
    groups += [("45 cells", SKEWED, "skewed", "warm")]
    groups += [("prefill, M from 1024 to 16384", PREFILL, routing, "warm") for routing in ("uniform", "skewed")]
    groups += [("layers of models, M from 1 to 4096", MODELS, "uniform", "warm")]
    rows, without = [], []
    for what, name, routing, l2 in groups:
        for scheme in ("tensor", "token"):
            of = cells(on(device, name), scheme=scheme, routing=routing, l2=l2)
            without += [record for cell in of.values() for record in cell.values() if disturbed(record)]
            faster, over = speedups(of).values(), over_floor(of).values()
            if faster:
                span = f"{min(faster):.2f} to {max(faster):.2f}"
                rows.append([what, routing, l2, scheme, f"{mean(faster):.2f}", span, f"{mean(over):.2f}"])
    titles = ["cells", "routing", "L2 cache", "scales per", "vLLM / cupy_moe", "least to most", "cupy_moe / floor"]
    return [*table(titles, rows, texts=4), *map(_left_out, without)]


def elsewhere() -> list[str]:
    """The same of the devices that were measured before."""
    lines = []
    for device in DEVICES:
        name = on(device, TABLE)
        if name != TABLE and load(name)["records"]:
            commit = load(name)["header"]["commit"][:10]
            lines += ["", f"On an {device_of(name)}, at commit `{commit}`:", "", *comparisons(device)]
    return lines


def _left_out(record: dict[str, Any]) -> str:
    kind = f"{record['routing']} routing, {record['l2']} L2 cache, scales per {record['scheme']}"
    return (
        f"\nLeft out of its mean: {named_cell(record)}, {kind}, where something disturbed {record['impl']} "
        f"({record['us']:.0f} us in the median, {record['us_min']:.0f} us at least)."
    )


def _where(name: str) -> str:
    """On which device something was measured, unless it is that of the tables."""
    return "" if device_of(name) == device_of(TABLE) else f" on an {device_of(name)}"


def section() -> str:
    """What the README says."""
    header = load(TABLE)["header"]
    lines = [
        f"One call of the whole layer in microseconds; in brackets vLLM {header['versions']['vllm']}'s operators on "
        f"the same inputs in the same run. {header['device']}, CUDA graph replay, float16 in and out, dynamic scales "
        "per tensor, warm L2 cache.",
        "", *speed_table(cells(TABLE, PREFILL)), "",
        "![Speed relative to vLLM, every cell](docs/images/speedup.png)", "",
        "Geometric means of the ratios of times, and their range:", "", *comparisons(DEVICE), *elsewhere(), "",
        *remarks(), "",
        "The floor is the larger of reading the active experts' weights at the read rate of the device and multiplying "
        "at its dense fp8 rate, both measured in the same run, plus reading and writing the activations. All cells, "
        "versions and commands are in [benchmarks/results](benchmarks/results); "
        "[docs/performance.md](docs/performance.md) says how they were measured and where the time goes.",
    ]
    return "\n".join(lines)


def remarks() -> list[str]:
    """Lines on the host's time, the accuracy and the first call."""
    eager = [cell for key, cell in cells(EAGER, mode="eager").items() if key[4] <= 64]
    host, theirs = ([cell[impl]["host_us"] for cell in eager] for impl in ("cupy_moe", "vllm"))
    warm = cells(TABLE).values()
    files = [on(device, name) for device in DEVICES for name in (TABLE, SKEWED, PREFILL, MODELS)]
    records = [record for name in files for record in load(name)["records"]]
    errors = [record["err"] for record in records if record["impl"] == "cupy_moe"]
    beside = [cell["cupy_moe"]["err_unquantized"] / cell["vllm"]["err_unquantized"] for cell in warm]
    parts = ("library", "experts", "call")
    cold, hot = (sum(record["seconds"][name] for name in parts) for record in load(FIRST_CALL)["records"])
    return [
        f"- The host's part of an eager call with up to 64 tokens{_where(EAGER)}: {median(host):.0f} us in the median "
        f"and at most {max(host):.0f} us (vLLM's operators: {median(theirs):.0f} us in the median).",
        f"- Relative error against the float32 reference: at most {max(errors):.1e} in all of these cells. Against the "
        "layer without any quantisation of activations, with uniform routing and scales per tensor, it is "
        f"{mean(beside):.3f} times that of vLLM (geometric mean; at most {max(beside):.3f}).",
        *_energy(),
        f"- The first call of a process{_where(FIRST_CALL)}, with all compiling: {cold:.1f} s, and {hot:.2f} s once "
        "the kernels are in CuPy's cache.",
    ]


def _energy() -> list[str]:
    """A line on what calls take of a device that is kept busy."""
    both = [cell for cell in cells(SUSTAINED).values() if "vllm" in cell]
    if not both:
        return []
    ratios = [joules(cell["vllm"]) / joules(cell["cupy_moe"]) for cell in both]
    return [
        f"- Where calls follow one another without pauses{_where(SUSTAINED)}, vLLM's operators take "
        f"{mean(ratios):.2f} times the energy for one (geometric mean of {len(ratios)} cells, from "
        f"{min(ratios):.2f} to {max(ratios):.2f})."
    ]


def details() -> str:
    """What ``docs/performance.md`` says."""
    waits = "Our kernels start while the one in front of them still runs, and the profiler counts their wait."
    if not load(TIMELINE)["header"].get("overlap", True):
        waits = "Each kernel was started when the one in front of it was done, which is not so in a call."
    lines = [
        "## The 45 cells", "",
        f"{device_of(TABLE)}, scales per tensor, uniform routing, CUDA graph, warm L2 cache. The columns named after "
        "another kind have vLLM / cupy_moe of that kind.", "",
        "![Speed relative to vLLM, every cell](images/speedup.png)", "", *cells_table(TABLE, SKEWED), "",
    ]
    for title, name in (("Prefill", PREFILL), ("One layer with 1 to 16384 tokens", SWEEP)):
        if load(name)["records"]:
            lines += [f"## {title}", "", f"{device_of(name)}.", "", *cells_table(name), ""]
    if load(MODELS)["records"]:
        lines += [
            "## Layers of models", "",
            f"{device_of(MODELS)}. The routed experts in the sizes of these models on one device, random weights, one "
            "scale per tensor or per channel, whatever scales a checkpoint of the model has.", "",
            *cells_table(MODELS, name_of=named_model), "",
        ]
    lines += [
        "## Time over the floor", "", "![Time over the floor against M](images/floor.png)", "",
        "## Where the time goes", "",
        f"{device_of(TIMELINE)}, microseconds by the profiler, without the gaps between kernels. "
        "\"route\" has the quantisation with it where "
        "one launch does both; \"quantize\" is two kernels where one dynamic scale serves a tensor that is not small; "
        "\"activation\" is what stands between the two GEMMs. " + waits, "",
        "![Parts of a call](images/parts.png)", "", *parts_table(), "",
    ]
    lines += [*power.kept_busy(), *power.clocks(), *traffic.traffic()]
    steps = load(STEPS)
    if steps["records"]:
        rates = steps["header"]["rates"]
        notes = ""
        if any("copy_bytes_s" in record for record in steps["records"]):
            notes += (
                " In brackets, where these are more than 16 MB, in percent of the rate of a copy of as many bytes, "
                "which is launched and timed as the kernel is and has a start and an end too."
            )
        if any(record.get("overlap") for record in steps["records"]):
            notes += (
                " A kernel that is part of a call starts while the one in front of it still runs, which is the same "
                "kernel on other arrays here."
            )
        read, write, copy = (rates[f"{name}_bytes_s"] / 1e12 for name in ("read", "write", "copy"))
        lines += [
            "## The steps one by one", "",
            f"{device_of(STEPS)}. The time of one kernel alone, and the bytes that it has to move over that time: in "
            "percent of the rate of "
            f"a copy where the arrays are larger than the L2 cache. In the same run a copy reaches {copy:.2f} TB/s, "
            f"reading alone {read:.2f} and writing alone {write:.2f}." + notes, "", *steps_table(), "",
        ]
    beside = cells(BACKENDS)
    if beside:
        lines += [
            "## The backends beside one another", "",
            f"{device_of(BACKENDS)}, scales per tensor, uniform routing, CUDA graph, warm L2 cache, {len(beside)} "
            "cells: those of the first two tables. The mean is the geometric one.", "", *backends_table(beside), "",
        ]
    cost = choice(load(INVARIANCE)["records"], "batch_invariant")
    if cost:
        kind = f"{device_of(INVARIANCE)}, scales per token, uniform routing, CUDA graph, warm L2 cache, in turns."
        lines += ["## Batch invariance", "", f"What `batch_invariant=True` costs. {kind} {cost}", ""]
    lines += early()
    precision = load(PRECISION)["records"]
    if precision:
        lines += [*accuracy.section(precision, device_of(PRECISION)), ""]
    lines += history()
    rows = [[f"[{name}](../benchmarks/results/{name})", f"`{commit[:10]}`"] for name, commit in sources().items()]
    lines += ["## What was measured when", "", *table(["results", "commit"], rows, texts=2)]
    return "\n".join(lines).rstrip()


def early() -> list[str]:
    """What it brings that GEMMs ask for weights before there are rows."""
    records = load(EARLY)["records"]
    ratios = in_turns(records, "early_weights")
    if not ratios:
        return []
    tokens = sorted({key[-1] for key in ratios})
    rows = [
        [named(shape), *(f"{1 - ratios[(*shape, M)]:.1%}" for M in tokens)]
        for shape in dict.fromkeys(key[:-1] for key in ratios)
    ]
    return [
        "## Weights asked for early", "",
        "Both GEMMs of `sm90` ask for the weights of their first stages before the kernel in front of them is done. "
        f"{device_of(EARLY)}, scales per tensor, uniform routing, CUDA graph, warm L2 cache, in turns in one run with "
        "GEMMs that wait. "
        f"{choice(records, 'early_weights')} What it saves of the time without it:", "",
        *table(["E, topk, K, N", *(f"M = {M}" for M in tokens)], rows), "",
    ]


def history() -> list[str]:
    """How the ratios came to be what they are."""
    records = load(HISTORY)["records"]
    if not records:
        return []
    return [
        "## What each step brought", "",
        "Geometric means, scales per tensor, uniform routing, CUDA graph: the time over the floor, and in brackets "
        "vLLM / cupy_moe, of the 45 cells with warm and with cold L2 cache and of the 25 of prefill. Each line is a "
        "run of its own, with the floor and vLLM measured in it; what came in between was not measured alone.", "",
        *history_table(records), "",
    ]


def main() -> int:
    """Replace both texts, draw the plots."""
    for name, text in (("README.md", section()), ("docs/performance.md", details())):
        old = (ROOT / name).read_text()
        begin, end = old.index(BEGIN) + len(BEGIN), old.index(END)
        (ROOT / name).write_text(f"{old[:begin]}\n\n{text}\n\n{old[end:]}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"docs/images stays as it is, matplotlib cannot be imported ({error}): pip install '.[bench]'")
        return 0
    from benchmarks import plots

    plots.draw_all()
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args()  # for --help
    sys.exit(main())
