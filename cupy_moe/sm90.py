# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of ``gemm_sm90.cu``: tile per number of rows, tensor maps, launch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from cupy_moe import compiler, tuning
from cupy_moe._version import __version__
from cupy_moe.driver import Launch, tensor_map
from cupy_moe.launches import NO_BIAS, PARTIALS, UNSCALED, UNSCALED_WEIGHT, Bias, Matrix, RowScale, WeightScale

CHANNELS, THREADS, STEP = 128, 384, 128
"""Weight rows of a tile, threads of a block and columns of a stage, as in ``gemm_sm90.cu``."""
SHARED_BYTES = 227 << 10
"""What a block can have of shared memory."""
_ENTRY_BYTES, _RING_BYTES, _SWIZZLE_BYTES = 16, 20, 1024  # a ring entry: two barriers and a tile


class Tile(NamedTuple):
    """What a block works on at a time: `CHANNELS` weight rows by ``rows`` rows of activations, in ``stages`` stages.

    ``cluster`` blocks, 1 or 2, work on the same rows, each of which one of them loads for both.
    """

    rows: int
    stages: int
    cluster: int = 1

    def shared_bytes(self, experts: int) -> int:
        """Dynamic shared memory of a block: the stages and the schedule."""
        stage = STEP * (CHANNELS + self.rows) + _RING_BYTES
        return _SWIZZLE_BYTES + self.stages * stage + (experts + 2) * _ENTRY_BYTES

    def fitting(self, experts: int) -> Tile:
        """The tile with as many stages as the schedule of ``experts`` experts leaves room for."""
        stages = self.stages
        while stages > 2 and self._replace(stages=stages).shared_bytes(experts) > SHARED_BYTES:
            stages -= 1
        return self._replace(stages=stages)


class Preference(NamedTuple):
    """A tile for a range of rows per expert."""

    below: float  # rows per expert that can have any, on average
    tile: Tile


PREFERRED = (
    Preference(5, Tile(16, 6)),
    Preference(28, Tile(32, 5)),
    Preference(40, Tile(64, 8)),
    Preference(90, Tile(96, 6)),
    Preference(115, Tile(128, 6)),
    Preference(170, Tile(160, 5)),
    Preference(230, Tile(224, 5)),
    Preference(float("inf"), Tile(160, 5, cluster=2)),
)
TILES = (*(entry.tile for entry in PREFERRED), Tile(224, 5, cluster=2))
"""What tuning tries."""


def key(device: int, weights: Weights, rows: int) -> str:
    """Under which `tuning` finds the tile for ``rows`` rows in all."""
    shape = f"{weights.experts} x {weights.n} x {weights.k}"
    return tuning.key(f"sm90 {__version__}", tuning.device_name(device), shape, rows=rows)


def candidates(rows: int, experts: int) -> list[Tile]:
    """The tiles that could be the fastest for ``rows`` rows in all, the default first."""
    average = rows / max(min(rows, experts), 1)
    default = next(entry.tile for entry in PREFERRED if average < entry.below)
    worth = [tile for tile in TILES if min(average / 4, 96) <= tile.rows <= max(32, 4 * average)]
    return [default, *(tile for tile in worth if tile != default)]


def tile_for(device: int, weights: Weights, rows: int) -> Tile:
    """What tuning has found for ``rows`` rows in all, or else the default."""
    tuned = tuning.CACHE.find(key(device, weights, rows)) or {}
    found = [tile for tile in TILES if tile._asdict().items() <= tuned.items()]
    return (found or candidates(rows, weights.experts))[0]


class Weights:
    """Weights (experts, n, k) of codes at ``pointer``, n and k multiples of 16; ``paired``: gates, then ups.

    The tensor map hands out their rows in the order that ``gemm_sm90.cu`` describes: of each 16 rows of a tile, the
    first 8 and the last 8 belong together, a gate with its up or a row with the next.
    """

    def __init__(self, pointer: int, experts: int, n: int, k: int, *, paired: bool) -> None:
        self.experts, self.n, self.k, self.paired = experts, n, k, paired
        within, across, group = (k, n // 2 * k, 8 * k) if paired else (2 * k, k, 16 * k)
        self.map = tensor_map(
            pointer, (k, 8, 2, n // 16, experts), (within, across, group, n * k), (STEP, 8, 2, CHANNELS // 16, 1)
        )


class Groups(NamedTuple):
    """Where each expert's rows are: addresses of what routing writes, or ``max_tokens`` of the padded form."""

    expert_offsets: int
    expert_counts: int
    claims: int  # two int32, 0 at first, that no other launch uses at the same time
    max_tokens: int = 0


class End(NamedTuple):
    """What happens to a finished tile, and the arguments of that."""

    kind: str  # PRODUCT | ACTIVATED | CODES
    activation: str = "silu"
    cols: int = 0  # columns of the result that exist; 0: all
    unit: float = 1.0  # PRODUCT: what 1 in the result stands for
    x_scale: RowScale = UNSCALED
    w_scale: WeightScale = UNSCALED_WEIGHT
    bias: Bias = NO_BIAS
    scale: RowScale = UNSCALED  # of the CODES
    partials: int = 0


def grouped_gemm(
    device: int, weights: Weights, x: Matrix, rows: int, groups: Groups, out: Matrix, end: End, tile: Tile | None = None
) -> Launch:
    """The launch that multiplies ``rows`` rows (an upper bound) of codes ``x`` into ``out``."""
    tile = (tile or tile_for(device, weights, rows)).fitting(weights.experts)
    out_type = out.dtype if end.kind == "PRODUCT" else "float32"  # the others know theirs
    kernel = compiler.kernel(
        "gemm_sm90.cu", "grouped_gemm", device, ROWS=tile.rows, STAGES=tile.stages, CLUSTER=tile.cluster, END=end.kind,
        Out=compiler.CUDA_TYPES[out_type], Bias=compiler.CUDA_TYPES.get(end.bias.dtype, "None"),
        ACT=end.activation.upper(), PER_CHANNEL=end.w_scale.per_channel,
    )
    channel_tiles = -(-weights.n // (CHANNELS * tile.cluster))
    tiles = (rows // tile.rows + min(rows, weights.experts)) * channel_tiles
    clusters = min(tiles, min(multiprocessors(device), PARTIALS) // tile.cluster)
    return Launch(
        kernel, (clusters * tile.cluster, 1), THREADS,
        shared_bytes=tile.shared_bytes(weights.experts), weights={"words": weights.map},
        rows={"words": tensor_map(x.pointer, (weights.k, max(rows, 1)), (x.pitch,), (STEP, tile.rows // tile.cluster))},
        groups=groups._asdict() | {
            "experts": weights.experts, "channel_tiles": channel_tiles, "steps": -(-weights.k // STEP),
        },
        end=_arguments(end, out),
    )


def _arguments(end: End, out: Matrix) -> dict[str, Any]:
    """``struct Epilogue``."""
    bare = end.kind == "PRODUCT"
    return {
        "out": out.pointer, "pitch": out.pitch, "cols": end.cols or out.pitch, "out_cols": out.pitch,
        "unit": 1 / end.unit if bare else end.x_scale.times(1.0), "x_scale": end.x_scale.pointer,
        "x_scale_row_stride": end.x_scale.row_stride, "x_scale_expert_stride": end.x_scale.expert_stride,
        "w_scale": end.w_scale.pointer, "w_scale_stride": end.w_scale.stride, "w_scale_up": end.w_scale.up_offset,
        "bias": end.bias.pointer, "scale_in": end.scale.pointer, "scale_value": end.scale.value,
        "scale_expert_stride": end.scale.expert_stride, "partials": end.partials,
    }


@cache
def multiprocessors(device: int) -> int:
    """How many the device has."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])

