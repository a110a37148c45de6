# SPDX-License-Identifier: Apache-2.0
"""What the report says of accuracy, from the results of `benchmarks.precision`."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any


def section(records: list[dict[str, Any]], device: str) -> list[str]:
    """Both tables."""
    return ["## Accuracy", "", f"{device}.", "", *gemm_accuracy(records), "", *layer_accuracy(records)]


def gemm_accuracy(records: list[dict[str, Any]]) -> list[str]:
    """The error of the grouped GEMM for each K."""
    found = {
        (record["K"], record["result"], record["fast_accumulation"]): record["err"]
        for record in records if record["kind"] == "gemm"
    }
    columns = [(result, fast) for fast in (False, True) for result in ("float32", "float16")]
    titles = [f"{result}, {'fast' if fast else 'float32'} accumulation" for result, fast in columns]
    lines = [
        "Relative Frobenius error of the grouped GEMM against float64, the largest of the algorithms that the library "
        "proposes. The backend `cublaslt` uses float32 accumulation.",
        "", f"| K | {' | '.join(titles)} |", "| --: |" + " --: |" * len(titles),
    ]
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
    ) if shares else ""
    titles = ("routing", "a1_scale", "median", "max", f"above {limit}", "all draws")
    lines = [
        f"Relative Frobenius error of the layer with `cublaslt`, float32 out, over {first['draws']} draws of each "
        f"cell; in brackets that of the reference on the same draws with noise of {first['noise']:.1e} of a row's root "
        "mean square in GEMM 1's product and no other deviation. "
        f"{above[0]:.1%} of the draws exceed {limit}, with noise alone {above[1]:.1%}.{blame} The last two columns are "
        "of the noise: flipped codes per draw, and how many codes there are.",
        "", f"| E, topk, K, N | M | scales per | {' | '.join(titles)} | flips | codes |",
        "| --- | --: | --- | --- | --- |" + " --: |" * 6,
    ]
    for ours, noisy in zip(measured, simulated, strict=True):
        errors = [f"{ours[name]:.1e} ({noisy[name]:.1e})" for name in ("median", "max", "above", "pooled")]
        errors[2] = f"{ours['above']:.1%} ({noisy['above']:.1%})"
        where = [", ".join(map(str, ours["shape"])), ours["M"], ours["scheme"], ours["routing"], ours["a1_scale"]]
        lines.append(f"| {' | '.join(map(str, [*where, *errors, round(noisy['flips'], 1), noisy['codes']]))} |")
    return lines
