# SPDX-License-Identifier: Apache-2.0
"""What the grouped GEMMs of our own share: weights, groups and ends, and which of its tiles a kernel takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cupy_moe import compiler, tuning
from cupy_moe._version import __version__
from cupy_moe.launches import NO_BIAS, UNSCALED, UNSCALED_WEIGHT, Bias, Matrix, RowScale, WeightScale


class Tile(Protocol):
    """What a block works on at a time, a named tuple."""

    @property
    def rows(self) -> int:
        """Rows of activations."""

    @property
    def stages(self) -> int:
        """Stages in shared memory."""

    def shared_bytes(self, experts: int) -> int:
        """Dynamic shared memory of a block: the stages and the schedule of ``experts`` experts."""

    def suits(self, weights: Weights) -> bool:
        """Whether products with these can have it."""

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, *, stages: int) -> Any: ...


T = TypeVar("T", bound=Tile)


def fitting(tile: T, experts: int, shared_bytes: int) -> T:
    """The tile with as many stages, two at least, as fit into ``shared_bytes`` beside the schedule."""
    while tile.stages > 2 and tile.shared_bytes(experts) > shared_bytes:
        tile = tile._replace(stages=tile.stages - 1)
    return tile


class Preference(NamedTuple):
    """A tile for a range of rows per expert, and of columns of the weights."""

    below: float  # rows per expert that can have any, on average
    tile: Any
    below_k: float = float("inf")


class Tiles(Generic[T]):
    """The tiles of a kernel: each that is ``preferred`` for some number of rows, and ``others``.

    Attributes
    ----------
    all : tuple
        What tuning tries.
    """

    def __init__(self, backend: str, preferred: Sequence[Preference], *others: T) -> None:
        self._backend, self._preferred = backend, preferred
        self.all: tuple[T, ...] = tuple(dict.fromkeys([*(entry.tile for entry in preferred), *others]))

    def key(self, device: int, weights: Weights, rows: int) -> str:
        """Under which `tuning` finds the tile for ``rows`` rows in all."""
        shape = f"{weights.experts} x {weights.n} x {weights.k}"
        name = f"{self._backend} {__version__}"
        return tuning.key(name, tuning.device_name(device), shape, rows=weights.expected(rows))

    def preferred(self, weights: Weights, rows: int) -> T | None:
        """The tile of the first range that the rows per expert and the columns are in, if there is one."""
        mean = average(rows, weights)
        in_range = (entry.tile for entry in self._preferred if mean < entry.below and weights.k < entry.below_k)
        return next(in_range, None)

    def default(self, device: int, weights: Weights, rows: int) -> T:
        """The tile for ``rows`` rows in all where tuning has found none."""
        tile = self.preferred(weights, rows)
        assert tile is not None, "one range has no end"
        return tile

    def candidates(self, device: int, weights: Weights, rows: int) -> list[T]:
        """The tiles that could be the fastest for ``rows`` rows in all, the default first."""
        mean, default = average(rows, weights), self.default(device, weights, rows)
        sizes = min(mean / 4, 96), max(32, 4 * mean)
        worth = [tile for tile in self.all if sizes[0] <= tile.rows <= sizes[1] and tile.suits(weights)]
        return [default, *(tile for tile in worth if tile != default)]

    def tuned(self, device: int, weights: Weights, rows: int) -> T | None:
        """What tuning has found for ``rows`` rows in all."""
        record = tuning.CACHE.find(self.key(device, weights, rows)) or {}
        known = (tile for tile in self.all if tile._asdict().items() <= record.items() and tile.suits(weights))
        return next(known, None)

    def tile_for(self, device: int, weights: Weights, rows: int) -> T:
        """The same, or else the default."""
        return self.tuned(device, weights, rows) or self.default(device, weights, rows)


def average(rows: int, weights: Weights) -> float:
    """Rows per expert that can have any, of ``rows`` in all."""
    rows = weights.expected(rows)
    return rows / max(min(rows, weights.experts), 1)


def expected_row_tiles(mean: float, tile_rows: int) -> float:
    """How many row tiles an expert has if ``mean`` rows come to it on average, each with the same small probability."""
    rows = NormalDist(mean, math.sqrt(mean))  # next to the distribution of Poisson where rows are many
    least, most = (max(int((mean + sign * 6 * rows.stdev) / tile_rows), 0) for sign in (-1, 1))
    return least + sum(1 - rows.cdf(count * tile_rows) for count in range(least, most + 1))


class Weights:
    """Weights (experts, n, k) of codes at ``pointer``, n and k multiples of 16; ``paired``: gates, then ups.

    ``batch_invariant``: a row's product must not depend on how many rows there are. ``short_columns``: with no
    more columns than that the sums of the tensor cores, which are shorter than float32, will do for all of them.
    ``routed_to``: how many experts the rows are spread over, if others are held elsewhere.
    """

    def __init__(
        self, pointer: int, experts: int, n: int, k: int, *, paired: bool, batch_invariant: bool = False,
        short_columns: int = 0, routed_to: int = 0,
    ) -> None:
        self.pointer, self.experts, self.n, self.k, self.paired = pointer, experts, n, k, paired
        self.batch_invariant, self.short_columns = batch_invariant, 0 if batch_invariant else short_columns
        self._routed_to = routed_to or experts

    def expected(self, rows: int) -> int:
        """How many of ``rows`` rows an even routing gives to these experts."""
        return expected_rows(rows, self.experts, self._routed_to)


class Groups(NamedTuple):
    """Where each expert's rows are: addresses."""

    spans: int  # (E, 2) int32, first row and count
    claims: int  # two int32, 0 at first, that no other launch uses at the same time


class End(NamedTuple):
    """What happens to a finished tile, and the arguments of that."""

    kind: str  # PRODUCT | ACTIVATED | PACKED | CODES
    activation: str = "silu"
    cols: int = 0  # columns of the result that exist; 0: all
    unit: float = 1.0  # PRODUCT: what 1 in the result stands for
    x_scale: RowScale = UNSCALED
    w_scale: WeightScale = UNSCALED_WEIGHT
    bias: Bias = NO_BIAS
    scale: RowScale = UNSCALED  # of the CODES
    partials: int = 0  # where the largest magnitudes go; 0: nobody wants them


def constants(end: End, out: Matrix) -> dict[str, Any]:
    """Those of ``ends.cuh``."""
    out_type = out.dtype if end.kind == "PRODUCT" else "float32"  # the others know theirs
    return {
        "END": end.kind, "Out": compiler.CUDA_TYPES[out_type], "Bias": compiler.CUDA_TYPES.get(end.bias.dtype, "None"),
        "ACT": end.activation.upper(), "ROW_SCALES": bool(end.x_scale.row_stride),
        "PER_CHANNEL": end.w_scale.per_channel, "MEASURED": bool(end.partials) and end.kind in ("ACTIVATED", "PACKED"),
    }


def epilogue(end: End, out: Matrix) -> dict[str, Any]:
    """``struct Epilogue`` of ``ends.cuh``."""
    bare = end.kind == "PRODUCT"
    return {
        "out": out.pointer, "pitch": out.pitch, "cols": end.cols or out.pitch, "out_cols": out.pitch,
        "unit": 1 / end.unit if bare else end.x_scale.times(1.0), "x_scale": end.x_scale.pointer,
        "x_scale_expert_stride": end.x_scale.expert_stride,
        "w_scale": end.w_scale.pointer, "w_scale_stride": end.w_scale.stride, "w_scale_up": end.w_scale.up_offset,
        "bias": end.bias.pointer, "scale_in": end.scale.pointer, "scale_value": end.scale.value,
        "scale_expert_stride": end.scale.expert_stride, "partials": end.partials,
    }


def expected_rows(rows: int, experts: int, routed_to: int) -> int:
    """How many of ``rows`` rows go to ``experts`` of the ``routed_to`` experts that they are spread over evenly."""
    return -(-rows * experts // routed_to)


def most_row_tiles(rows: int, tile_rows: int, experts: int) -> int:
    """How many row tiles ``rows`` rows can have in all, however they are spread over the experts."""
    return rows // tile_rows + min(rows, experts)
