# SPDX-License-Identifier: Apache-2.0
"""A layer for tests of the benchmarks, and all that they need a GPU for taken out."""

import functools

import torch

from benchmarks import cases, timing

SHAPE = (6, 3, 128, 96)


class Graph:
    """A CUDA graph that is not one."""

    def __init__(self, call):
        self.replay = call


def without_clock(monkeypatch):
    """Everything but the GPU: the package's reference runs in place of its kernels."""
    monkeypatch.setattr(cases, "make_weights", functools.partial(cases.make_weights, device="cpu"))
    monkeypatch.setattr(cases, "make_inputs", functools.partial(cases.make_inputs, device="cpu"))
    monkeypatch.setitem(cases.CELLS, "all", {SHAPE: [5, 600]})
    monkeypatch.setattr(timing, "capture", lambda call: (Graph(call), call()))
    monkeypatch.setattr(timing, "time_warm", lambda call, **_: timing.Timing(10.0, 9.0, 11.0))
    monkeypatch.setattr(timing, "time_cold", lambda call, flush, **_: timing.Timing(20.0, 19.0, 21.0))
    monkeypatch.setattr(timing, "host_us", lambda call: 3.0)
    monkeypatch.setattr(timing, "L2Flush", lambda: None)
    rates = {"read_bytes_s": 3e12, "write_bytes_s": 3e12, "copy_bytes_s": 3e12}
    monkeypatch.setattr(timing, "measure_memory_rates", lambda: rates)
    monkeypatch.setattr(timing, "measure_fp8_rate", lambda: 1.5e15)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(timing, "clocks", lambda: {"driver_version": "none"})
