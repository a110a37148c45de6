# SPDX-License-Identifier: Apache-2.0
"""Timing on the GPU by events: CUDA graph replays or eager calls, with the L2 cache warm or cold.

``us`` is the median over 7 rounds, ``us_min`` and ``us_max`` the fastest and slowest round; a round is the
mean of 25 calls, or of fewer where those would take long (`fitting_replays`). Warm: the calls of a round follow
one another between two events, so a layer smaller than the L2 stays in it. Cold: before each call a buffer larger
than the L2 is read, and each call lies between its own two events; nothing is subtracted.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from cupy_moe import arrays

Result = TypeVar("Result")

ROUNDS = 7
REPLAYS = 25
REST = 2.0
"""Of the device between rounds in turns, in units of what a round takes."""
BUDGET_US = 50_000
"""What the rounds of one timing should take together; each has one call at least."""
# Occupies the GPU (about half a millisecond) while the host queues a round, so that a short graph does not
# wait for the next launch. Only for graphs: an eager call's wait for the host is part of its time.
HOLD_CYCLES = 1_000_000

RATE_SOURCE = r"""
using u64 = unsigned long long;

// Calls use(index, value) for every 16 bytes; each thread has up to eight loads in flight.
template <typename Use> __device__ void for_each(const uint4* data, u64 count, Use use)
{
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 8 * step) {
        uint4 v[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j) if (i + j * step < count) v[j] = data[i + j * step];
        #pragma unroll
        for (int j = 0; j < 8; ++j) if (i + j * step < count) use(i + j * step, v[j]);
    }
}

extern "C" __global__ void __launch_bounds__(1024) read_all(const uint4* data, u64 count, unsigned* out)
{
    unsigned mixed = 0;
    for_each(data, count, [&](u64, uint4 v) { mixed ^= v.x ^ v.y ^ v.z ^ v.w; });
    if (mixed == 0x9e3779b9u) *out = mixed;  // only keeps the loads alive
}

// May be launched while the kernel in front still runs, as those of the layer are.
extern "C" __global__ void __launch_bounds__(1024) copy_all(const uint4* data, u64 count, uint4* out)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
    for_each(data, count, [&](u64 i, uint4 v) { out[i] = v; });
}
"""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, fastest and slowest round."""

    us: float
    us_min: float
    us_max: float

    def per(self, count: int) -> Timing:
        """That of one of ``count`` equal parts."""
        return Timing(self.us / count, self.us_min / count, self.us_max / count)


def _summary(rounds: list[float]) -> Timing:
    return Timing(statistics.median(rounds), min(rounds), max(rounds))


def capture(call: Callable[[], Result], warmup: int = 3) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of one ``call`` after ``warmup`` calls on a side stream, replayed once; and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def time_warm(
    call: Callable[[], object], *, hold: bool, rounds: int = ROUNDS, replays: int = REPLAYS
) -> Timing:
    """Calls one after another; ``hold`` keeps the GPU busy until the round is queued (for graph replays)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        if hold:
            torch.cuda._sleep(HOLD_CYCLES)
        start.record()
        for _ in range(replays):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / replays)
    return _summary(times)


def time_in_turns(calls: Sequence[Callable[[], object]], *, replays: int = REPLAYS) -> list[Timing]:
    """Graph replays of each call, a round of one after a round of another: a change of clocks meets all of them.

    The device rests in between. Else it would come to its power limit, where all calls run at the low clock that they
    bring about together, and those that take less energy than others have nothing of it.
    """

    def round_of(call: Callable[[], object]) -> float:
        us = time_warm(call, hold=True, rounds=1, replays=replays).us
        time.sleep(REST * replays * us / 1e6)
        return us

    rounds = [[round_of(call) for call in calls] for _ in range(ROUNDS)]
    return [_summary(list(times)) for times in zip(*rounds, strict=True)]


def fitting_replays(call: Callable[[], object]) -> int:
    """Calls per round, `REPLAYS` or as many as stay within `BUDGET_US` but one at least."""
    us = time_warm(call, hold=True, rounds=1, replays=1).us
    return max(1, min(REPLAYS, int(BUDGET_US / ROUNDS / us)))


def l2_bytes() -> int:
    """Size of the L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


class L2Flush:
    """Reads a buffer of four times the L2: reading leaves no dirty lines for the timed call to write back."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(l2_bytes(), dtype=torch.float32, device="cuda")  # 4 bytes each
        self._out = torch.empty((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._out)


def time_cold(
    call: Callable[[], object], flush: L2Flush, *, hold: bool, rounds: int = ROUNDS, replays: int = REPLAYS
) -> Timing:
    """Each call after a flush of the L2, between its own events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        if hold:
            torch.cuda._sleep(HOLD_CYCLES)
        for start, end in events:
            flush()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times.append(statistics.fmean(start.elapsed_time(end) for start, end in events) * 1e3)
    return _summary(times)


def host_us(
    call: Callable[[], object], calls: int = 10, least_rounds: int = 20, seconds: float = 0.1
) -> float:
    """Host time of one eager call in microseconds: wall time of ``calls`` calls that wait for nothing.

    The best of ``least_rounds`` or as many more as fit into ``seconds``, since other processes disturb it. ``calls`` is
    small enough that the driver's queue of launches (about a thousand) does not fill up.
    """
    best, end = float("inf"), time.perf_counter() + seconds
    for rounds in itertools.count():
        if rounds >= least_rounds and time.perf_counter() >= end:
            break
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) * 1e6 / calls)
    torch.cuda.synchronize()
    return best


def measure_memory_rates(size: int = 1 << 32) -> dict[str, float]:
    """Rates of device memory in bytes/s, each the best of several launches.

    ``size`` bytes are read and written, and one half of them copied to the other, which counts both. Torch's own
    operations run too, in case they are faster.
    """
    data = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    source, target = data.chunk(2)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    as_float = data.view(torch.float32)
    calls: dict[str, list[Callable[[], object]]] = {
        "read_bytes_s": [*_in_several_grids("read_all", data, out), as_float.sum],
        "copy_bytes_s": [*_in_several_grids("copy_all", source, target), lambda: target.copy_(source)],
        "write_bytes_s": [data.zero_, lambda: data.fill_(1)],
    }
    return {name: size / (min(map(_best_us, of)) * 1e-6) for name, of in calls.items()}


def _best_us(call: Callable[[], object]) -> float:
    call()
    return time_warm(call, hold=True, rounds=3, replays=3).us_min


def _in_several_grids(name: str, data: torch.Tensor, out: torch.Tensor) -> list[Callable[[], object]]:
    """Launches of a kernel of `RATE_SOURCE` over all of ``data``."""
    import cupy

    kernel = cupy.RawKernel(RATE_SOURCE, name)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    stream = arrays.cupy_stream(torch.cuda.current_stream().cuda_stream)
    pointers = (cupy.uint64(data.data_ptr()), cupy.uint64(data.nbytes // 16), cupy.uint64(out.data_ptr()))

    def launch(threads: int, blocks: int) -> None:
        with stream:
            kernel((processors * blocks,), (threads,), pointers)

    return [partial(launch, *grid) for grid in ((256, 8), (512, 4), (1024, 2), (512, 16))]


DENSE_SIZE = 8192
DENSE_OPERATIONS = 2.0 * DENSE_SIZE**3


def dense_product() -> tuple[Callable[[], object], float]:
    """``torch._scaled_mm`` of 8192^3, fast accumulation, and how many operations that is."""
    a, b = (torch.randn((DENSE_SIZE, DENSE_SIZE), device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> None:
        torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return multiply, DENSE_OPERATIONS


def measure_fp8_rate() -> float:
    """Dense fp8 rate in FLOP/s: that of `dense_product`, best of 7 rounds."""
    multiply, operations = dense_product()
    for _ in range(3):
        multiply()
    return operations / (time_warm(multiply, hold=True, replays=10).us_min * 1e-6)


def query(*command: str) -> str:
    """What ``command`` prints, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def clocks() -> dict[str, str]:
    """Driver, clocks, power limit and temperature as ``nvidia-smi`` finds them now; ends the program without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU that torch can use: it finds no CUDA device, or is a build for CPUs")
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    found = query("nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader")
    return dict(zip(fields.split(","), found.split(", "), strict=False))


def cublaslt_versions() -> list[int]:
    """Version numbers of every cuBLASLt copy loaded in this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = set()
    for path in {line.split(maxsplit=5)[5] for line in lines if "libcublasLt.so" in line}:
        try:
            version = ctypes.CDLL(path).cublasLtGetVersion
        except OSError:  # the file has gone since it was loaded
            continue
        version.restype = ctypes.c_size_t
        found.add(int(version()))
    return sorted(found)
