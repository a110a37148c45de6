# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of ``gemm_sm90.cu``: tile per number of rows, tensor maps, launch."""

from __future__ import annotations

from typing import NamedTuple

from cupy_moe import compiler, tiles
from cupy_moe.driver import Launch, tensor_map
from cupy_moe.launches import PARTIALS, Matrix
from cupy_moe.tiles import End, Groups, Preference, Tiles, Weights

STEP, WARPGROUP = 128, 128
"""Columns of a stage, and threads of a warpgroup, as in ``gemm_sm90.cu``."""
SHARED_BYTES = (227 << 10) - 192
"""What a block can have of shared memory, beside ``struct Shared`` and the claims."""
EARLY = 4
"""Stages whose weights a block asks for before there are rows. More would only delay what the kernels in front load."""
IN_STEP_BYTES = 20 << 20
"""Bytes of an expert's rows, on average, from which on clusters keep in step: so many do not stay in the L2 cache."""
_ENTRY_BYTES, _RING_BYTES, _SWIZZLE_BYTES = 16, 32, 1024  # a ring entry: two barriers and a place


class Tile(NamedTuple):
    """What a block works on at a time: ``channels`` weight rows by up to ``rows`` of activations, in ``stages`` stages.

    ``cluster`` blocks, 1 or 2, work on the same rows, each of which one of them loads for both. The tensor cores add up
    the products of ``window`` stages, 1 or 2, in their shorter sums, or of all with 0: the consumer warpgroups take
    turns at tiles then, and leave bare products. ``channels`` are 128, or 64 with few rows.
    """

    rows: int
    stages: int
    cluster: int = 1
    window: int = 1
    channels: int = 128

    @property
    def box(self) -> int:
        """Rows that one copy takes, a multiple of 8: of large tiles a quarter or half, so that few rows load as few.

        More copies would take longer than what they spare.
        """
        if self.rows <= 48:
            return self.rows
        return self.rows // (4 if self.rows % 32 == 0 else 2)

    def shared_bytes(self, experts: int) -> int:
        """Dynamic shared memory of a block: the stages and the schedule."""
        stage = STEP * (self.channels + self.rows) + _RING_BYTES
        return _SWIZZLE_BYTES + self.stages * stage + (experts + 2) * _ENTRY_BYTES

    def channel_tiles(self, n: int) -> int:
        """How many of these, or of clusters of them, n weight rows make."""
        return -(-n // (self.channels * self.cluster))

    def suits(self, weights: Weights) -> bool:
        """Whether its sums are long enough for products with these."""
        return self.window > 0 or weights.k <= weights.short_columns

    def most(self, rows: int, experts: int, n: int) -> int:
        """How many ``rows`` rows can make in all, however they are spread over the experts."""
        return tiles.most_row_tiles(rows, self.rows, experts) * self.channel_tiles(n)


PREFERRED = (
    Preference(5, Tile(16, 7)),
    Preference(28, Tile(32, 6)),
    Preference(40, Tile(48, 6)),
    Preference(56, Tile(64, 8)),
    Preference(90, Tile(96, 6), below_k=4096),
    Preference(106, Tile(128, 6), below_k=4096),
)
"""For few rows, by timing the layers of ``benchmarks/cases.py``, with numbers of tokens between its own too;
``benchmarks/tiles.py`` times all tiles.

The rows of an expert that has more than a tile are two row tiles, which load its weights twice. So most tiles are given
up before the average comes to their rows.
"""
ROW_TILE_COSTS = {
    Tile(144, 6, window=2): 0.95,
    Tile(160, 6, window=2): 1.0,
    Tile(192, 5, window=2): 1.05,
    Tile(208, 5, window=2): 1.13,
    Tile(144, 6, window=0): 0.84,
    Tile(192, 5, window=0): 0.92,
    Tile(160, 6, cluster=2, window=2): 1.0,
    Tile(192, 5, cluster=2, window=2): 1.07,
    Tile(208, 5, cluster=2, window=2): 1.2,
    Tile(160, 6, cluster=2, window=0): 0.9,
    Tile(192, 5, cluster=2, window=0): 0.96,
}
"""For more rows: what a row tile costs apart from its rows, which cost alike in all, relative to one of 160; fitted by
hand to times of such layers.

The tile is taken whose row tiles cost least in all. Tiles differ in how many row tiles hold the rows of an expert,
which are spread evenly over as few as can be, and in what one that is not full costs.
"""
CLUSTER_COLUMNS = 1280
"""Columns of the weights from which on these are tiles of clusters, and below which of single blocks."""
NARROW, NARROW_COLUMNS = Tile(16, 13, channels=64), 8192
"""In place of the first where that would leave half of the multiprocessors without a tile, and columns of the weights
from which on it pays."""


class _Tiles(Tiles[Tile]):
    def default(self, device: int, weights: Weights, rows: int) -> Tile:
        """That of `PREFERRED`, or narrow; with more rows the one whose row tiles cost least."""
        tile = self.preferred(weights, rows)
        if tile is None:
            mean, cluster = tiles.average(rows, weights), 2 if weights.k >= CLUSTER_COLUMNS else 1
            costs = {
                each: cost * tiles.expected_row_tiles(mean, each.rows)
                for each, cost in ROW_TILE_COSTS.items() if each.cluster == cluster and each.suits(weights)
            }
            return min(costs, key=costs.__getitem__)
        if tile == PREFERRED[0].tile and weights.k >= NARROW_COLUMNS:
            most = tile.most(weights.expected(rows), weights.experts, weights.n)
            few = 2 * most <= compiler.multiprocessors(device)
            return NARROW if few else tile
        return tile


_CHOICE = _Tiles("sm90", PREFERRED, NARROW, *ROW_TILE_COSTS)
TILES, key, candidates, tile_for = _CHOICE.all, _CHOICE.key, _CHOICE.candidates, _CHOICE.tile_for


def weight_map(of: Weights, channels: int) -> tuple[int, ...]:
    """The tensor map of boxes of ``channels`` weight rows.

    It hands them out in the order that ``ends.cuh`` describes: of each 16 rows of a tile, the first 8 and the last 8
    belong together, a gate with its up or a row with the next.
    """
    k, n = of.k, of.n
    within, across, group = (k, n // 2 * k, 8 * k) if of.paired else (2 * k, k, 16 * k)
    return tensor_map(
        of.pointer, (k, 8, 2, n // 16, of.experts), (within, across, group, n * k), (STEP, 8, 2, channels // 16, 1)
    )


def grouped_gemm(
    device: int, weights: Weights, x: Matrix, rows: int, groups: Groups, out: Matrix, end: End, tile: Tile | None = None
) -> Launch:
    """The launch that multiplies ``rows`` rows (an upper bound) of codes ``x`` into ``out``."""
    tile = tiles.fitting(tile or tile_for(device, weights, rows), weights.experts, SHARED_BYTES)
    if weights.batch_invariant:  # every tile adds in the same order
        tile = tile._replace(window=1)
    kernel = compiler.kernel(
        "gemm_sm90.cu", "grouped_gemm", device, ROWS=tile.rows, CHANNELS=tile.channels, STAGES=tile.stages,
        EARLY=min(EARLY, tile.stages), BOX=tile.box, CLUSTER=tile.cluster, WINDOW=tile.window,
        IN_STEP=tile.cluster > 1 and weights.k * tiles.average(rows, weights) >= IN_STEP_BYTES,
        **tiles.constants(end, out),
    )
    most = tile.most(rows, weights.experts, weights.n)
    clusters = min(most, min(compiler.multiprocessors(device), PARTIALS) // tile.cluster)
    return Launch(
        kernel, (clusters * tile.cluster, 1), 2 * tile.channels + WARPGROUP,
        shared_bytes=tile.shared_bytes(weights.experts), weights={"words": weight_map(weights, tile.channels)},
        rows={"words": tensor_map(x.pointer, (weights.k, max(rows, 1)), (x.pitch,), (STEP, tile.box))},
        groups=groups._asdict() | {
            "experts": weights.experts, "channel_tiles": tile.channel_tiles(weights.n), "steps": -(-weights.k // STEP),
        },
        end=tiles.epilogue(end, out),
    )
