# SPDX-License-Identifier: Apache-2.0
"""Times every algorithm that cuBLASLt's heuristic proposes for the grouped GEMMs of the benchmark's layers.

``python -m benchmarks.algorithms --out FILE.json`` writes ``header`` and, for each GEMM (experts, n, k) and number of
tokens M, the algorithms by tile and custom option with their best time in microseconds. It prints, for ranges of rows
per expert, which of them lose least against the best of each case: what `cupy_moe.grouped_gemm.PREFERRED` is made from.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import cupy
import numpy as np

from benchmarks import cases
from benchmarks.records import make_header, make_parser, save
from cupy_moe import backend, cublaslt
from cupy_moe.grouped_gemm import TUNING_AVERAGES

TOKENS = (*cases.TOKENS, 2048, 8192)


def random_codes(size: int) -> Any:
    """Finite e4m3 codes: a random stretch, repeated."""
    stretch = cupy.asarray(np.random.default_rng(0).integers(0, 120, min(size, 1 << 26), np.uint8))
    return cupy.resize(stretch, size)


def counts_of(shape: cases.Shape, tokens: int, random: np.random.Generator) -> np.ndarray:
    """Rows per expert of uniform routing."""
    experts, topk, *_ = shape
    chosen = np.argsort(random.random((tokens, experts)), axis=1)[:, :topk]
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)


def best_us(call: Any, calls: int, rounds: int = 3) -> float:
    """Least mean time of ``calls`` calls in a row."""
    stream = cupy.cuda.get_current_stream()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    call(stream.ptr)
    times = []
    for _ in range(rounds):
        start.record()
        for _ in range(calls):
            call(stream.ptr)
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / calls * 1e3)
    return min(times)


def time_gemm(context: cublaslt.Context, shape: cases.Shape, n: int, k: int) -> list[dict[str, Any]]:
    """One record per number of tokens."""
    experts, topk, *_ = shape
    random = np.random.default_rng(1)
    weights, rows_most = random_codes(experts * n * k), max(TOKENS) * topk
    a, product = random_codes(rows_most * k), cupy.empty((rows_most, n), np.float16)
    weight_table = cupy.asarray(weights.data.ptr + np.arange(experts, dtype=np.int64) * (n * k))
    counts, tables = cupy.zeros(experts, np.int32), cupy.zeros((2, experts), np.int64)
    matmul = cublaslt.GroupedMatmul(context, experts, n, k, counts.data.ptr)
    records = []
    for tokens in TOKENS:
        host = counts_of(shape, tokens, random)
        first = np.concatenate([[0], np.cumsum(host)[:-1]]).astype(np.int64)
        counts.set(host)
        tables.set(np.stack([a.data.ptr + first * k, product.data.ptr + first * n * product.itemsize]))
        times: dict[tuple[int, int], float] = {}
        for average in TUNING_AVERAGES:
            for algorithm in matmul.algorithms(average):
                configuration = matmul.configuration(algorithm)
                if configuration in times:
                    continue
                workspace = cupy.cuda.Memory(max(algorithm.workspace_bytes, 1))
                call = matmul.launch(
                    algorithm, weight_table.data.ptr, tables[0].data.ptr, tables[1].data.ptr, workspace.ptr
                )
                times[configuration] = best_us(call, 8 if tokens <= 512 else 2)
        ranked = sorted(times.items(), key=lambda item: item[1])
        records.append({
            "gemm": [experts, n, k], "M": tokens, "rows_per_expert": tokens * topk / experts,
            "algorithms": [{"tile": tile, "option": option, "us": us} for (tile, option), us in ranked],
        })
    return records


def print_ranking(records: list[dict[str, Any]]) -> None:
    """For each power of two of rows per expert, the configurations closest to the best of each case."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(round(math.log2(max(record["rows_per_expert"], 1))), []).append(record)
    for power, group in sorted(groups.items()):
        losses: dict[tuple[int, int], list[float]] = {}
        for record in group:
            for one in record["algorithms"]:
                loss = math.log(one["us"] / record["algorithms"][0]["us"])
                losses.setdefault((one["tile"], one["option"]), []).append(loss)
        everywhere = {key: sum(of) / len(of) for key, of in losses.items() if len(of) == len(group)}
        best = sorted(everywhere.items(), key=lambda item: item[1])[:4]
        text = "  ".join(f"tile {tile} option {option}: {math.exp(loss):.3f}" for (tile, option), loss in best)
        print(f"about {1 << power:5d} rows per expert ({len(group)} cases): {text}")


def main() -> int:
    """Run the survey."""
    options = make_parser("benchmarks.algorithms", __doc__).parse_args()
    header = make_header("benchmarks.algorithms", sys.argv[1:], out=options.out, commit=options.commit)
    context = backend.cublaslt_context(0)
    header["versions"]["cublasLt"] = ".".join(map(str, context.found.version or ()))
    records: list[dict[str, Any]] = []
    for shape in cases.SHAPES:
        _, _, hidden, intermediate = shape
        for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
            records += time_gemm(context, shape, n, k)
            cupy.get_default_memory_pool().free_all_blocks()
        save(options.out, header, records)
    print_ranking(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
