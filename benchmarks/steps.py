# SPDX-License-Identifier: Apache-2.0
"""The layer's own kernels one by one, checked, then timed: ``python -m benchmarks.steps --out FILE.json``.

The launches are those of a call of the layer, on data of their own: ``scheme`` is where the scales come from, "tensor",
"token" or "static", or "none". Each step is checked as a whole; then each of its kernels is timed by itself, on what
the ones in front of it have left. The bytes are those that this kernel has to move at least: each input read once, each
output written once. ``floor_us`` is the time of these bytes at the device's read and write rates; ``of_copy`` is their
rate over that of a large copy. A kernel that moves more than 16 MB is compared with a copy of its own size too,
``copy_bytes_s``: one that reads and writes as many bytes together (to two digits), launched and timed as the kernel is.

A timing replays a CUDA graph with the kernel on one set of arrays after the other. The sets of a large step are at
least four times the L2 cache: ``l2`` is "cold". Those of a small one fit into a quarter of it: "warm". ``overlap``: as
in a call, a kernel may start while the one in front, that of the set before, still runs. The sets share nothing that is
written, so that nothing is read too early. Kernels that no call launches start when the one in front is done, as those
of their step functions do.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

from benchmarks import cases, timing
from benchmarks.expected import relative_error
from benchmarks.records import make_header, make_parser, save
from benchmarks.step_cases import STEPS, Case, Step
from cupy_moe.driver import Kernel, Launch

SHAPES, TOKENS = (cases.SHAPES[0], cases.SHAPES[2]), (64, 1024, 8192)
MOST_SETS = 32
NO_PART_OF_A_CALL = ("topk_softmax", "shuffle_rows", "gather_scales")
COMPARED_BYTES = 16_000_000
"""A kernel that moves more is compared with a copy of its own size."""
COPY_THREADS, COPY_WORDS = 256, (1, 2, 4)
"""Threads of a block of that copy, and the 16-byte words of each: the fastest counts."""
ERROR_LIMIT = 1e-2
"""Relative Frobenius error; single codes may differ from those of torch's arithmetic."""
EXACT = ("route", "shuffle_rows", "gather_scales")
Build = Callable[[Case, str], Step]


def sets_of(nbytes: int, l2: int) -> tuple[int, str]:
    """How many sets of arrays of a step to use in turn, and the state of the L2 cache that they make."""
    cold = max(2, -(-4 * l2 // nbytes))
    return (cold, "cold") if cold <= MOST_SETS else (max(2, min(MOST_SETS, l2 // 4 // nbytes)), "warm")


def time_in_turn(launches: Sequence[Launch]) -> timing.Timing:
    """One of these launches, which follow one another in a CUDA graph."""

    def call() -> None:
        for launch in launches:
            launch(torch.cuda.current_stream().cuda_stream)

    graph, _ = timing.capture(call)
    replays = timing.fitting_replays(graph.replay)
    return timing.time_warm(graph.replay, hold=True, replays=replays).per(len(launches))


def two_digits(nbytes: int) -> int:
    """``nbytes``, rounded: the size of the copy to compare with."""
    return int(float(f"{nbytes:.1e}"))


@cache
def copy_kernel() -> Kernel:
    """The copy of the memory rates, to be launched as the steps are."""
    import cupy

    function = cupy.RawKernel(timing.RATE_SOURCE, "copy_all")
    parameters = {"data": ctypes.c_void_p, "count": ctypes.c_uint64, "out": ctypes.c_void_p}
    return Kernel(function, parameters, can_overlap=torch.cuda.get_device_capability() >= (9, 0))


@cache
def copy_rate(nbytes: int, overlap: bool) -> float:
    """Bytes/s of a copy that reads and writes ``nbytes`` together, on one pair of arrays after the other."""
    words = nbytes // 32
    pairs = [torch.empty((2, words, 2), dtype=torch.int64, device="cuda").random_()
             for _ in range(sets_of(nbytes, timing.l2_bytes())[0])]
    fastest = min(time_in_turn([_copy(pair, per_thread, overlap) for pair in pairs]).us for per_thread in COPY_WORDS)
    return 2 * pairs[0][0].nbytes / (fastest * 1e-6)


def _copy(pair: torch.Tensor, words_per_thread: int, overlap: bool) -> Launch:
    source, target = pair
    words = source.nbytes // 16
    launch = Launch(
        copy_kernel(), (-(-words // (COPY_THREADS * words_per_thread)), 1), COPY_THREADS,
        data=source.data_ptr(), count=words, out=target.data_ptr(),
    )
    return launch.overlapping() if overlap else launch


def measure(build: Build, case: Case, scheme: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Check a step and time its kernels, each by itself."""
    overlap = build.__name__ not in NO_PART_OF_A_CALL

    def prepared() -> Step:
        step = build(case, scheme)
        if overlap:
            for launch in step.launches:
                launch.overlapping()
        torch.cuda.synchronize()  # what a launch reads before it waits is there
        return step

    first = prepared()
    first()
    torch.cuda.synchronize()
    error = relative_error(first.got(), first.want())
    torch.cuda.empty_cache()
    most = max(sets_of(sum(first.nbytes(i)), timing.l2_bytes())[0] for i in range(len(first.launches)))
    sets = [first, *(prepared() for _ in range(most - 1))]
    records = []
    for i, launch in enumerate(first.launches):
        read, written = first.nbytes(i)
        count, l2 = sets_of(read + written, timing.l2_bytes())
        for step in sets:
            step()  # a kernel timed before may have left something else for this one
        timed = time_in_turn([step.launches[i] for step in sets[:count]])
        moved = read + written
        moved_s = moved / (timed.us * 1e-6)
        alike = {"copy_bytes_s": copy_rate(two_digits(moved), overlap)} if moved > COMPARED_BYTES else {}
        records.append({
            "step": build.__name__, "kernel": launch.kernel.name, "scheme": scheme, "mode": "graph", "overlap": overlap,
            "l2": l2, **asdict(timed),
            "floor_us": 1e6 * (read / rates["read_bytes_s"] + written / rates["write_bytes_s"]), "err": error,
            "bytes_read": read, "bytes_written": written, "bytes_s": moved_s,
            "of_copy": moved_s / rates["copy_bytes_s"], **alike,
        })
    return records


def main() -> int:
    """Run all steps; the exit status is 1 if one failed its check."""
    options = make_parser("benchmarks.steps", __doc__).parse_args()
    header = make_header("benchmarks.steps", sys.argv[1:], out=options.out, commit=options.commit)
    records: list[dict[str, Any]] = []
    failed = False
    for shape in SHAPES:
        for tokens in TOKENS:
            case = Case(shape, tokens)
            common = {
                "device": header["device"], "impl": "cupy_moe", "backend": "kernels_cu", "shape": list(shape),
                "M": tokens, "routing": "uniform",
            }
            for build, schemes in STEPS:
                for scheme in schemes:
                    for record in measure(build, case, scheme, header["rates"]):
                        records.append(common | record)
                        right = record["err"] <= (0 if build.__name__ in EXACT else ERROR_LIMIT)
                        failed |= not right
                        print(
                            f"{shape} M {tokens:5} {build.__name__:12} {record['kernel']:19} {scheme:6} {record['l2']} "
                            f"{record['us']:8.2f} us {record['bytes_s'] / 1e9:7.0f} GB/s {record['of_copy']:5.2f} of a "
                            f"copy, error {record['err']:.1e}{'' if right else ' IS TOO LARGE'}", flush=True,
                        )
                    torch.cuda.empty_cache()
    save(options.out, header, records)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
