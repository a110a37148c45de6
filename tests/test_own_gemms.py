# SPDX-License-Identifier: Apache-2.0
"""The host's part of the backends sm90 and mma, and how a backend is chosen, without a GPU."""

import math
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from kernel_variants import record

import kernels_cu
from cupy_moe import arrays, backend, compiler, mma, sm90, tiles, tuning
from cupy_moe.launches import Matrix
from cupy_moe.sm90 import Weights
from cupy_moe.tiles import End, Groups
from cupy_moe.tuning import Cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(tuning, "CACHE", Cache())
    monkeypatch.setattr(tuning, "device_name", lambda device: "a device")
    return tuning.CACHE


# ---- tiles --------------------------------------------------------------------------------------------------------

KERNELS = {"sm90": (sm90, 16, 208), "mma": (mma, 16, 128)}
"""The module, what ROWS is a multiple of, and the most of them."""
ROOM_FOR = {"sm90": lambda tile: 1024 if tile.rows * tile.stages <= 900 else 512, "mma": lambda tile: 128}
"""Experts that leave room for every stage of a tile."""
both = pytest.mark.parametrize("name", KERNELS)


@both
def test_tiles_are_what_the_kernel_can_do(name):
    kernel, multiple, most = KERNELS[name]
    for tile in kernel.TILES:
        experts = ROOM_FOR[name](tile)
        assert tile.rows % multiple == 0
        assert multiple <= tile.rows <= most
        assert tile.shared_bytes(experts) <= kernel.SHARED_BYTES
        assert tiles.fitting(tile, experts, kernel.SHARED_BYTES) == tile
    for tile in sm90.TILES:
        assert tile.cluster in (1, 2)
        assert tile.window in (0, 1, 2)
        assert tile.window < tile.stages, "stages that are on their way meanwhile"
        assert tile.rows % tile.box == tile.box % 8 == 0, "whole copies, in whole groups of the swizzle"
        assert tile.channels in (64, 128), "of one or two consumer warpgroups"


def test_one_block_to_a_multiprocessor():
    """Blocks that leave registers to others fill the shared memory, so that no two of a launch come together."""
    most = int(re.search(r"LARGE = ROWS > (\d+);", kernels_cu.source("gemm_sm90.cu"))[1])
    small = [tile for tile in sm90.TILES if tile.rows <= most]
    assert small
    assert all(2 * tile.shared_bytes(1) > sm90.SHARED_BYTES for tile in small)


@pytest.mark.parametrize(
    ("name", "experts"),
    [*(("sm90", experts) for experts in (2000, 4000, 8000)), *(("mma", experts) for experts in (256, 2000, 2700))],
)
def test_many_experts_leave_room_for_fewer_stages(name, experts):
    kernel = KERNELS[name][0]
    for tile in kernel.TILES:
        fitting = tiles.fitting(tile, experts, kernel.SHARED_BYTES)
        assert fitting.rows == tile.rows
        assert 2 <= fitting.stages <= tile.stages
        assert fitting.shared_bytes(experts) <= kernel.SHARED_BYTES
        more = fitting._replace(stages=fitting.stages + 1)
        assert fitting.stages == tile.stages or more.shared_bytes(experts) > kernel.SHARED_BYTES


@both
def test_tiles_are_told_apart(name):
    kernel = KERNELS[name][0]
    assert len(set(kernel.TILES)) == len(kernel.TILES)
    for k, short in ((1024, 0), (1024, 1024), (1280, 0), (1 << 20, 0)):
        weights = Weights(0, 8, 64, k, paired=False, short_columns=short)
        limits = [entry.below for entry in kernel.PREFERRED if k < entry.below_k]
        assert limits == sorted(limits)
        assert kernel.candidates(0, weights, 1 << 20), "beyond them, too"


@pytest.mark.parametrize("rows", [8 << power for power in range(18)])
def test_clusters_where_k_is_large(rows):
    def default(k):
        return sm90.candidates(0, Weights(0, 8, 64, k, paired=False), rows)[0]

    columns = sm90.CLUSTER_COLUMNS
    for k, from_rows in ((columns - 1, float("inf")), (columns, 106), (4095, 106), (4096, 56)):
        assert default(k).cluster == (2 if rows >= from_rows * 8 else 1), k


@pytest.mark.parametrize("k", [1024, 4096])
def test_large_tiles_that_are_full(k):
    """The rows of all experts in as few row tiles as can be; of those that make as few, the one that costs less."""
    rows_of = {135: 160, 155: 192, 165: 192, 190: 208, 205: 208, 320: 192, 390: 208, 450: 160, 520: 192}
    for average, rows in rows_of.items():
        tile, *_ = sm90.candidates(0, Weights(0, 64, 64, k, paired=True), average * 64)
        assert tile.rows == rows, average


@pytest.mark.parametrize("mean", [60, 100, 150, 192, 320, 1000])
@pytest.mark.parametrize("tile_rows", [144, 160, 208])
def test_expected_row_tiles(mean, tile_rows):
    """Against the distribution of Poisson itself."""
    rows = range(mean + 12 * math.isqrt(mean))
    chances = [math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in rows]
    assert sum(chances) == pytest.approx(1, abs=1e-6)
    want = sum(chance * -(-count // tile_rows) for count, chance in zip(rows, chances, strict=True))
    assert tiles.expected_row_tiles(mean, tile_rows) == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize("rows", [8 * 192, *(8 << power for power in range(18))])
@pytest.mark.parametrize("invariant", [False, True])
def test_short_sums_where_they_will_do(rows, invariant, cache):
    """With many rows, for no more columns than the weights allow, and never where a token's bits are to stay.

    Not with 192 rows, which one tile of 208 is to hold: such a tile has no registers for them.
    """
    for k, short in ((1024, 1024), (1040, 1024), (4096, 4096), (4096, 0)):
        weights = Weights(0, 8, 64, k, paired=False, short_columns=short, batch_invariant=invariant)
        allowed = k <= short and not invariant
        default, *others = sm90.candidates(0, weights, rows)
        assert (default.window == 0) == (allowed and rows >= (56 if k >= 4096 else 106) * 8 and rows != 192 * 8)
        assert any(tile.window == 0 for tile in (default, *others)) == (allowed and rows >= 44 * 8)
        short_one = next(tile for tile in sm90.TILES if tile.window == 0)
        cache.store({sm90.key(0, weights, rows): {**short_one._asdict(), "us": 1.0}})
        assert (sm90.tile_for(0, weights, rows) == short_one) == allowed, "what tuning found for other weights"


@both
@pytest.mark.parametrize("k", [1024, 4096])
@pytest.mark.parametrize("experts", [1, 8, 256])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 1000, 100_000])
def test_candidates(rows, experts, k, name):
    kernel = KERNELS[name][0]
    average = rows / max(min(rows, experts), 1)
    for short in (0, k):
        weights = Weights(0, experts, 64, k, paired=False, short_columns=short)
        default, *others = kernel.candidates(0, weights, rows)
        of_range = [entry.tile for entry in kernel.PREFERRED if average < entry.below and k < entry.below_k]
        assert default in (of_range[:1] or kernel.ROW_TILE_COSTS)
        assert set(others) <= {tile for tile in kernel.TILES if tile.suits(weights)} - {default}


@both
def test_tile_that_tuning_has_found(cache, monkeypatch, name):
    kernel = KERNELS[name][0]
    monkeypatch.setattr(sm90, "tensor_map", lambda *args: (0,) * 16)
    weights = kernel.Weights(0, 8, 64, 128, paired=False)
    default = kernel.tile_for(0, weights, 100)
    assert default == kernel.candidates(0, weights, 100)[0]
    other = next(tile for tile in kernel.TILES if tile != default)
    key = kernel.key(0, weights, 100)
    assert key.startswith(f"{name} ")
    assert key.endswith(" | a device | 8 x 64 x 128 | 128 rows")
    cache.store({key: {**other._asdict(), "us": 1.0, "default_us": 2.0}})
    assert kernel.tile_for(0, weights, 100) == kernel.tile_for(0, weights, 65) == other
    assert kernel.tile_for(0, weights, 129) == kernel.candidates(0, weights, 129)[0], "another power of two"
    for foreign in ({}, {"average": 8, "tile": 13, "option": 1}, {**other._asdict(), "rows": 13}):
        cache.store({key: foreign})
        assert kernel.tile_for(0, weights, 100) == default, "not a tile there is"


@both
def test_tiles_for_experts_held_elsewhere(cache, monkeypatch, name):
    """An eighth of the experts: the tiles, and what tuning finds for them, are those for an eighth of the rows."""
    monkeypatch.setattr(compiler, "multiprocessors", lambda device: 132)
    kernel = KERNELS[name][0]
    part = kernel.Weights(0, 32, 4096, 7168, paired=False, routed_to=256)
    whole = kernel.Weights(0, 32, 4096, 7168, paired=False)
    for rows in (0, 8, 512, 2048, 8192):
        assert kernel.candidates(0, part, rows) == kernel.candidates(0, whole, rows // 8)
        assert kernel.key(0, part, rows) == kernel.key(0, whole, rows // 8)
    assert kernel.tile_for(0, part, 2048) != kernel.tile_for(0, whole, 2048)


@both
def test_blocks_for_all_rows(cache, monkeypatch, name):
    """However few an expert can expect, all of them may come."""
    kernel, grids = KERNELS[name][0], []
    monkeypatch.setattr(compiler, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(compiler, "kernel", lambda *args, **constants: None)
    monkeypatch.setattr(backend, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(sm90, "tensor_map", lambda *args: (0,) * 16)
    monkeypatch.setattr(kernel, "Launch", lambda kernel, grid, *args, **arguments: grids.append(grid[0]))
    for routed_to in (1, 64):
        weights = kernel.Weights(0, 1, 256, 128, paired=False, routed_to=routed_to)
        tile = kernel.TILES[0]
        kernel.grouped_gemm(
            0, weights, Matrix(0, 128, "uint8"), 16 * 20, Groups(0, 0), Matrix(0, 256, "float16"), End("PRODUCT"), tile
        )
    assert grids == [42, 42]  # up to 21 row tiles, two stretches of weight rows


def test_narrow_tiles_where_wide_ones_are_few_and_long(cache, monkeypatch):
    monkeypatch.setattr(compiler, "multiprocessors", lambda device: 132)
    usual, narrow, k = sm90.PREFERRED[0].tile, sm90.NARROW, sm90.NARROW_COLUMNS
    layers = {(8, 4096, k): {1: narrow, 2: narrow, 3: usual}, (8, 4096, k - 16): {2: usual}, (8, 8448, k): {1: narrow},
              (8, 8464, k): {1: usual}, (1, 4096, k): {1: narrow, 4: narrow, 5: sm90.Tile(32, 6)}}
    for shape, of in layers.items():
        weights = Weights(0, *shape, paired=False)
        for rows, tile in of.items():
            assert sm90.tile_for(0, weights, rows) == sm90.candidates(0, weights, rows)[0] == tile, (shape, rows)
    part = Weights(0, 8, 4096, k, paired=False, routed_to=64)
    assert [sm90.tile_for(0, part, rows) for rows in (16, 24)] == [narrow, usual], "an eighth of the rows"
    weights = Weights(0, 8, 4096, k, paired=False)
    cache.store({sm90.key(0, weights, 2): {**usual._asdict(), "us": 1.0}})
    assert sm90.tile_for(0, weights, 2) == usual, "tuning knows better"
    cache.store({sm90.key(0, weights, 64): {**narrow._asdict(), "us": 1.0}})
    assert sm90.tile_for(0, weights, 64) == narrow


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("paired", [False, True])
def test_order_of_weight_rows(paired, channels):
    """The rows of a tile in shared memory, read through the dimensions and strides of the tensor map."""
    n, k = 256, 32
    made = []
    with mock.patch.object(sm90, "tensor_map", lambda *args: made.append(args) or (0,) * 16):
        sm90.weight_map(Weights(1 << 20, 2, n, k, paired=paired), channels)
    ((pointer, sizes, strides, box),) = made
    assert pointer == 1 << 20
    assert sizes[0] == k
    assert sizes[1] * sizes[2] * sizes[3] == n
    assert (sizes[4], strides[3]) == (2, n * k)
    assert box[1] * box[2] * box[3] == channels
    rows = [
        (i * strides[0] + half * strides[1] + group * strides[2]) / k
        for group in range(sizes[3]) for half in range(2) for i in range(8)
    ]
    for start in range(0, n, 16):
        first, second = rows[start : start + 8], rows[start + 8 : start + 16]
        apart = n // 2 if paired else 1  # a gate and its up, or neighbours
        assert second == [row + apart for row in first]
    assert sorted(rows) == list(range(n))


# ---- which backend ------------------------------------------------------------------------------------------------


@pytest.fixture
def status(monkeypatch):
    """What `backends` says; to be changed by the test."""
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    made = dict.fromkeys(backend.NAMES, "available")

    def problem(name, device):
        return None if made[name] == "available" else made[name]

    monkeypatch.setattr(backend, "_own_problem", problem)
    monkeypatch.setattr(backend, "_cublaslt_problem", lambda device: problem("cublaslt", device))
    return made


def test_choice_of_a_backend(status, monkeypatch):
    assert backend.choose(0, None) == "sm90"
    assert backend.choose(0, "cublaslt") == "cublaslt"
    status["sm90"] = "not here"
    assert backend.choose(0, None) == "cublaslt"
    with pytest.raises(RuntimeError, match=r"^backend: 'sm90' is not available on cuda:0: not here$"):
        backend.choose(0, "sm90")
    status["cublaslt"] = "gone"
    assert backend.choose(0, None) == "mma"
    status["mma"] = "too old"
    with pytest.raises(RuntimeError, match=r"^no fast backend .* sm90: not here\. cublaslt: gone\. mma: too old\."):
        backend.choose(0, None)
    assert backend.choose(0, "reference") == backend.choose(arrays.CPU, None) == "reference"


@pytest.mark.parametrize("name", [None, "sm90", "mma"])
def test_library_is_not_opened_for_nothing(status, monkeypatch, name):
    monkeypatch.setattr(backend, "_cublaslt_problem", lambda device: pytest.fail("tries cuBLASLt"))
    assert backend.choose(0, name) == (name or "sm90")


def test_backends_for_batch_invariant(status, monkeypatch):
    assert backend.choose(0, None, batch_invariant=True) == "sm90"
    assert backend.choose(0, "reference", batch_invariant=True) == "reference"
    assert backend.choose(arrays.CPU, None, batch_invariant=True) == "reference"
    explained = backend.explain(0, "sm90", batch_invariant=True)
    assert "cublaslt does not run: batch_invariant=True rules it out" in explained
    assert backend.explain(0, "sm90").startswith("sm90 runs on cuda:0: of those available the first in the order of")
    assert "cublaslt is available" in backend.explain(0, "sm90")
    assert "\nmma runs on cuda:0.\n" in backend.explain(0, "mma")
    allowed = r"^backend: expected None or one of 'sm90', .*'reference'; got 'cublaslt', but batch_invariant=True"
    for device in (0, arrays.CPU):
        with pytest.raises(ValueError, match=allowed):
            backend.choose(device, "cublaslt", batch_invariant=True)
    status |= dict.fromkeys(set(backend.NAMES) - {"cublaslt", "reference"}, "not here")
    with pytest.raises(RuntimeError, match=r"^no fast backend .* sm90, mma: not here\. cublaslt: batch_invariant=True"):
        backend.choose(0, None, batch_invariant=True)
    status["cublaslt"] = "gone"
    assert "cublaslt does not run: gone" in backend.explain(0, "reference", batch_invariant=True)
    monkeypatch.setenv(backend.ENVIRONMENT, "cublaslt")
    with pytest.raises(ValueError, match=allowed.replace("^backend", "^CUPY_MOE_BACKEND")):
        backend.choose(0, None, batch_invariant=True)


def test_backend_of_the_environment(status, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "cublaslt")
    assert backend.choose(0, None) == "cublaslt"
    assert backend.choose(0, "sm90") == "sm90", "an argument comes first"
    assert backend.choose(arrays.CPU, None) == "reference", "it is for arrays on a GPU"
    status["cublaslt"] = "gone"
    with pytest.raises(RuntimeError, match=r"^CUPY_MOE_BACKEND: 'cublaslt' is not available on cuda:0: gone$"):
        backend.choose(0, None)
    monkeypatch.setenv(backend.ENVIRONMENT, "")
    assert backend.choose(0, None) == "sm90"
    monkeypatch.setenv(backend.ENVIRONMENT, "cutlass")
    with pytest.raises(ValueError, match=r"^CUPY_MOE_BACKEND: .*'sm90', 'cublaslt', 'mma'.*got 'cutlass'"):
        backend.choose(0, None)


@pytest.mark.parametrize(
    ("name", "capability", "nvrtc", "reason"),
    [("sm90", "90", (13, 0), None), ("sm90", "90", (12, 9), None),
     ("sm90", "90", (12, 8), "NVRTC 12.9 or later; CuPy uses 12.8"),
     ("sm90", "100", (13, 0), "compute capability 9.0; cuda:0 has 10.0"), ("sm90", "89", (13, 0), "cuda:0 has 8.9"),
     ("mma", "80", (12, 4), None), ("mma", "90", (13, 0), None), ("mma", "120", (13, 0), None),
     ("mma", "75", (13, 0), "compute capability 8.0 and later; cuda:0 has 7.5"),
     ("mma", "89", (12, 3), "NVRTC 12.4 or later; CuPy uses 12.3")],
)
def test_where_a_kernel_of_our_own_runs(monkeypatch, name, capability, nvrtc, reason):
    device = SimpleNamespace(compute_capability=capability)
    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError, getDevice=lambda: 0)
    cuda = SimpleNamespace(
        runtime=runtime, Device=lambda number: device, nvrtc=SimpleNamespace(getVersion=lambda: nvrtc)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    problem = backend._own_problem(name, 0)
    assert problem is None if reason is None else reason in problem


def test_library_that_fails_its_self_test(monkeypatch):
    monkeypatch.setattr(backend, "_device_problem", lambda device: (0, None))
    monkeypatch.setattr(backend, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(backend.cublaslt, "search", lambda capability: ("found", ""))
    monkeypatch.setattr(backend, "_self_test", lambda device: "gave wrong products")
    assert backend._status("cublaslt", 0) == "gave wrong products"


@pytest.mark.parametrize("experts", [8, 10_500])
def test_no_more_early_weights_than_stages(experts, monkeypatch):
    """Many experts leave room for few stages."""
    weights, x, out = Weights(0, experts, 64, 128, paired=False), Matrix(0, 128, "uint8"), Matrix(0, 64, "float16")
    groups, end = Groups(0, 0), End("PRODUCT")
    (made,) = record([lambda: sm90.grouped_gemm(0, weights, x, 9, groups, out, end, sm90.TILES[0])])
    constants = dict(made.constants)
    assert constants["EARLY"] == min(sm90.EARLY, constants["STAGES"])
    assert (constants["STAGES"] < sm90.EARLY) == (experts > 8)
