# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of ``gemm_mma.cu``: tile per number of rows, launch."""

from __future__ import annotations

from typing import NamedTuple

from cupy_moe import backend, compiler, tiles
from cupy_moe.driver import Launch
from cupy_moe.launches import PARTIALS, Matrix
from cupy_moe.tiles import End, Groups, Preference, Tiles, Weights

CHANNELS, THREADS, STEP = 128, 256, 128
"""Weight rows of a tile, threads of a block and columns of a stage, as in ``gemm_mma.cu``."""
SHARED_BYTES = (99 << 10) - 128
"""What a block can have of shared memory, beside that of `block_max`, on every device: 8.6, 8.9 and 12.0 have least."""
FP8_CAPABILITY = (8, 9)
"""From which compute capability on the tensor cores multiply e4m3."""


class Tile(NamedTuple):
    """What a block works on at a time: `CHANNELS` weight rows, ``rows`` rows of activations, in ``stages`` stages."""

    rows: int
    stages: int

    def suits(self, weights: Weights) -> bool:
        """Always: each stage is added to the sum on its own."""
        return True

    def shared_bytes(self, experts: int) -> int:
        """Dynamic shared memory of a block: the stages and the schedule."""
        return self.stages * STEP * (CHANNELS + self.rows) + 16 * (experts + 1)


PREFERRED = (
    Preference(12, Tile(16, 5)),
    Preference(28, Tile(32, 4)),
    Preference(72, Tile(64, 4)),
    Preference(float("inf"), Tile(96, 3)),
)
"""Those that lost least over the layers of ``benchmarks/cases.py``; ``benchmarks/tiles.py`` times all of them."""
_CHOICE: Tiles[Tile] = Tiles("mma", PREFERRED)
TILES, key, candidates, tile_for = _CHOICE.all, _CHOICE.key, _CHOICE.candidates, _CHOICE.tile_for


def grouped_gemm(
    device: int, weights: Weights, x: Matrix, rows: int, groups: Groups, out: Matrix, end: End,
    tile: Tile | None = None, *, fp8: bool | None = None,
) -> Launch:
    """The launch that multiplies ``rows`` rows (an upper bound) of codes ``x`` into ``out``.

    ``fp8``: whether the tensor cores multiply the codes themselves or float16 made of them; None is what the device
    can.
    """
    tile = tiles.fitting(tile or tile_for(device, weights, rows), weights.experts, SHARED_BYTES)
    kernel = compiler.kernel(
        "gemm_mma.cu", "grouped_gemm_mma", device, ROWS=tile.rows, STAGES=tile.stages,
        FP8=backend.capability_of(device) >= FP8_CAPABILITY if fp8 is None else fp8, **tiles.constants(end, out),
    )
    channel_tiles = -(-weights.n // CHANNELS)
    most = tiles.most_row_tiles(rows, tile.rows, weights.experts) * channel_tiles
    return Launch(
        kernel, (min(most, compiler.multiprocessors(device), PARTIALS), 1), THREADS,
        shared_bytes=tile.shared_bytes(weights.experts),
        operands={"weights": weights.pointer, "rows": x.pointer, "n": weights.n, "k": weights.k, "pitch": x.pitch},
        groups=groups._asdict() | {
            "experts": weights.experts, "channel_tiles": channel_tiles, "steps": -(-weights.k // STEP),
        },
        end=tiles.epilogue(end, out),
    )
