# SPDX-License-Identifier: Apache-2.0
"""What a choice costs or brings: cells with and without it, in turns.

The same weights, tokens and scratch memory in the same process, a round of one after a round of the other (CUDA graph,
warm L2, uniform routing). Both results are checked first; ``same_bits`` says whether they are equal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

import cupy_moe
from benchmarks import cases, summary, timing
from benchmarks.records import make_header, make_parser, save
from benchmarks.table import ERROR_LIMITS, Check, parse_cells


@dataclass(frozen=True)
class Choice:
    """Something that a layer does or does not.

    ``name`` is its key in a record. ``options`` are arguments of ``Experts``, and ``during`` is entered while launches
    are prepared, both by whether it does.
    """

    name: str
    scheme: str
    options: Callable[[bool], dict[str, Any]] = lambda _: {}
    during: Callable[[bool], AbstractContextManager[Any]] = lambda _: nullcontext()


class Layers:
    """The layer without and with it, over one workspace."""

    def __init__(self, choice: Choice, w: cases.Weights, backend: str | None) -> None:
        workspace = cupy_moe.Workspace()
        self.choice = choice
        self.experts = [
            cupy_moe.Experts(
                w.w1, w.w2, w1_scale=w.w1_scale, w2_scale=w.w2_scale, per_act_token=choice.scheme == "token",
                backend=backend, workspace=workspace, **choice.options(chosen),
            ) for chosen in (False, True)
        ]

    def measure(self, shape: cases.Shape, inputs: cases.Inputs, rates: dict[str, float]) -> list[dict[str, Any]]:
        """One record for each; ValueError if a result is wrong."""
        M, active = len(inputs.topk_ids), cases.active_experts(inputs.topk_ids)
        graphs, results = [], []
        for chosen, one in zip((False, True), self.experts, strict=True):
            with self.choice.during(chosen):
                graph, result = timing.capture(
                    lambda one=one: one(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
                )
            graphs.append(graph)
            results.append(result)
        check = Check(inputs)
        errors = [check(result)[0] for result in results]
        if not max(errors) <= ERROR_LIMITS["cupy_moe"]:
            raise ValueError(f"relative errors {errors}")
        same = bool(torch.equal(*(result.view(torch.int16) for result in results)))
        calls = [graph.replay for graph in graphs]
        times = timing.time_in_turns(calls, replays=timing.fitting_replays(calls[0]))
        common = {
            "impl": "cupy_moe", "shape": list(shape), "M": M, "scheme": self.choice.scheme, "routing": inputs.routing,
            "mode": "graph", "l2": "warm", "same_bits": same,
            "floor_us": cases.floor_us(shape, M, active, rates["read_bytes_s"], rates["fp8_flop_s"]),
        }
        return [
            {**common, self.choice.name: chosen, "backend": experts.backend, "err": error, **asdict(timed)}
            for chosen, experts, error, timed in zip((False, True), self.experts, errors, times, strict=True)
        ]


def run(
    program: str, doc: str | None, choice: Choice, arguments: list[str] | None, *, most_tokens: int | None = None,
    backend: str | None = None,
) -> int:
    """Run all cells of up to ``most_tokens`` tokens; the exit status is 1 if a result was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(program, doc)
    parser.add_argument("--cells", type=parse_cells, default="all", help=parse_cells.__doc__)
    parser.add_argument("--backend", default=backend, help="a name of cupy_moe.backends()")
    options = parser.parse_args(arguments)
    header = make_header(program, arguments, out=options.out, commit=options.commit)
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for shape, tokens in options.cells.items():
        weights = cases.make_weights(shape, choice.scheme)
        layers = Layers(choice, weights, options.backend)
        for M in (M for M in tokens if most_tokens is None or most_tokens >= M):
            try:
                inputs = cases.make_inputs(shape, M, choice.scheme, weights=weights)
                made = layers.measure(shape, inputs, header["rates"])
            except ValueError as error:
                failures.append({"where": [*shape, M], "reason": str(error)})
                print(*shape, "M", M, error, file=sys.stderr)
                continue
            records += [{"device": header["device"], **record} for record in made]
            without, chosen = (record["us"] for record in made)
            print(*shape, "M", M, f"{without:.1f} us, {chosen:.1f} us with it: {chosen / without:.3f}", flush=True)
        save(options.out, header, records, failures=failures)
    print(summary.choice(records, choice.name))
    return 1 if failures else 0
