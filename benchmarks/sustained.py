# SPDX-License-Identifier: Apache-2.0
"""What a call takes while the device is kept busy: ``python -m benchmarks.sustained --vllm-ops DIR --out FILE.json``.

The other measurements last for milliseconds, in which a device may draw more power than it can for long. Here a CUDA
graph of one call, checked first, is replayed for longer, and so is the dense product that the floor is made with,
before and after all cells. Clock, power and what holds the clock down are those that NVML reads meanwhile
(nvidia-ml-py, which the extra ``bench`` brings).
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import torch

from benchmarks import cases, timing
from benchmarks.peers import PeerUnavailable
from benchmarks.records import make_header, make_parser, save
from benchmarks.table import BINDERS, ERROR_LIMITS, IMPLEMENTATIONS, PEER_BACKENDS, Bound, Check, parse_cells

CELLS: cases.Cells = {shape: [64, 1024, 4096, 16384] for shape in cases.SHAPES}
SECONDS, ROUNDS = 1.2, 4
"""That a call is repeated for and timed, in so many rounds, after one round that is not."""
READ_EVERY = 0.01
"""Seconds between two readings of the clock."""


class Meter:
    """Reads the current device's clock while it is entered; then `found` says what it read."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        self.limit_watts = pynvml.nvmlDeviceGetPowerManagementLimit(self._device) / 1e3

    def __enter__(self) -> Meter:
        self._clocks: list[int] = []
        self._capped: list[bool] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._began, self._joules = time.perf_counter(), self._energy()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        joules, ended = self._energy(), time.perf_counter()
        self._stop.set()
        self._thread.join()
        self._watts = (joules - self._joules) / (ended - self._began)

    def found(self) -> dict[str, float]:
        """Clock of the multiprocessors (median), mean power, and the share of the readings that found a power limit."""
        return {"sm_mhz": median(self._clocks), "watts": self._watts, "power_capped": fmean(self._capped)}

    def _energy(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3

    def _read(self) -> None:
        nvml = self._nvml
        power = nvml.nvmlClocksEventReasonSwPowerCap | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        while True:
            self._clocks.append(nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM))
            self._capped.append(bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device) & power))
            if self._stop.wait(READ_EVERY):
                return


def keep_busy(call: Callable[[], object], meter: Meter) -> dict[str, float]:
    """The timing of one ``call`` among many, and what the meter found meanwhile."""
    us = timing.time_warm(call, hold=True, rounds=1, replays=3).us
    replays = math.ceil(SECONDS * 1e6 / us / ROUNDS)
    timing.time_warm(call, hold=False, rounds=1, replays=replays)
    with meter:
        timed = timing.time_warm(call, hold=False, rounds=ROUNDS, replays=replays)
    return {**asdict(timed), **meter.found()}


def dense_rate(meter: Meter) -> dict[str, float]:
    """`timing.measure_fp8_rate` of a device that is kept busy."""
    call, operations = timing.dense_product()
    found = keep_busy(call, meter)
    return {"fp8_flop_s": operations / (found["us"] * 1e-6), **found}


def measure(
    header: dict[str, Any], meter: Meter, shape: cases.Shape, inputs: cases.Inputs, impl: str, bound: Bound,
    check: Check,
) -> dict[str, Any]:
    """The record of one implementation in one cell; ValueError if its result is wrong."""
    graph, result = timing.capture(bound.call)
    error, _ = check(bound.output(result))
    if not error <= ERROR_LIMITS[impl]:
        raise ValueError(f"relative error {error:.2e} is above {ERROR_LIMITS[impl]:.0e}")
    M, active, rates = len(inputs.topk_ids), cases.active_experts(inputs.topk_ids), header["rates"]
    return {
        "device": header["device"], "impl": impl, "backend": bound.backend(), "shape": list(shape), "M": M,
        "scheme": inputs.weights.scheme, "routing": inputs.routing, "mode": "graph", "l2": "warm", "err": error,
        "floor_us": cases.floor_us(shape, M, active, rates["read_bytes_s"], rates["fp8_flop_s"]),
        **keep_busy(graph.replay, meter),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run all cells; the exit status is 1 if a result was wrong."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    header = make_header(
        "benchmarks.sustained", options.arguments, out=options.out, commit=options.commit,
        vllm_ops=options.vllm_ops, vllm_version=options.vllm_version,
    )
    meter = Meter()
    header |= {"power_limit_watts": meter.limit_watts, "seconds": SECONDS, "dense": {"before": dense_rate(meter)}}
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for shape, tokens in options.cells.items():
        weights, binds = cases.make_weights(shape), {}
        for impl in IMPLEMENTATIONS:
            try:
                binds[impl] = BINDERS[impl](weights, shape[1], options, PEER_BACKENDS.get(impl, "auto"))
            except (PeerUnavailable, ImportError) as error:
                header["skipped"][impl] = str(error)
        for M in tokens:
            inputs = cases.make_inputs(shape, M, weights=weights)
            check = Check(inputs)
            for impl, bind in binds.items():
                try:
                    records.append(measure(header, meter, shape, inputs, impl, bind(inputs), check))
                except ValueError as error:
                    failures.append({"impl": impl, "where": [*shape, M], "reason": str(error)})
                    print(failures[-1], file=sys.stderr)
                    continue
                print(*(records[-1][name] for name in ("impl", "shape", "M", "us", "sm_mhz", "watts")), flush=True)
        save(options.out, header, records, failures=failures)
    header["dense"]["after"] = dense_rate(meter)
    save(options.out, header, records, failures=failures)
    print(header["dense"])
    return 1 if failures else 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, and ``arguments`` themselves for the record."""
    parser = make_parser("benchmarks.sustained", __doc__)
    parser.add_argument("--vllm-ops", metavar="DIR", help="folder of vLLM's compiled operators, where not installed")
    parser.add_argument("--vllm-version", default="0.22.1", help="the version that the files of --vllm-ops are from")
    parser.add_argument("--cells", type=parse_cells, default=CELLS, help=parse_cells.__doc__)
    options = parser.parse_args(arguments)
    options.arguments = arguments
    return options


if __name__ == "__main__":
    sys.exit(main())
