# SPDX-License-Identifier: Apache-2.0
"""Times the layers of the benchmark with every tile of the backend sm90 or mma.

``python -m benchmarks.tiles [--backend mma] --out FILE.json`` writes ``header`` and, for each layer and number of
tokens M, the tiles with the time of the whole layer in microseconds (CUDA graph, warm L2, scales per tensor, uniform
routing, in turns; both GEMMs take the same tile, or GEMM 2 alone one that does not suit GEMM 1), and in ``default_us``
that with the tiles which the layer takes by itself. It prints, for ranges of rows per expert, which tiles lose least
against the best of each case: what the tiles in `cupy_moe.sm90` and `cupy_moe.mma` are chosen by.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import cupy_moe
from benchmarks import cases, timing
from benchmarks.records import make_header, make_parser, save
from cupy_moe import gemms, mma, sm90
from cupy_moe.tiles import Tile, Weights

KERNELS = {"sm90": sm90, "mma": mma}
TOKENS = (
    *cases.TOKENS[:7], *(quarters << power for power in range(6, 10) for quarters in (4, 5, 6, 7)), 4096,
)
"""From 256 on in quarters of each power of two: tiles are full with few of them."""


def taking(tile: Tile, usual: Callable[[int, Weights, int], Tile]) -> Callable[[int, Weights, int], Tile]:
    """A ``tile_for`` that takes ``tile`` wherever it suits the weights."""
    return lambda device, weights, rows: tile if tile.suits(weights) else usual(device, weights, rows)


def capture(
    backend: str, weights: cases.Weights, inputs: cases.Inputs, tile: Tile | None, workspace: cupy_moe.Workspace
) -> Callable[[], object]:
    """Replays a call whose GEMMs take ``tile``, or with None their defaults; its scratch memory is ``workspace``."""

    def usual(device: int, weights: Weights, rows: int) -> Tile:
        return KERNELS[backend].candidates(device, weights, rows)[0]

    with mock.patch.object(KERNELS[backend], "tile_for", taking(tile, usual) if tile else usual):
        experts = cupy_moe.Experts(
            weights.w1, weights.w2, w1_scale=weights.w1_scale, w2_scale=weights.w2_scale, backend=backend,
            workspace=workspace,
        )
        graph, _ = timing.capture(lambda: experts(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids))
    # A graph does not keep the layer whose tables it reads.
    return lambda layer=experts: graph.replay()


def name_of(tile: dict[str, Any]) -> str:
    """Rows, blocks to a cluster where it is one, the window (0: all), and weight rows that are not 128."""
    shared, added = (tile.get(name, 1) for name in ("cluster", "window"))
    channels = tile.get("channels", 128)
    text = f"{tile['rows']}" + f" x {shared}" * (shared > 1) + f" by {added}" * (added != 1)
    return text + f" of {channels}" * (channels != 128)


def measure(backend: str, shape: cases.Shape) -> list[dict[str, Any]]:
    """One record for each number of tokens, the fastest tile first."""
    weights, workspace, records = cases.make_weights(shape), cupy_moe.Workspace(), []
    for tokens in TOKENS:
        inputs = cases.make_inputs(shape, tokens, weights=weights)
        rows = tokens * shape[1]
        per_expert = rows / min(rows, shape[0])
        w2 = Weights(0, shape[0], shape[2], shape[3], paired=False, short_columns=gemms.SHORT_COLUMNS)
        tiles = KERNELS[backend].candidates(0, w2, rows)
        calls = [capture(backend, weights, inputs, tile, workspace) for tile in (None, *tiles)]
        times = timing.time_in_turns(calls, replays=timing.fitting_replays(calls[0]))
        default, *others = (timed.us for timed in times)
        ranked = [{**tile._asdict(), "us": us} for us, tile in sorted(zip(others, tiles, strict=True))]
        records.append({
            "shape": list(shape), "M": tokens, "rows_per_expert": per_expert, "default_us": default, "tiles": ranked,
        })
        text = "  ".join(f"{name_of(one)}: {one['us']:.1f}" for one in ranked)
        print(*shape, "M", tokens, f"default: {default:.1f}  {text}", flush=True)
    return records


def print_ranking(records: list[dict[str, Any]]) -> None:
    """For each power of two of rows per expert, how much each tile loses against the best of each case."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(round(math.log2(record["rows_per_expert"])), []).append(record)
    for power, group in sorted(groups.items()):
        losses: dict[str, list[float]] = {}
        for record in group:
            for one in record["tiles"]:
                losses.setdefault(name_of(one) + " rows", []).append(math.log(one["us"] / record["tiles"][0]["us"]))
            losses.setdefault("default", []).append(math.log(record["default_us"] / record["tiles"][0]["us"]))
        means = {name: math.exp(sum(of) / len(of)) for name, of in losses.items() if len(of) == len(group)}
        text = "  ".join(f"{name}: {loss:.3f}" for name, loss in sorted(means.items(), key=lambda item: item[1]))
        print(f"about {1 << power:5d} rows per expert ({len(group)} cases): {text}")


def main() -> int:
    """Run all layers."""
    parser = make_parser("benchmarks.tiles", __doc__)
    parser.add_argument("--backend", choices=KERNELS, default="sm90")
    options = parser.parse_args()
    header = make_header("benchmarks.tiles", sys.argv[1:], out=options.out, commit=options.commit)
    records = [record for shape in cases.SHAPES for record in measure(options.backend, shape)]
    save(options.out, header, records)
    print_ranking(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
