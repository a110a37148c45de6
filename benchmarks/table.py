# SPDX-License-Identifier: Apache-2.0
"""The benchmark table: cupy_moe and its peers on the same inputs in the same process, checked, then timed.

``python -m benchmarks.table --vllm-ops DIR --out FILE.json`` writes one JSON object: ``header`` (device,
versions, measured rates, clocks), ``records`` (one for each implementation, backend, cell, scheme, routing, mode
and L2 state) and ``failures``. The floor of a cell uses the read rate and the dense fp8 rate measured at the start
of the same run. Calls with many tokens are checked on a sample of them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import cases, expected, timing
from benchmarks.peers import PeerUnavailable, TorchGroupedGemms, VllmLayer
from benchmarks.records import make_header, make_parser, save

IMPLEMENTATIONS = ("cupy_moe", "vllm", "torch")
# Relative Frobenius error against the float32 layer with the same quantised activations. The peers round
# intermediates to half precision, which moves single fp8 codes.
ERROR_LIMITS = {"cupy_moe": 1e-2, "vllm": 3e-2, "torch": 3e-2}
HOST_PASSES = 3


@dataclass(frozen=True)
class Bound:
    """One implementation on one cell's inputs: the timed call, and its result as the layer's output."""

    call: Callable[[], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]
    backend: Callable[[], str]


Bind = Callable[[cases.Inputs], Bound]


def _bind_cupy_moe(w: cases.Weights, topk: int, options: argparse.Namespace, backend: str) -> Bind:
    import cupy_moe

    experts = cupy_moe.Experts(
        w.w1, w.w2, w1_scale=w.w1_scale, w2_scale=w.w2_scale, per_act_token=w.scheme == "token",
        backend=None if backend == "auto" else backend,
    )

    def bind(x: cases.Inputs) -> Bound:
        def call() -> Any:
            return experts(x.hidden_states, x.topk_weights, x.topk_ids)

        return Bound(call, lambda y: y, lambda: str(experts.backend))

    return bind


def _bind_vllm(w: cases.Weights, topk: int, options: argparse.Namespace, backend: str) -> Bind:
    layer = VllmLayer(w.w1, w.w2, w.w1_scale, w.w2_scale, topk, options.vllm_ops)

    def bind(x: cases.Inputs) -> Bound:
        def call() -> torch.Tensor:
            return layer(x.hidden_states, x.topk_weights, x.topk_ids)

        return Bound(call, lambda y: y, lambda: backend)

    return bind


def _bind_torch(w: cases.Weights, topk: int, options: argparse.Namespace, backend: str) -> Bind:
    gemms = TorchGroupedGemms(w, topk)

    def bind(x: cases.Inputs) -> Bound:
        gemms.prepare(x)
        return Bound(gemms, gemms.combine, lambda: backend)

    return bind


BINDERS = {"cupy_moe": _bind_cupy_moe, "vllm": _bind_vllm, "torch": _bind_torch}
PEER_BACKENDS = {"vllm": "cutlass", "torch": "_scaled_grouped_mm, the two GEMMs only"}


class Run:
    """Collects records and failures, and writes them after every shape: a later fault loses nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.header = make_header(
            "benchmarks.table", options.arguments, out=options.out, commit=options.commit,
            vllm_ops=options.vllm_ops, vllm_version=options.vllm_version,
        )
        self.records: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.eager: list[tuple[Callable[[], object], list[dict[str, Any]]]] = []
        self.flush = timing.L2Flush()
        backends = {"cupy_moe": options.backends}
        self.entries = [
            (impl, backend) for impl in options.impls for backend in backends.get(impl) or [PEER_BACKENDS[impl]]
        ]

    def fail(self, impl: str, where: list[Any], reason: str) -> None:
        """Note and print what went wrong."""
        self.failures.append({"impl": impl, "where": where, "reason": reason})
        print(f"{impl} at {where}: {reason}", file=sys.stderr)

    def write(self) -> None:
        """The JSON file of --out, if any."""
        self.header["versions"]["cublasLt"] = timing.cublaslt_versions()
        save(self.options.out, self.header, self.records, failures=self.failures)

    def shape(self, shape: cases.Shape, tokens: list[int], scheme: str) -> None:
        """All cells of one shape and scheme, on the same weights."""
        weights = cases.make_weights(shape, scheme)
        binds: dict[tuple[str, str], Bind] = {}
        for impl, backend in self.entries:
            if impl in self.header["skipped"]:
                continue
            try:
                binds[impl, backend] = BINDERS[impl](weights, shape[1], self.options, backend)
            except (PeerUnavailable, ImportError) as error:
                self.header["skipped"][impl] = str(error)
                print(f"without {impl}: {error}", file=sys.stderr)
            except Exception as error:
                self.fail(impl, [*shape, scheme, backend], f"{type(error).__name__}: {error}")
        for routing in self.options.routing:
            for M in tokens:
                inputs = cases.make_inputs(shape, M, scheme, routing=routing, weights=weights)
                check = Check(inputs)
                torch.cuda.empty_cache()  # not all of these allocate through torch
                for (impl, backend), bind in binds.items():
                    try:
                        self.cell(impl, bind(inputs), shape, inputs, check)
                    except Exception as error:  # the other implementations are still worth the device's time
                        self.fail(impl, [*shape, M, scheme, routing, backend], f"{type(error).__name__}: {error}")
        self.write()

    def cell(self, impl: str, bound: Bound, shape: cases.Shape, inputs: cases.Inputs, check: Check) -> None:
        """Check one implementation on one cell and time it, in every mode."""
        M, scheme, routing = len(inputs.topk_ids), inputs.weights.scheme, inputs.routing
        rates, active = self.header["rates"], cases.active_experts(inputs.topk_ids)
        common = {
            "device": self.header["device"],
            "impl": impl,
            "shape": list(shape),
            "M": M,
            "active": active,
            "scheme": scheme,
            "routing": routing,
            "floor_us": cases.floor_us(shape, M, active, rates["read_bytes_s"], rates["fp8_flop_s"]),
        }
        # What another routing changes shows in one mode and L2 state.
        first = routing == self.options.routing[0]
        for mode in self.options.modes if first else self.options.modes[:1]:
            graph, result = timing.capture(bound.call) if mode == "graph" else (None, bound.call())
            error, unquantized = check(bound.output(result))
            if not error <= ERROR_LIMITS[impl]:
                reason = f"relative error {error:.2e} is above {ERROR_LIMITS[impl]:.0e}"
                self.fail(impl, [*shape, M, scheme, routing, mode, bound.backend()], reason)
                continue  # the time of a wrong result says nothing
            checked = {"mode": mode, "backend": bound.backend(), "err": error, "err_unquantized": unquantized}
            call, hold = (bound.call, False) if graph is None else (graph.replay, True)
            l2_states = self.options.l2 if first else self.options.l2[:1]
            made = [common | checked | {"l2": l2} | asdict(self.time(call, l2, hold)) for l2 in l2_states]
            if graph is None:
                self.eager.append((bound.call, made))
            self.records += made

    def host(self) -> None:
        """The host's part of the eager calls, cell after cell and again: what disturbs it lasts for some of these."""
        for _ in range(HOST_PASSES):
            for call, records in self.eager:
                us = timing.host_us(call)
                for record in records:
                    record["host_us"] = min(us, record.get("host_us", us))

    def time(self, call: Callable[[], object], l2: str, hold: bool) -> timing.Timing:
        """One timing with the L2 "warm" or "cold"."""
        replays = timing.fitting_replays(call)
        if l2 == "cold":
            return timing.time_cold(call, self.flush, hold=hold, replays=replays)
        return timing.time_warm(call, hold=hold, replays=replays)


class Check:
    """Relative errors of a result against both float32 references, over a sample of the tokens if there are many."""

    def __init__(self, inputs: cases.Inputs) -> None:
        self.sample = expected.sample_of(len(inputs.topk_ids), inputs.topk_ids.device)
        self.references = expected.references(inputs, self.sample)

    def __call__(self, output: torch.Tensor) -> tuple[float, float]:
        """Errors against the layer with quantised activations, and without."""
        output = output if self.sample is None else output[self.sample]
        quantized, unquantized = (expected.relative_error(output, one) for one in self.references)
        return quantized, unquantized


def print_table(records: list[dict[str, Any]]) -> None:
    """One line per cell, scheme, routing, mode and L2 state; then geometric means over the cells."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    columns: dict[str, None] = {}
    for r in records:
        key = (r["scheme"], r["routing"], r["mode"], r["l2"], *r["shape"], r["M"])
        column = r["backend"] if r["impl"] == "cupy_moe" else r["impl"]
        columns[column] = None
        rows.setdefault(key, {"floor": r["floor_us"]})[column] = r["us"]
    ours = [column for column in columns if column not in IMPLEMENTATIONS]
    titles = "".join(f"{c:>11}" for c in [*columns, "floor"])
    print(f"{'scheme routing mode l2':<26}{'E, topk, K, N':<24}{'M':>6}{titles}")
    ratios: dict[tuple[str, str], list[float]] = {}
    for key, row in rows.items():
        texts = "".join(f"{row[c]:>11.1f}" if c in row else f"{'-':>11}" for c in [*columns, "floor"])
        print(f"{' '.join(key[:4]):<26}{', '.join(map(str, key[4:8])):<24}{key[8]:>6}" + texts)
        for over, under in [(c, "floor") for c in columns] + [("vllm", c) for c in ours]:
            if over in row and under in row:
                ratios.setdefault((" ".join(key[:4]), f"{over} / {under}"), []).append(row[over] / row[under])
    for (group, name), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{group:<26}{name:<24}{mean:.3f}  (geometric mean of {len(values)}; least {min(values):.3f})")


def _choices(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"choose from {','.join(allowed)}, got {text}")
        return chosen

    return parse


def parse_cells(text: str) -> cases.Cells:
    """One of CELLS, or a list like ``2,3:64``: shapes by place in SHAPES, and one M or all of TOKENS."""
    if text in cases.CELLS:
        return cases.CELLS[text]
    chosen: cases.Cells = {}
    for item in text.split(","):
        index, _, tokens = item.partition(":")
        if not index.isdecimal() or int(index) >= len(cases.SHAPES) or not (tokens or "1").isdecimal():
            places = f"0 to {len(cases.SHAPES) - 1}"
            raise argparse.ArgumentTypeError(f"take one of {','.join(cases.CELLS)}, or shapes {places}, got {item}")
        chosen.setdefault(cases.SHAPES[int(index)], []).extend([int(tokens)] if tokens else cases.TOKENS)
    return chosen


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, and ``arguments`` themselves for the record."""
    parser = make_parser("benchmarks.table", __doc__)
    parser.add_argument("--vllm-ops", metavar="DIR", help="folder of vLLM's compiled operators, where not installed")
    parser.add_argument("--vllm-version", default="0.22.1", help="the version that the files of --vllm-ops are from")
    parser.add_argument("--cells", type=parse_cells, default="all", help=parse_cells.__doc__)
    parser.add_argument("--impls", type=_choices(IMPLEMENTATIONS), default=",".join(IMPLEMENTATIONS))
    parser.add_argument(
        "--backends", type=lambda text: text.split(","), default="auto",
        help="names of cupy_moe.backends(), or auto: the one that a call without a name takes",
    )
    parser.add_argument("--schemes", type=_choices(cases.SCHEMES), default="tensor")
    parser.add_argument(
        "--routing", type=_choices(cases.ROUTINGS), default="uniform",
        help="those behind the first are measured in the first of --modes and --l2 alone",
    )
    parser.add_argument("--l2", type=_choices(("warm", "cold")), default="warm")
    parser.add_argument("--modes", type=_choices(("graph", "eager")), default="graph")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the table; the exit status is 1 if anything failed its check or could not be timed."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    began = time.perf_counter()
    run = Run(options)
    try:
        for shape, tokens in options.cells.items():
            for scheme in options.schemes:
                run.shape(shape, tokens, scheme)
        run.host()
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
