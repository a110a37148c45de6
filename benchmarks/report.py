# SPDX-License-Identifier: Apache-2.0
"""Writes what the README and ``docs/performance.md`` say of speed, from the files in ``benchmarks/results``.

``python -m benchmarks.report`` replaces the text between the two markers of each.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: python -m benchmarks.report -->", "<!-- end of speed -->"
PRECISION = "precision_h100.json"
SHOWN = (1, 8, 64, 512)


def load(name: str) -> dict[str, Any]:
    """One file of results."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def cells(records: list[dict[str, Any]], **wanted: str) -> dict[tuple[int, ...], dict[str, dict[str, Any]]]:
    """(E, topk, K, N, M) to the record of each implementation, of the records that match."""
    found: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        if all(record[key] == value for key, value in wanted.items()):
            found.setdefault((*record["shape"], record["M"]), {})[record["impl"]] = record
    return found


def ratios(of: dict[tuple[int, ...], dict[str, dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Time of vLLM over that of cupy_moe, and that of cupy_moe over the floor, of each cell."""
    faster = [cell["vllm"]["us"] / cell["cupy_moe"]["us"] for cell in of.values()]
    return faster, [cell["cupy_moe"]["us"] / cell["cupy_moe"]["floor_us"] for cell in of.values()]


def speed_table(of: dict[tuple[int, ...], dict[str, dict[str, Any]]]) -> list[str]:
    """A line for each layer: microseconds of cupy_moe, and of vLLM in brackets."""
    titles = " | ".join(f"M = {tokens}" for tokens in SHOWN)
    lines = [f"| E, topk, K, N | {titles} |", "| --- |" + " --: |" * len(SHOWN)]
    for shape in dict.fromkeys(key[:4] for key in of):
        row = [of[(*shape, tokens)] for tokens in SHOWN]
        texts = [f"{cell['cupy_moe']['us']:.0f} ({cell['vllm']['us']:.0f})" for cell in row]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(texts)} |")
    return lines


def section() -> str:
    """The text between the two markers."""
    table, first = load("table_h100.json"), load("first_call_h100.json")
    header, records = table["header"], table["records"]
    warm = cells(records, scheme="tensor", mode="graph", l2="warm")
    lines = [
        f"One call of the whole layer in microseconds; in brackets vLLM {header['versions']['vllm']}'s operators on "
        f"the same inputs in the same run. {header['device']}, CUDA graph replay, float16 in and out, dynamic scales "
        "per tensor, warm L2 cache.",
        "", *speed_table(warm), "",
    ]  # fmt: skip
    for scheme, l2 in (("tensor", "warm"), ("tensor", "cold"), ("token", "warm"), ("token", "cold")):
        faster, over = ratios(cells(records, scheme=scheme, mode="graph", l2=l2))
        lines.append(
            f"- Scales per {scheme}, {l2} L2 cache, {len(faster)} cells: {mean(faster):.2f} times as fast as vLLM "
            f"(geometric mean; between {min(faster):.2f} and {max(faster):.2f}), {mean(over):.2f} times the floor."
        )
    eager = cells(records, scheme="tensor", mode="eager", l2="warm")
    host = [cell["cupy_moe"]["host_us"] for key, cell in eager.items() if key[4] <= 64]
    theirs = [cell["vllm"]["host_us"] for key, cell in eager.items() if key[4] <= 64]
    errors = [cell["cupy_moe"]["err"] for cell in warm.values()]
    beside = [cell["cupy_moe"]["err_unquantized"] / cell["vllm"]["err_unquantized"] for cell in warm.values()]
    cold, hot = (sum(record["seconds"][name] for name in ("library", "experts", "call")) for record in first["records"])
    lines += [
        f"- The host's part of an eager call with up to 64 tokens: {median(host):.0f} us in the median and at most "
        f"{max(host):.0f} us (vLLM's operators: {median(theirs):.0f} us in the median).",
        f"- Relative error against the float32 reference: at most {max(errors):.1e}. Against the layer without any "
        f"quantisation of activations it is {mean(beside):.3f} times that of vLLM (geometric mean; at most "
        f"{max(beside):.3f}).",
        f"- The first call of a process, with opening cuBLASLt and all compiling: {cold:.1f} s, and {hot:.1f} s once "
        "the kernels are in CuPy's cache.",
        "",
        "The floor is the larger of reading the active experts' weights at the read rate of the device and multiplying "
        "at its dense fp8 rate, both measured in the same run, plus reading and writing the activations. All cells, "
        "versions and commands are in [benchmarks/results](benchmarks/results); "
        "[docs/performance.md](docs/performance.md) says how they were measured and where the time goes.",
    ]
    return "\n".join(lines)


def details() -> str:
    """The tables of ``docs/performance.md``: all cells, the parts of a call, then the accuracy."""
    table, timeline = load("table_h100.json"), load("timeline_h100.json")
    titles = ("M", "cupy_moe us", "vLLM us", "vLLM / cupy_moe", "cold", "floor us", "cupy_moe / floor", "error")
    lines = [f"| E, topk, K, N | {' | '.join(titles)} |", "| --- |" + " --: |" * len(titles)]
    warm, cold = (cells(table["records"], scheme="tensor", mode="graph", l2=l2) for l2 in ("warm", "cold"))
    for key, cell in warm.items():
        ours, theirs, floor = cell["cupy_moe"], cell["vllm"]["us"], cell["cupy_moe"]["floor_us"]
        in_cold = cold[key]["vllm"]["us"] / cold[key]["cupy_moe"]["us"]
        lines.append(
            f"| {', '.join(map(str, key[:4]))} | {key[4]} | {ours['us']:.1f} | {theirs:.1f} "
            f"| {theirs / ours['us']:.2f} | {in_cold:.2f} | {floor:.1f} | {ours['us'] / floor:.2f} "
            f"| {ours['err']:.1e} |"
        )
    parts = list(timeline["records"][0]["us"])
    lines += ["", f"| E, topk, K, N | M | scales per | {' | '.join(parts)} |"]
    lines.append("| --- | --: | --- |" + " --: |" * len(parts))
    for record in timeline["records"]:
        times = " | ".join(f"{record['us'][part]:.1f}" for part in parts)
        lines.append(f"| {', '.join(map(str, record['shape']))} | {record['M']} | {record['scheme']} | {times} |")
    if (RESULTS / PRECISION).exists():
        records = load(PRECISION)["records"]
        lines += ["", "### Accuracy", "", *gemm_accuracy(records), "", *layer_accuracy(records)]
    return "\n".join(lines)


def gemm_accuracy(records: list[dict[str, Any]]) -> list[str]:
    """The error of the grouped GEMM for each K."""
    found = {
        (record["K"], record["result"], record["fast_accumulation"]): record["err"]
        for record in records if record["kind"] == "gemm"
    }  # fmt: skip
    columns = [(result, fast) for fast in (False, True) for result in ("float32", "float16")]
    titles = [f"{result}, {'fast' if fast else 'float32'} accumulation" for result, fast in columns]
    lines = [
        "Relative Frobenius error of the grouped GEMM against float64, the largest of the algorithms that the library "
        "proposes. The layer uses float32 accumulation.",
        "", f"| K | {' | '.join(titles)} |", "| --: |" + " --: |" * len(titles),
    ]  # fmt: skip
    for k in dict.fromkeys(key[0] for key in found):
        errors = [found[(k, *column)] for column in columns]
        texts = ["not offered" if error is None else f"{error:.1e}" for error in errors]
        lines.append(f"| {k} | {' | '.join(texts)} |")
    return lines


def layer_accuracy(records: list[dict[str, Any]]) -> list[str]:
    """The errors of the layer over draws of few tokens, and those of the reference with noise on the same draws."""
    measured, simulated = ([r for r in records if r["kind"] == kind] for kind in ("layer", "simulated"))
    first = simulated[0]
    above = [fmean([record["above"] for record in of]) for of in (measured, simulated)]
    shares = [share for record in simulated for share in record["shares_above"]]
    limit = f"{first['limit']:g}"
    blame = (
        f" In those of noise, the largest single flip makes up {median(shares):.0%} of the squared deviation of what "
        f"GEMM 2 multiplies in the median, and {min(shares):.0%} at least."
    ) if shares else ""  # fmt: skip
    titles = ("routing", "a1_scale", "median", "max", f"above {limit}", "all draws")
    lines = [
        f"Relative Frobenius error of the layer, float32 out, over {first['draws']} draws of each cell; in brackets "
        f"that of the reference on the same draws with noise of {first['noise']:.1e} of a row's root mean square in "
        f"GEMM 1's product and no other deviation. {above[0]:.1%} of the draws exceed {limit}, with noise alone "
        f"{above[1]:.1%}.{blame} The last two columns are of the noise: flipped codes per draw, and how many codes "
        "there are.",
        "", f"| E, topk, K, N | M | scales per | {' | '.join(titles)} | flips | codes |",
        "| --- | --: | --- | --- | --- |" + " --: |" * 6,
    ]  # fmt: skip
    for ours, noisy in zip(measured, simulated, strict=True):
        errors = [f"{ours[name]:.1e} ({noisy[name]:.1e})" for name in ("median", "max", "above", "pooled")]
        errors[2] = f"{ours['above']:.1%} ({noisy['above']:.1%})"
        where = [", ".join(map(str, ours["shape"])), ours["M"], ours["scheme"], ours["routing"], ours["a1_scale"]]
        lines.append(f"| {' | '.join(map(str, [*where, *errors, round(noisy['flips'], 1), noisy['codes']]))} |")
    return lines


def main() -> int:
    """Replace both sections."""
    for name, text in (("README.md", section()), ("docs/performance.md", details())):
        old = (ROOT / name).read_text()
        begin, end = old.index(BEGIN) + len(BEGIN), old.index(END)
        (ROOT / name).write_text(f"{old[:begin]}\n\n{text}\n\n{old[end:]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
