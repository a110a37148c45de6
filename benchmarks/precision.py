# SPDX-License-Identifier: Apache-2.0
"""How exact the grouped GEMM and the whole layer are: ``python -m benchmarks.precision --out FILE.json``.

Records of three kinds, all errors relative Frobenius norms. "gemm": the product of codes against float64, for each K,
type of the result and mode of accumulation, over all algorithms that the heuristic proposes. "layer": the layer against
the reference over many draws of few tokens. "simulated": the reference against itself, on the same draws, where the
only deviation is noise in GEMM 1's product (see flips.py): how much of the layer's errors flipped codes account for.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import cupy
import numpy as np

from benchmarks import flips
from benchmarks.records import make_header, make_parser, save
from cupy_moe import Experts, backend, cublaslt, e4m3

INNER_SIZES = (128, 1024, 4096, 14336, 28672)
GROUPS, ROWS, COLUMNS = 2, 64, 256
DRAWS = 64


def gemm_operands(k: int) -> tuple[Any, Any, Any]:
    """Normally distributed codes (GROUPS, ROWS, k) and (GROUPS, COLUMNS, k), and their product in float64."""
    rng = np.random.default_rng(k)
    a, weights = (
        e4m3.encode(cupy.asarray(rng.standard_normal((GROUPS, rows, k), np.float32) * np.float32(flips.CODE_STD)))
        for rows in (ROWS, COLUMNS)
    )
    left, right = (e4m3.decode(codes).astype(np.float64) for codes in (a, weights))
    return a, weights, cupy.matmul(left, right.transpose(0, 2, 1))


def measure_gemm(
    context: cublaslt.Context, operands: tuple[Any, Any, Any], result: str, fast: bool
) -> dict[str, Any]:
    """One record of kind "gemm"."""
    a, weights, want = operands
    k = a.shape[2]
    counts = cupy.asarray(np.full(GROUPS, ROWS, np.int32))
    product = cupy.empty(want.shape, result)
    weight_table, row_table, result_table = (
        cupy.asarray(matrix.data.ptr + np.arange(GROUPS, dtype=np.int64) * matrix[0].nbytes)
        for matrix in (weights, a, product)
    )
    matmul = cublaslt.GroupedMatmul(context, GROUPS, COLUMNS, k, counts.data.ptr, result, fast_accumulation=fast)
    found = []
    for algorithm in matmul.algorithms(ROWS):
        product.fill(np.nan)
        workspace = cupy.cuda.Memory(max(algorithm.workspace_bytes, 1))
        call = matmul.launch(
            algorithm, weight_table.data.ptr, row_table.data.ptr, result_table.data.ptr, workspace.ptr
        )
        call(cupy.cuda.get_current_stream().ptr)
        off, norm = flips.distance(product.astype(np.float64) * matmul.unit, want)
        tile, option = matmul.configuration(algorithm)
        found.append({"tile": tile, "option": option, "err": off / norm})
    errors = [one["err"] for one in found]
    return {
        "kind": "gemm", "K": k, "result": result, "fast_accumulation": fast, "err": max(errors, default=None),
        "err_least": min(errors, default=None), "algorithms": found,
    }


def measure_cell(cell: flips.Cell, draws: int, noise: float) -> list[dict[str, Any]]:
    """The records of kind "layer" and "simulated" of one cell."""
    experts = Experts(**flips.make_layer(cell, cupy), out_dtype="float32")
    measured, simulated, flipped = [], [], []
    codes = 0
    for draw, steps, exact, noisy in flips.simulate(cell, draws, cupy, noise):
        got = experts(draw.hidden_states, draw.topk_weights, draw.topk_ids, a1_scale=draw.a1_scale)
        measured.append(flips.distance(got, exact.result))
        simulated.append(flips.distance(noisy.result, exact.result))
        flipped.append(steps.flips(exact, noisy))
        codes = len(steps.distinct_rows()[0]) * exact.codes.shape[1]
    common = {**asdict(cell), "draws": draws, "limit": flips.LIMIT}
    layer = {"kind": "layer", **common, "backend": experts.backend, **flips.statistics(measured)}
    of_codes = {"noise": noise, "codes": codes, **flips.flip_statistics(flipped, simulated)}
    return [layer, {"kind": "simulated", **common, **flips.statistics(simulated), **of_codes}]


def describe(record: dict[str, Any]) -> str:
    """One line of the table."""
    if record["kind"] == "gemm":
        err = "no algorithm" if record["err"] is None else f"{record['err_least']:.2e} to {record['err']:.2e}"
        mode = "on" if record["fast_accumulation"] else "off"
        return f"gemm       K {record['K']:<6} {record['result']} fast accumulation {mode:<3} {err}"
    where = f"{record['shape']} M {record['M']} {record['scheme']} {record['routing']} a1 {record['a1_scale']}"
    numbers = " ".join(f"{name} {record[name]:.1e}" for name in ("median", "p90", "max", "pooled"))
    flipped = ""
    if record["kind"] == "simulated":
        shares = "".join(f" {share:.2f}" for share in record["shares_above"])
        flipped = f" flips {record['flips']:.1f} of {record['codes']}" + (f" largest{shares}" if shares else "")
    return f"{record['kind']:<10} {where:<58} {numbers} above {record['above']:.3f}{flipped}"


def main() -> int:
    """Run everything."""
    parser = make_parser("benchmarks.precision", __doc__)
    parser.add_argument("--noise", type=float, default=flips.NOISE, help="of the simulation, relative to a row's rms")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each cell")
    options = parser.parse_args()
    header = make_header("benchmarks.precision", sys.argv[1:], out=options.out, commit=options.commit)
    began = time.perf_counter()
    context = backend.cublaslt_context(0)
    header["versions"]["cublasLt"] = ".".join(map(str, context.found.version or ()))
    records: list[dict[str, Any]] = []

    def keep(new: list[dict[str, Any]]) -> None:
        records.extend(new)
        for record in new:
            print(describe(record), flush=True)
        save(options.out, header, records)

    for k in INNER_SIZES:
        operands = gemm_operands(k)
        for result in ("float16", "float32"):
            keep([measure_gemm(context, operands, result, fast) for fast in (False, True)])
    for cell in flips.CELLS:
        keep(measure_cell(cell, options.draws, options.noise))
    print(f"{len(records)} records, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
