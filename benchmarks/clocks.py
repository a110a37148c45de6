# SPDX-License-Identifier: Apache-2.0
"""At what clock the GEMMs run, and what each kernel reads and writes of the device's memory.

``python -m benchmarks.clocks --out FILE.json`` starts itself again under Nsight Compute (``ncu``, a part of the CUDA
toolkit), which counts nanoseconds, cycles and bytes of each kernel, and touches neither clock nor caches: of calls of
the backend `sm90` (scales per tensor, uniform routing), whose results are checked first, and of the dense product that
the floor is made with. Each kernel has the device for itself and a pause in front. So what is below the highest clock
is what that one kernel costs.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

import cupy_moe
from benchmarks import cases, timeline, timing
from benchmarks.records import make_header, make_parser, save
from benchmarks.table import ERROR_LIMITS, Check, parse_cells
from cupy_moe import pipeline

CELLS: cases.Cells = {shape: [64, 512, 4096, 16384] for shape in cases.SHAPES}
REPEATS = 5
METRICS = "gpu__time_duration.sum", "sm__cycles_elapsed.avg.per_second", "dram__bytes_read.sum", "dram__bytes_write.sum"
OPTIONS = (
    "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv", "--page", "raw",
    "--print-units", "base", "--metrics", ",".join(METRICS),
)
FLOP_PER_CYCLE = 8192
"""Of a multiprocessor of compute capability 9.0, fp8 without sparsity: 1979 TFLOP/s are 132 of them at 1830 MHz."""

class Kernel(NamedTuple):
    """One that ran."""

    name: str
    us: float
    mhz: float
    read_bytes: float  # of the device's memory, beyond the L2 cache
    written_bytes: float


@contextmanager
def counted() -> Iterator[None]:
    """What is launched in here, Nsight Compute counts."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def repeat(call: Callable[[], object]) -> None:
    """Three calls, and then those that are counted."""
    for _ in range(3):
        call()
    with counted():
        for _ in range(REPEATS):
            call()


def run_cells(cells: cases.Cells, out: Path) -> None:
    """The dense product, then the calls; what is known of each cell goes to ``out``."""
    pipeline.CALLS_BEFORE_REPLAY = sys.maxsize  # kernels of a graph are not told apart
    pipeline.OVERLAP = False
    repeat(timing.dense_product()[0])
    known = []
    for shape, tokens in cells.items():
        w = cases.make_weights(shape)
        experts = cupy_moe.Experts(w.w1, w.w2, w1_scale=w.w1_scale, w2_scale=w.w2_scale, backend="sm90")
        for M in tokens:
            x = cases.make_inputs(shape, M, weights=w)
            call = partial(experts, x.hidden_states, x.topk_weights, x.topk_ids)
            error, _ = Check(x)(call())
            active = cases.active_experts(x.topk_ids)
            known.append({"shape": list(shape), "M": M, "routing": x.routing, "active": active, "err": error})
            repeat(call)
        out.write_text(json.dumps(known))


def read_kernels(text: str) -> list[Kernel]:
    """Those of Nsight Compute's table, whose second line has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:  # most often the driver keeps its counters to administrators
        raise RuntimeError(f"Nsight Compute counted nothing:\n{text}")
    _, *rows = csv.DictReader(lines)
    kernels = []
    for row in rows:
        ns, hz, *moved = (float(row[metric].replace(",", "")) for metric in METRICS)
        kernels.append(Kernel(row["Kernel Name"], ns / 1e3, hz / 1e6, *moved))
    return kernels


def count(arguments: list[str]) -> tuple[list[dict[str, Any]], list[Kernel]]:
    """What `run_cells` knows of each cell, and the kernels, in the order in which they ran."""
    with TemporaryDirectory() as folder:
        log, known = Path(folder) / "log", Path(folder) / "known"
        program = [sys.executable, "-m", "benchmarks.clocks", *arguments, "--counted", str(known)]
        subprocess.run(["ncu", *OPTIONS, "--log-file", str(log), *program], check=True)
        return json.loads(known.read_text()), read_kernels(log.read_text())


def calls_of(kernels: list[Kernel]) -> list[list[Kernel]]:
    """Those of each call, the last of which is `combine`."""
    calls: list[list[Kernel]] = [[]]
    for kernel in kernels:
        calls[-1].append(kernel)
        if kernel.name.startswith("combine"):
            calls.append([])
    assert not calls[-1], f"kernels behind the last call: {calls[-1]}"
    return calls[:-1]


def rates_of(kernels: list[Kernel], operations: float, processors: int) -> dict[str, float]:
    """Time, clock and rate, and what the tensor cores do at that clock over what they could."""
    us, mhz = median(kernel.us for kernel in kernels), median(kernel.mhz for kernel in kernels)
    rate = operations / (us * 1e-6)
    return {"us": us, "sm_mhz": mhz, "flop_s": rate, "tensor_busy": rate / (processors * FLOP_PER_CYCLE * mhz * 1e6)}


def record_of(
    cell: dict[str, Any], calls: list[list[Kernel]], rates: dict[str, float], processors: int
) -> dict[str, Any]:
    """That of a cell; ``us`` is the sum of all kernels of a call, without the gaps between them."""
    (_, topk, k, n), M = cell["shape"], cell["M"]
    gemms = [[kernel for kernel in call if kernel.name.startswith("grouped_gemm")] for call in calls]
    first, second = (list(of) for of in zip(*gemms, strict=True))
    operations = 2.0 * M * topk * k * n  # of GEMM 2; GEMM 1 has twice as many columns of weights
    sums = timeline.summed_up([timeline.parts_of([(kernel.name, kernel.us) for kernel in call]) for call in calls])
    traffic = [
        {"kernel": each[0].name, **{of: median(getattr(kernel, of) for kernel in each) for of in Kernel._fields[3:]}}
        for each in zip(*calls, strict=True)
    ]
    return {
        "impl": "cupy_moe", "backend": "sm90", "scheme": "tensor", "mode": "eager", "l2": "warm", **cell,
        "floor_us": cases.floor_us(cell["shape"], M, cell["active"], rates["read_bytes_s"], rates["fp8_flop_s"]),
        **sums, "gemm1": rates_of(first, 2 * operations, processors), "gemm2": rates_of(second, operations, processors),
        "traffic": traffic,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run all cells; the exit status is 1 if a result was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser("benchmarks.clocks", __doc__)
    parser.add_argument("--cells", type=parse_cells, default=CELLS, help=parse_cells.__doc__)
    parser.add_argument("--counted", type=Path, metavar="FILE", help="what Nsight Compute is to start")
    options = parser.parse_args(arguments)
    if options.counted:
        run_cells(options.cells, options.counted)
        return 0
    if not shutil.which("ncu"):
        parser.error("ncu is not in PATH: install Nsight Compute, which comes with the CUDA toolkit")
    header = make_header("benchmarks.clocks", arguments, out=options.out, commit=options.commit)
    known, kernels = count(arguments)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    dense, calls = kernels[:REPEATS], calls_of(kernels[REPEATS:])
    assert len({kernel.name for kernel in dense}) == 1, f"the dense product is not one kernel: {dense}"
    assert len(calls) == REPEATS * len(known), f"{len(calls)} calls in {len(known)} cells"
    header["dense"] = rates_of(dense, timing.DENSE_OPERATIONS, processors)
    records = []
    for i, cell in enumerate(known):
        record = record_of(cell, calls[i * REPEATS : (i + 1) * REPEATS], header["rates"], processors)
        records.append({"device": header["device"], **record})
        print(*cell["shape"], "M", cell["M"], record["gemm1"], record["gemm2"], flush=True)
    print("dense", header["dense"])
    save(options.out, header, records)
    return int(any(not record["err"] <= ERROR_LIMITS["cupy_moe"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
