# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that read clock and power, with the clock and what reads it taken out."""

import itertools
import json
import sys
from unittest import mock

import pytest

import cupy_moe
from cupy_moe import pipeline

torch = pytest.importorskip("torch")

from benchmark_cases import SHAPE, without_clock  # noqa: E402

from benchmarks import clocks, sustained, table, timing  # noqa: E402


@pytest.fixture
def no_clock(monkeypatch):
    without_clock(monkeypatch)


class Nvml:
    """A device at its power limit that takes a kilojoule from one reading to the next."""

    joules = itertools.count(5)

    NVML_CLOCK_SM, nvmlClocksEventReasonSwPowerCap, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 1, 4, 128
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)
    nvmlDeviceGetPowerManagementLimit = staticmethod(lambda device: 700_000)
    nvmlDeviceGetTotalEnergyConsumption = staticmethod(lambda device: next(Nvml.joules) * 1_000_000)
    nvmlDeviceGetClockInfo = staticmethod(lambda device, kind: 1400)
    nvmlDeviceGetCurrentClocksEventReasons = staticmethod(lambda device: 4)


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mock.Mock(uuid="1-2"))


def test_meter(nvml, monkeypatch):
    monkeypatch.setattr(sustained.time, "perf_counter", iter([10.0, 12.0]).__next__)
    meter = sustained.Meter()
    assert meter.limit_watts == 700
    with meter:
        pass
    assert meter.found() == {"sm_mhz": 1400, "watts": 500, "power_capped": 1}


def test_sustained(no_clock, nvml, monkeypatch, tmp_path, capsys):
    out, replays = tmp_path / "sustained.json", []
    monkeypatch.setattr(timing, "dense_product", lambda: (lambda: None, 1e10))
    monkeypatch.setattr(
        timing, "time_warm", lambda call, **options: replays.append(options) or timing.Timing(10.0, 9.0, 11.0)
    )
    arguments = ["--vllm-ops", str(tmp_path), "--cells", "all", "--out", str(out), "--commit", "0" * 40]
    assert sustained.main(arguments) == 0
    content = json.loads(out.read_text())
    assert content["header"]["skipped"].keys() == {"vllm", "torch"}
    assert content["header"]["dense"].keys() == {"before", "after"}
    assert content["header"]["dense"]["after"]["fp8_flop_s"] == pytest.approx(1e15)
    assert [(one["impl"], one["M"], one["us"], one["sm_mhz"]) for one in content["records"]] == [
        ("cupy_moe", 5, 10, 1400), ("cupy_moe", 600, 10, 1400)
    ]
    assert sum(one["rounds"] * one["replays"] for one in replays[3:6]) * 10e-6 == pytest.approx(1.5, abs=1e-3)
    monkeypatch.setitem(sustained.ERROR_LIMITS, "cupy_moe", 0)
    assert sustained.main(arguments) == 1
    content = json.loads(out.read_text())
    assert len(content["failures"]) == 2
    assert not content["records"]


NCU_LINE = '"{}","{}","{:,.0f}","{:,.0f}","{:,.0f}","{:,.0f}"'


def test_clocks(no_clock, monkeypatch, tmp_path, capsys):
    """Nsight Compute is played by a function that runs the program which it would start."""
    out, events = tmp_path / "clocks.json", []
    experts, call = cupy_moe.Experts, cupy_moe.Experts.__call__
    monkeypatch.setattr(cupy_moe, "Experts", lambda *args, backend, **more: experts(*args, backend="reference", **more))
    monkeypatch.setattr(experts, "__call__", lambda *args: events.append(1) or call(*args))
    monkeypatch.setattr(timing, "dense_product", lambda: (lambda: events.append(0), 1e10))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("on"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("off"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mock.Mock(multi_processor_count=100))
    monkeypatch.setattr(clocks, "CELLS", {SHAPE: [5, 600]})
    for name in ("CALLS_BEFORE_REPLAY", "OVERLAP"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name))

    def ncu(command, check):
        assert command[0] == "ncu"
        assert clocks.main(command[command.index("benchmarks.clocks") + 1 :]) == 0
        counted, on = [], False
        for event in events:
            on = event == "on" if event in ("on", "off") else on
            if on and event != "on":
                counted += ["grouped_gemm", "requantize", "grouped_gemm", "combine"] if event else ["dense"]
        rows = [NCU_LINE.format(i, name, 2000 + 10 * (i % 2), 1.5e9, 4000 + i, 5000) for i, name in enumerate(counted)]
        titles = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *clocks.METRICS))
        text = ["==PROF== Profiling", titles, '"","","ns","hz","byte","byte"', *rows]
        with open(command[command.index("--log-file") + 1], "w") as log:
            log.write("\n".join(text))

    monkeypatch.setattr(clocks.subprocess, "run", ncu)
    monkeypatch.setattr(clocks.shutil, "which", lambda name: name)
    assert clocks.main(["--out", str(out), "--commit", "0" * 40]) == 0
    content = json.loads(out.read_text())
    assert content["header"]["dense"]["sm_mhz"] == 1500
    assert content["header"]["dense"]["flop_s"] == pytest.approx(2 * 8192**3 / 2e-6, rel=0.01)
    assert [(record["shape"], record["M"]) for record in content["records"]] == [([*SHAPE], 5), ([*SHAPE], 600)]
    keys = {"device", "impl", "backend", "shape", "M", "scheme", "routing", "mode", "l2", "us", "us_min", "us_max",
            "floor_us", "err"}
    assert all(keys <= record.keys() for record in content["records"])
    one = content["records"][1]
    assert one["us"] == pytest.approx(sum(one["parts"].values()), rel=0.02)
    operations = 2 * 600 * SHAPE[1] * SHAPE[2] * SHAPE[3]
    for gemm, of in (("gemm1", 2 * operations), ("gemm2", operations)):
        assert one[gemm]["us"] == one["parts"][gemm]
        assert one[gemm]["flop_s"] == pytest.approx(of / (one[gemm]["us"] * 1e-6))
        assert one[gemm]["tensor_busy"] == pytest.approx(one[gemm]["flop_s"] / (100 * 8192 * 1.5e9))
    assert [each["kernel"] for each in one["traffic"]] == ["grouped_gemm", "requantize", "grouped_gemm", "combine"]
    assert all(4000 < each["read_bytes"] < 4100 and each["written_bytes"] == 5000 for each in one["traffic"])
    monkeypatch.setitem(clocks.ERROR_LIMITS, "cupy_moe", 0)
    events.clear()
    assert clocks.main(["--out", str(out), "--commit", "0" * 40]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("benchmark", [sustained, table])
def test_without_a_gpu(benchmark):
    with pytest.raises(SystemExit, match=r"^this needs a GPU that torch can use"):
        benchmark.main(["--out", "never.json"])


def test_clocks_without_ncu(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        clocks.main([])
    assert "install Nsight Compute" in capsys.readouterr().err


def test_clocks_without_counters():
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        clocks.read_kernels("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
