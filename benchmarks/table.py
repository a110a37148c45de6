# SPDX-License-Identifier: Apache-2.0
"""The benchmark table: cupy_moe and its peers on the same inputs in the same process, checked, then timed.

``python -m benchmarks.table --vllm-ops DIR --out FILE.json`` writes one JSON object: ``header`` (device,
versions, measured rates, clocks), ``records`` (one for each implementation, cell, scheme, mode and L2 state)
and ``failures``. The floor of a cell uses the read rate and the dense fp8 rate measured at the start of the
same run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, timing
from benchmarks.peers import PeerUnavailable, TorchGroupedGemms, VllmLayer

IMPLEMENTATIONS = ("cupy_moe", "vllm", "torch")
# Relative Frobenius error against the float32 layer with the same quantised activations. The peers round
# intermediates to half precision, which moves single fp8 codes.
ERROR_LIMITS = {"cupy_moe": 1e-2, "vllm": 3e-2, "torch": 3e-2}


@dataclass(frozen=True)
class Bound:
    """One implementation on one cell's inputs: the timed call, and its result as the layer's output."""

    call: Callable[[], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]
    backend: Callable[[], str]


def _bind_cupy_moe(
    weights: cases.Weights, topk: int, _: argparse.Namespace
) -> Callable[[cases.Inputs], Bound]:
    import cupy_moe

    experts = cupy_moe.Experts(
        weights.w1,
        weights.w2,
        w1_scale=weights.w1_scale,
        w2_scale=weights.w2_scale,
        per_act_token=weights.scheme == "token",
    )

    def bind(x: cases.Inputs) -> Bound:
        def call() -> Any:
            return experts(x.hidden_states, x.topk_weights, x.topk_ids)

        return Bound(call, lambda y: y, lambda: str(experts.backend))

    return bind


def _bind_vllm(
    weights: cases.Weights, topk: int, options: argparse.Namespace
) -> Callable[[cases.Inputs], Bound]:
    w = weights
    layer = VllmLayer(w.w1, w.w2, w.w1_scale, w.w2_scale, topk, options.vllm_ops)

    def bind(x: cases.Inputs) -> Bound:
        def call() -> torch.Tensor:
            return layer(x.hidden_states, x.topk_weights, x.topk_ids)

        return Bound(call, lambda y: y, lambda: "cutlass")

    return bind


def _bind_torch(weights: cases.Weights, topk: int, _: argparse.Namespace) -> Callable[[cases.Inputs], Bound]:
    gemms = TorchGroupedGemms(weights, topk)

    def bind(x: cases.Inputs) -> Bound:
        gemms.prepare(x)
        return Bound(gemms, gemms.combine, lambda: "_scaled_grouped_mm, the two GEMMs only")

    return bind


BINDERS = {"cupy_moe": _bind_cupy_moe, "vllm": _bind_vllm, "torch": _bind_torch}


class Run:
    """Collects records and failures, and writes them after every shape: a later fault loses nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.header = make_header(
            "benchmarks.table", options.arguments, out=options.out, commit=options.commit,
            vllm_ops=options.vllm_ops, vllm_version=options.vllm_version,
        )  # fmt: skip
        self.records: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.flush = timing.L2Flush()

    def fail(self, impl: str, where: list[Any], reason: str) -> None:
        """Note and print what went wrong."""
        self.failures.append({"impl": impl, "where": where, "reason": reason})
        print(f"{impl} at {where}: {reason}", file=sys.stderr)

    def write(self) -> None:
        """The JSON file of --out, if any."""
        self.header["versions"]["cublasLt"] = timing.cublaslt_versions()
        if self.options.out:
            content = {"header": self.header, "records": self.records, "failures": self.failures}
            Path(self.options.out).write_text(json.dumps(content, indent=1) + "\n")

    def shape(self, shape: cases.Shape, tokens: list[int], scheme: str) -> None:
        """All cells of one shape and scheme, on the same weights."""
        weights = cases.make_weights(shape, scheme)
        binds = {}
        for impl in (i for i in self.options.impls if i not in self.header["skipped"]):
            try:
                binds[impl] = BINDERS[impl](weights, shape[1], self.options)
            except (PeerUnavailable, ImportError) as error:
                self.header["skipped"][impl] = str(error)
                print(f"without {impl}: {error}", file=sys.stderr)
            except Exception as error:
                self.fail(impl, [*shape, scheme], f"{type(error).__name__}: {error}")
        for M in tokens:
            inputs = cases.make_inputs(shape, M, scheme, weights=weights)
            expected = cases.references(inputs)
            for impl, bind in binds.items():
                try:
                    self.cell(impl, bind(inputs), shape, inputs, expected)
                except Exception as error:  # the other implementations are still worth the device's time
                    self.fail(impl, [*shape, M, scheme], f"{type(error).__name__}: {error}")
        self.write()

    def cell(
        self,
        impl: str,
        bound: Bound,
        shape: cases.Shape,
        inputs: cases.Inputs,
        expected: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Check one implementation on one cell and time it, in every mode."""
        M, scheme = len(inputs.topk_ids), inputs.weights.scheme
        rates, active = self.header["rates"], cases.active_experts(inputs.topk_ids)
        common = {
            "device": self.header["device"],
            "impl": impl,
            "shape": list(shape),
            "M": M,
            "active": active,
            "scheme": scheme,
            "routing": "uniform",
            "floor_us": cases.floor_us(shape, M, active, rates["read_bytes_s"], rates["fp8_flop_s"]),
        }
        for mode in self.options.modes:
            graph, result = timing.capture(bound.call) if mode == "graph" else (None, bound.call())
            error, unquantized = (cases.relative_error(bound.output(result), e) for e in expected)
            if not error <= ERROR_LIMITS[impl]:
                reason = f"relative error {error:.2e} is above {ERROR_LIMITS[impl]:.0e}"
                self.fail(impl, [*shape, M, scheme, mode], reason)
            checked = {"mode": mode, "backend": bound.backend(), "err": error, "err_unquantized": unquantized}
            if graph is None:
                checked["host_us"] = timing.host_us(bound.call)
            for l2 in self.options.l2:
                timed = self.time(bound.call if graph is None else graph.replay, l2, hold=graph is not None)
                self.records.append(common | checked | {"l2": l2} | asdict(timed))

    def time(self, call: Callable[[], object], l2: str, hold: bool) -> timing.Timing:
        """One timing with the L2 "warm" or "cold"."""
        if l2 == "cold":
            return timing.time_cold(call, self.flush, hold=hold)
        return timing.time_warm(call, hold=hold)


def make_header(
    module: str, arguments: list[str], *, out: str | None = None, commit: str | None = None,
    vllm_ops: str | None = None, vllm_version: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Device, versions, commit, command, clocks as found, and the two rates measured now."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy", "vllm"):
        try:
            versions.setdefault(name.split("-")[0], importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    command = " ".join([f"python -m {module}", *arguments])
    for path, name in ((vllm_ops, "DIR"), (out, "FILE.json")):
        command = command.replace(path, name) if path else command
    if vllm_ops and vllm_version:
        versions["vllm"] = vllm_version
    found = timing.clocks()
    versions["driver"] = found.pop("driver_version")
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": commit or timing.query("git", "rev-parse", "HEAD"),
        "command": command,
        "clocks": found,
        "rates": {"read_bytes_s": timing.measure_read_rate(), "fp8_flop_s": timing.measure_fp8_rate()},
        "skipped": {},
    }


def print_table(records: list[dict[str, Any]]) -> None:
    """One line per cell, scheme, mode and L2 state; then geometric means over the cells."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in records:
        key = (r["scheme"], r["mode"], r["l2"], *r["shape"], r["M"])
        rows.setdefault(key, {"floor": r["floor_us"]})[r["impl"]] = r["us"]
    columns = [*(impl for impl in IMPLEMENTATIONS if any(r["impl"] == impl for r in records)), "floor"]
    print(f"{'scheme mode l2':<20}{'E, topk, K, N':<24}{'M':>5}" + "".join(f"{c:>11}" for c in columns))
    ratios: dict[tuple[str, str], list[float]] = {}
    for key, row in rows.items():
        cells = "".join(f"{row[c]:>11.1f}" if c in row else f"{'-':>11}" for c in columns)
        print(f"{' '.join(key[:3]):<20}{', '.join(map(str, key[3:7])):<24}{key[7]:>5}" + cells)
        for over, under in [(c, "floor") for c in columns[:-1]] + [("vllm", "cupy_moe")]:
            if over in row and under in row:
                ratios.setdefault((" ".join(key[:3]), f"{over} / {under}"), []).append(row[over] / row[under])
    for (group, name), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{group:<20}{name:<24}{mean:.3f}  (geometric mean of {len(values)}; least {min(values):.3f})")


def _choices(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"choose from {','.join(allowed)}, got {text}")
        return chosen

    return parse


def _cells(text: str) -> dict[cases.Shape, list[int]]:
    """``all``, or a list such as ``2,3:64``: shapes by their place in SHAPES, with one M or all of them."""
    if text == "all":
        return {shape: list(cases.TOKENS) for shape in cases.SHAPES}
    chosen: dict[cases.Shape, list[int]] = {}
    for item in text.split(","):
        index, _, tokens = item.partition(":")
        if not 0 <= int(index) < len(cases.SHAPES):
            raise argparse.ArgumentTypeError(f"shapes are 0 to {len(cases.SHAPES) - 1}, got {item}")
        chosen.setdefault(cases.SHAPES[int(index)], []).extend([int(tokens)] if tokens else cases.TOKENS)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status is 1 if anything failed its check or could not be timed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument(
        "--vllm-ops", metavar="DIR", help="folder of vLLM's compiled operators, where not installed"
    )
    parser.add_argument(
        "--vllm-version", default="0.22.1", help="the version that the files of --vllm-ops are from"
    )
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--cells", type=_cells, default="all", help=_cells.__doc__)
    parser.add_argument("--impls", type=_choices(IMPLEMENTATIONS), default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--schemes", type=_choices(cases.SCHEMES), default="tensor")
    parser.add_argument("--l2", type=_choices(("warm", "cold")), default="warm")
    parser.add_argument("--modes", type=_choices(("graph", "eager")), default="graph")
    parser.add_argument("--commit", help="of this code, where there is no git folder")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    began = time.perf_counter()
    run = Run(options)
    try:
        for shape, tokens in options.cells.items():
            for scheme in options.schemes:
                run.shape(shape, tokens, scheme)
    finally:
        run.write()
    print_table(run.records)
    rates = run.header["rates"]
    print(
        f"{rates['read_bytes_s'] / 1e12:.3f} TB/s read, {rates['fp8_flop_s'] / 1e12:.0f} TFLOP/s dense fp8; ",
        end="",
    )
    print(f"{len(run.records)} records, {len(run.failures)} failures, {time.perf_counter() - began:.0f} s")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
