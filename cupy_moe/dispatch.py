# SPDX-License-Identifier: Apache-2.0
"""The launches in front of GEMM 1: routing, and the hidden states as codes in expert order.

As in `launches`, addresses are integers (0 for null), and nothing is enqueued here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cupy_moe import compiler, grids
from cupy_moe.driver import Kernel, Launch
from cupy_moe.grids import MANY_ROWS, MAX_ROW_THREADS, MORE_ROW_THREADS, STRETCH_THREADS, VECTOR, Grid, up
from cupy_moe.launches import PARTIALS, SCAN_THREADS, UNSCALED, Maps, Matrix, RowScale, Tables

PAIRS_PER_BLOCK, MOST_ROUTE_BLOCKS = 512, 128
"""(token, slot) pairs of a block of `route`, unless that would be more blocks than these, each of which reads the
counts of all."""
ROUTE_CLUSTER = 8
"""Blocks that do in one launch, as a cluster, what else takes two if there is more than one."""
SCAN_VECTORS = 4
"""Vectors that a thread loads at a time to find a maximum, ``IN_FLIGHT`` of ``quantize.cuh``."""
ALONE_ELEMENTS = 1 << 15
"""Hidden states up to which the blocks that quantise them find their maximum each by itself."""
MOST_COLUMNS_BESIDE = 1 << 15
"""Columns up to which a thread that holds its part of a token has registers left to find the token's rows."""
MOST_PAIRS_BESIDE, FINDING_THREADS = 2048, 256
"""Pairs among which a block can look for the rows of its token, and the threads that it has for more than
`MAX_ROW_THREADS` pairs at least: with more, a multiprocessor would have fewer blocks."""
KEYS, IDS_IN_FLIGHT = 128, 8
"""A multiple of so many keys is in shared memory, ``KEYS`` of ``route_quantize.cu``; and ids that a thread loads at a
time where it has several."""
_ROUTE_SHARED_BYTES = 96 * 1024
_ID_TYPES = {"int32": "int", "int64": "long long"}


class Pairs(NamedTuple):
    """The (token, slot) pairs to be routed, and where the results go."""

    ids: int
    id_dtype: str
    topk: int
    experts: int
    maps: Maps
    expert_map: int = 0
    map_size: int = 0
    tables: Tables = Tables()
    scratch: int = 0  # as many int32 as `route_scratch` says

    def read(self, tokens: int) -> dict[str, Any]:
        """What the kernels are told of the pairs."""
        return {
            "ids": self.ids, "pairs": tokens * self.topk, "topk": self.topk, "experts": self.experts,
            "expert_map": self.expert_map, "map_size": self.map_size,
        }

    def written(self) -> dict[str, Any]:
        """Their results."""
        maps = self.maps
        return {
            "expert_offsets": maps.expert_offsets, "expert_counts": maps.expert_counts, "dst2src_map": maps.dst2src,
            "src2dst_map": maps.src2dst, "row_experts": maps.row_experts, "tables": self.tables._asdict(),
            "spans": maps.spans,
        }


def _route_warps(pairs: int) -> int:
    """Warps of a block that routes: if there is room, the last one has no pairs."""
    return min(max(up(pairs, 32) // 32, 4) + 1, 32)


def _route_block(pairs: int, experts: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block of ``route.cu``: a row of the table per warp, and three more."""
    warps = _route_warps(pairs)
    while warps > 1 and (warps + 3) * (experts | 1) * 4 > _ROUTE_SHARED_BYTES:
        warps //= 2
    return warps * 32, (warps + 3) * (experts | 1) * 4


def _pairs_per_block(pairs: int) -> int:
    return max(PAIRS_PER_BLOCK, up(-(-pairs // MOST_ROUTE_BLOCKS), 32))


def route_blocks(pairs: int) -> int:
    """Blocks that `route` cuts ``pairs`` into."""
    return max(-(-pairs // _pairs_per_block(pairs)), 1)


def route_scratch(device: int, pairs: int, experts: int) -> int:
    """How many int32 of scratch memory `route` needs: none where one launch does it all."""
    blocks = route_blocks(pairs)
    return 0 if blocks == 1 or (blocks <= ROUTE_CLUSTER and compiler.has_clusters(device)) else blocks * experts


def route(device: int, tokens: int, routing: Pairs) -> list[Launch]:
    """Expert counts, offsets, both maps and the pointer tables from ``topk_ids``."""
    pairs = tokens * routing.topk
    blocks, split = route_blocks(pairs), route_scratch(device, pairs, routing.experts) > 0
    cluster = 1 if split or blocks == 1 else ROUTE_CLUSTER
    pairs_of_block = _pairs_per_block(pairs) if split else -(-pairs // cluster)
    threads, shared = _route_block(pairs_of_block, routing.experts)

    def launch(name: str, grid: int, **arguments: Any) -> Launch:
        kernel = compiler.kernel("route.cu", name, device, Id=_ID_TYPES[routing.id_dtype], CLUSTER=cluster)
        return Launch(kernel, (grid, 1), threads, shared_bytes=shared, **routing.read(tokens), **arguments)

    if not split:
        return [launch("route", cluster, **routing.written())]
    counts: dict[str, Any] = {"pairs_per_block": pairs_of_block, "block_counts": routing.scratch}
    return [
        launch("route_count", blocks, **counts, spans=routing.maps.spans),
        launch("route_place", blocks, **counts, **routing.written()),
    ]


def route_padded(
    device: int, expert_num_tokens: int, dtype: str, experts: int, max_tokens: int, maps: Maps, tables: Tables
) -> Launch:
    """The same tables for rows that already lie at ``expert * max_tokens``."""
    return Launch(
        compiler.kernel("route.cu", "route_padded", device, Id=_ID_TYPES[dtype], CLUSTER=1), (experts, 1),
        STRETCH_THREADS, expert_num_tokens=expert_num_tokens, experts=experts, max_tokens=max_tokens,
        expert_counts=maps.expert_counts, src2dst_map=maps.src2dst, row_experts=maps.row_experts,
        tables=tables._asdict(), spans=maps.spans,
    )


def _scan_threads(vectors: int) -> int:
    """Threads of a block that looks for the maximum of ``vectors`` vectors.

    No more than have anything to load: the kernels behind want room beside them.
    """
    return min(max(up(-(-vectors // SCAN_VECTORS), 32), 64), SCAN_THREADS)


def _grid(mode: str, tokens: int, cols: int, *, most_threads: int, pairs: int, alone: bool) -> Grid:
    """That of ``tokens`` tokens of ``cols`` columns.

    ``most_threads`` of a block that holds a row. ``pairs``: those among which the blocks look for rows too, 0 if they
    do not. ``alone``: and for the maximum. Some threads may have nothing else to do.
    """
    vectors = -(-cols // VECTOR)
    if pairs > MAX_ROW_THREADS:  # each block looks through them: one to a token
        threads = FINDING_THREADS if vectors <= 2 * FINDING_THREADS else MAX_ROW_THREADS
        return Grid(1, threads, -(-vectors // threads))
    least = min(_route_warps(pairs) * 32, MAX_ROW_THREADS) if pairs else 0
    if alone:
        least = max(least, _scan_threads(tokens * vectors))
    if mode == "TOKEN":
        grid = grids.whole_rows(cols, most_threads, several=tokens >= MANY_ROWS)
    else:
        grid = grids.stretches(cols, least if alone else max(least, STRETCH_THREADS))
        if tokens >= MANY_ROWS and grid.stretches % 2 == 0:
            grid = Grid(grid.stretches // 2, grid.threads, 2)
    return grid._replace(threads=max(grid.threads, least))


def _beside(pairs: int, experts: int, cols: int) -> bool:
    """Whether the blocks that quantise can find the rows of their tokens among the pairs, each for itself."""
    return 0 < pairs <= MOST_PAIRS_BESIDE and pairs * experts < 1 << 31 and cols <= MOST_COLUMNS_BESIDE


def quantize(
    device: int, mode: str, x: Matrix, tokens: int, cols: int, out: Matrix, out_cols: int, *,
    routing: Pairs | None = None, topk: int = 1, src2dst: int = 0, row_experts: int = 0, topk_weights: int = 0,
    weighted: bool = False, scale: RowScale = UNSCALED, partials: int = 0, valid_only: bool = False,
    scale_out: int = 0, fresh: bool = False,
) -> list[Launch]:
    """``quantize_shuffle``, in mode TENSOR behind ``amax_tokens`` unless ``x`` is small.

    ``routing`` is done too: first, or in the same launch, ``route_quantize``, if the pairs are not too many. It says
    where the rows are then, instead of ``topk``, ``src2dst`` and ``row_experts``.

    ``weighted`` puts the router weight on the input.

    ``fresh``: the kernel in front makes ``x``, which are rows of experts, and in mode TENSOR the ``partials``.
    """
    pairs = tokens * routing.topk if routing else 0
    vectors, few = tokens * -(-cols // VECTOR), pairs <= MAX_ROW_THREADS
    alone = mode == "TENSOR" and not (fresh or weighted or valid_only) and tokens * cols <= ALONE_ELEMENTS and few
    route_first = mode == "TENSOR" and (weighted or valid_only)  # the maximum is of what it has found
    together = routing is not None and not route_first and _beside(pairs, routing.experts, out_cols)
    most_threads = MORE_ROW_THREADS if fresh else MAX_ROW_THREADS
    grid = _grid(
        mode, tokens, out_cols, most_threads=most_threads, pairs=pairs if together else 0, alone=alone
    )
    constants: dict[str, Any] = {
        "In": compiler.CUDA_TYPES[x.dtype], "MODE": mode, "VECS": grid.per_thread, "IN_ALIGNED": x.aligned(cols),
        "OUT_ALIGNED": out.aligned(out_cols), "WEIGHTED": weighted, "PER_EXPERT": bool(scale.expert_stride),
        "ALONE": alone,
    }
    source: dict[str, Any] = {"x": x.pointer, "x_pitch": x.pitch, "topk_weights": topk_weights, "cols": cols}
    codes: dict[str, Any] = {
        "scale_in": scale.pointer, "scale_value": scale.value, "scale_stride": scale.row_stride, "out_cols": out_cols,
        "out": out.pointer, "out_pitch": out.pitch, "scale_out": scale_out,
    }
    if routing:
        topk, src2dst, row_experts = routing.topk, routing.maps.src2dst, routing.maps.row_experts
    mapped = {"src2dst_map": src2dst, "topk": topk}
    source["partials"] = partials

    def kernel_of(name: str) -> Kernel:
        threads = max(MAX_ROW_THREADS, grids.bound(grid.threads))
        return compiler.kernel("quantize.cu", name, device, **constants, FRESH=fresh, ROW_THREADS=threads)

    amax = [] if mode != "TENSOR" or fresh or alone else [Launch(
        kernel_of("amax_tokens"), (PARTIALS, 1), _scan_threads(-(-vectors // PARTIALS)), **source, **mapped,
        valid_only=valid_only, in_front=together, tokens=tokens,
    )]
    if routing and together:
        kernel = compiler.kernel(
            "route_quantize.cu", "route_quantize", device, Id=_ID_TYPES[routing.id_dtype],
            IDS=1 if few else IDS_IN_FLIGHT, **constants,
        )
        return [*amax, Launch(
            kernel, (1 + tokens, grid.stretches), grid.threads,
            shared_bytes=max(routing.experts, up(pairs, KEYS) + topk) * 4, **routing.read(tokens), **routing.written(),
            **source, **codes,
        )]
    return [*(route(device, tokens, routing) if routing else []), *amax, Launch(
        kernel_of("quantize_shuffle"), (tokens, grid.stretches), grid.threads, **source, **mapped, **codes,
        row_experts=row_experts,
    )]
