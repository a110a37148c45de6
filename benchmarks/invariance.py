# SPDX-License-Identifier: Apache-2.0
"""What `batch_invariant` costs: ``python -m benchmarks.invariance --out FILE.json``.

Each of the 45 cells, scales per token, without the option and with it: the same weights, tokens and scratch memory in
the same process, a round of one after a round of the other (CUDA graph, warm L2, uniform routing). Writes ``header``,
``records`` (two for each cell) and ``failures``. Both results are checked first; ``same_bits`` says whether they are
equal.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch

import cupy_moe
from benchmarks import cases, summary, timing
from benchmarks.records import make_header, make_parser, save
from benchmarks.table import ERROR_LIMITS, Check, parse_cells

OPTIONS = (False, True)


class Layers:
    """The layer without the option and with it, over one workspace."""

    def __init__(self, w: cases.Weights, backend: str | None) -> None:
        workspace = cupy_moe.Workspace()
        self.experts = [
            cupy_moe.Experts(
                w.w1, w.w2, w1_scale=w.w1_scale, w2_scale=w.w2_scale, per_act_token=True, backend=backend,
                batch_invariant=option, workspace=workspace,
            ) for option in OPTIONS
        ]  # fmt: skip

    def measure(self, shape: cases.Shape, inputs: cases.Inputs) -> list[dict[str, Any]]:
        """One record for each; ValueError if a result is wrong."""
        graphs, results = zip(*(
            timing.capture(lambda one=one: one(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids))
            for one in self.experts
        ), strict=True)  # fmt: skip
        check = Check(inputs)
        errors = [check(result)[0] for result in results]
        if not max(errors) <= ERROR_LIMITS["cupy_moe"]:
            raise ValueError(f"relative errors {errors}")
        same = bool(torch.equal(*(result.view(torch.int16) for result in results)))
        calls = [graph.replay for graph in graphs]
        times = timing.time_in_turns(calls, replays=timing.fitting_replays(calls[0]))
        common = {
            "impl": "cupy_moe", "shape": list(shape), "M": len(inputs.topk_ids), "scheme": "token",
            "routing": inputs.routing, "mode": "graph", "l2": "warm", "same_bits": same,
        }  # fmt: skip
        return [
            {**common, "batch_invariant": option, "backend": experts.backend, "err": error, **asdict(timed)}
            for option, experts, error, timed in zip(OPTIONS, self.experts, errors, times, strict=True)
        ]


def main(arguments: list[str] | None = None) -> int:
    """Run all cells; the exit status is 1 if a result was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser("benchmarks.invariance", __doc__)
    parser.add_argument("--cells", type=parse_cells, default="all", help=parse_cells.__doc__)
    parser.add_argument("--backend", help="a name of cupy_moe.backends()")
    options = parser.parse_args(arguments)
    header = make_header("benchmarks.invariance", arguments, out=options.out, commit=options.commit)
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for shape, tokens in options.cells.items():
        weights = cases.make_weights(shape, "token")
        layers = Layers(weights, options.backend)
        for M in tokens:
            try:
                made = layers.measure(shape, cases.make_inputs(shape, M, weights=weights))
            except ValueError as error:
                failures.append({"where": [*shape, M], "reason": str(error)})
                print(*shape, "M", M, error, file=sys.stderr)
                continue
            records += [{"device": header["device"], **record} for record in made]
            without, option = (record["us"] for record in made)
            print(*shape, "M", M, f"{without:.1f} us, {option:.1f} us with it: {option / without:.3f}", flush=True)
        save(options.out, header, records, failures=failures)
    print(summary.invariance(records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
