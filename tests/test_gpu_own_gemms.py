# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMMs of our own alone, for every kernel, tile and end, against exact products.

``mma`` is two kernels here: with fp8 in the tensor cores, and with float16 made of the codes.

| test | what it reaches in the kernel |
| --- | --- |
| products, row counts | one row tile and several; `multiply_tile` of every number of pieces; copies left out |
| products, K | fewer stages than the ring has, as many, more; columns beyond K, which have to read as zero |
| in step | a cluster's `Claim`, with many more tiles than there are places for it; `keep_in_step` |
| in turns | `Turn` over none, one and many tiles of a block |
| policies | the constants of `hopper.cuh` that tell the L2 cache what to keep |
| products, n | weight rows beyond n in the last channel tile; both types of `Out`; bits with `batch_invariant` |
| experts | `make_schedule` over several warps of experts, `Walk.seek` over runs of empty ones, no tile at all |
| padded | `max_tokens` in place of offsets, rows of nobody between the experts |
| NaN | what shares a tile with a row or a weight of NaN |
| ends, activations | `Channel`, `Scales`, `GATED` or not, columns beyond `cols`, `partials`, `Divisor` |
| large | 64-bit addresses of weights; 100,000 rows: many tiles for each block, all but its first from `claims` |
| random | all of this in changing company |
| launches | the ring, `claims`, early weights, `keep_in_step` over 100,000 launches, with overlap and without |
"""

import os
import re

import numpy as np
import pytest
from gpu_cases import W1_KINDS, cupy, free_device_memory, poison, same_bits
from own_gemm_cases import ALL, KERNELS, TILES, Case, Layer, all_edges, assert_close, edges, problem

import kernels_cu
from cupy_moe import e4m3, sm90
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.launches import RowScale
from cupy_moe.tiles import End

pytestmark = pytest.mark.gpu

RANDOM_CASES, PARTS = int(os.environ.get("CUPY_MOE_RANDOM_CASES", "2000")), 20
KINDS = {False: [kind for kind in W1_KINDS if kind != "(E, 2)"], True: W1_KINDS}
ENDING = [tile for tile in ALL if not tile.bare]
DEEP = sorted({tile.tile.stages * 128 + more for tile in ALL for more in (-16, 16)})


@pytest.fixture(autouse=True)
def _needs_the_kernel(request):
    given = request.node.callspec.params
    reason = problem(given["kernel"] if "kernel" in given else given["tile"].kernel)
    if reason:
        pytest.skip(f"needs a kernel that is not available: {reason}")


# ---- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [16, 48, 272])
@pytest.mark.parametrize("k", sorted({16, 48, 128, 144, 1040, *DEEP}))
def test_products(n, k, kernel, seed):
    """Every tile at once: with `batch_invariant` the order along K is the same for all of them, so the bits are."""
    case = Case(seed, all_edges(kernel), n, k)
    want, first = case.exact(), None
    for tile in TILES[kernel]:
        assert_close(case.product(tile)[0], want, "float32", tile, case.k)
        got, _ = case.product(tile, batch_invariant=True)
        assert_close(got, want, "float32", tile, case.k)
        first = got if first is None else first
        assert same_bits(got, first), f"{tile} gives other bits than {TILES[kernel][0]}"


@pytest.mark.parametrize("tile", [tile for tile in ALL if getattr(tile.tile, "cluster", 1) > 1], ids=str)
@pytest.mark.parametrize("counts", [(900, 0, 1, 6500, 33, 700), (5, 0, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("k", [16, 144])
def test_in_step(k, counts, tile, seed, monkeypatch):
    """Clusters that wait for one another give the same bits: many more tiles each than claims have places, or none."""
    case = Case(seed, counts, 4112, k)
    want, _ = case.product(tile)
    monkeypatch.setattr(sm90, "IN_STEP_BYTES", 0)
    got, _ = case.product(tile)
    assert_close(got, case.exact(), "float32", tile, case.k)
    assert same_bits(got, want)


HOLD = r"""
extern "C" __global__ void hold(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
}
"""


@pytest.mark.parametrize("tile", [next(tile for tile in TILES["sm90"] if tile.tile.cluster > 1)], ids=str)
def test_in_step_beside_another_kernel(tile, seed, monkeypatch):
    """Which keeps some clusters from running: those that do run wait for them once, and not in each of their waves."""
    monkeypatch.setattr(sm90, "IN_STEP_BYTES", 0)
    case = Case(seed, [tile.tile.rows * 250], 4096, 256)
    want, _ = case.product(tile, "float16")
    hold = cupy.RawKernel(HOLD, "hold")
    hold.max_dynamic_shared_size_bytes = 200 << 10
    other, times = cupy.cuda.Stream(non_blocking=True), []
    for _ in range(5):
        start, stop, held = (cupy.cuda.Event() for _ in range(3))
        cupy.cuda.Device().synchronize()
        hold((8,), (32,), (300_000_000,), stream=other, shared_mem=200 << 10)
        held.record(other)
        start.record()
        got, _ = case.product(tile, "float16")
        stop.record()
        stop.synchronize()
        if not held.done:  # multiprocessors were held all the time
            times.append(cupy.cuda.get_elapsed_time(start, stop))
        held.synchronize()
        assert same_bits(got, want)
    if not times:
        pytest.skip("other processes have the device")
    assert min(times) < 40, "milliseconds; patience in each wave would take some 80"


@pytest.mark.parametrize("tile", [tile for tile in ALL if tile.bare], ids=str)
@pytest.mark.parametrize("n", [16, 128, 4112])
@pytest.mark.parametrize("k", [16, 144, 1024])
def test_in_turns(k, n, tile, seed):
    """The sums are the tensor cores' alone, which other widths do not change; blocks with any number of tiles."""
    for counts in ((0, 0), (1, 0), (900, 0, 1, 2500, 33, 700)):
        case = Case(seed, counts, n, k)
        got, _ = case.product(tile)
        assert_close(got, case.exact(), "float32", tile, k)
        few = Case(seed, [min(count, 5) for count in counts], n, k)
        for expert, of in enumerate(few.counts):
            few.x[few.rows_of(expert)], few.w[expert] = case.x[case.rows_of(expert)][:of], case.w[expert]
        start = np.cumsum([0, *case.counts[:-1]])
        same = np.concatenate([first + np.arange(of) for first, of in zip(start, few.counts, strict=True)])
        assert same_bits(few.product(tile)[0], got[cupy.asarray(same)]), f"{tile}: a row by its company"


@pytest.mark.parametrize("kernel", ["sm90"])
def test_policies(kernel):
    """What `createpolicy` makes is not promised to be a constant; here it is these."""
    names = {"EVICT_FIRST": "evict_first", "EVICT_UNCHANGED": "evict_unchanged"}
    made = "".join(
        f'asm("createpolicy.fractional.L2::{policy}.b64 %0, 1.0;" : "=l"(out[{i}]));'
        for i, policy in enumerate(names.values())
    )
    source = f'extern "C" __global__ void policies(unsigned long long* out) {{ {made} }}'
    got = cupy.zeros(len(names), np.uint64)
    cupy.RawKernel(source, "policies")((1,), (1,), (got,))
    text = kernels_cu.source("hopper.cuh")
    assert [hex(of) for of in got.get()] == [re.search(rf"\b{name} = (0x\w+)", text)[1] for name in names]


@pytest.mark.parametrize("tile", ALL, ids=str)
def test_half_products(tile, seed):
    """They are the others, rounded once."""
    for n, k in ((48, 16), (272, 1040)):
        case = Case(seed, all_edges(tile.kernel), n, k)
        half, value = case.product(tile, "float16")
        assert_close(value, case.exact(), "float16", tile, case.k)
        scaled = case.product(tile)[0] * np.float32(1 / e4m3.half_unit(k))
        assert same_bits(half, scaled.astype(np.float16))


@pytest.mark.parametrize("tile", ALL, ids=str)
def test_experts(tile, seed):
    """From one expert to 256, with rows at few of them or at none."""
    rng = np.random.default_rng(seed)
    few = {1: [0], 2: [1], 31: [30], 33: [0, 32], 64: [31, 32], 256: [0, 1, 200, 255], 255: []}
    for experts, with_rows in few.items():
        counts = np.zeros(experts, np.int32)
        counts[with_rows] = rng.integers(1, 2 * tile.rows, len(with_rows))
        case = Case(seed, counts, 48, 80)
        assert_close(case.product(tile)[0], case.exact(), "float32", tile, case.k)
    case = Case(seed, rng.integers(0, 3, 256), 48, 80)
    assert_close(case.product(tile)[0], case.exact(), "float32", tile, case.k)


@pytest.mark.parametrize("tile", ALL, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 40, 1, 39, 17), (40,) * 6, (0,) * 6, (0, 0, 0, 0, 0, 1)], ids=str)
def test_padded(counts, tile, seed):
    case = Case(seed, counts, 272, 144, max_tokens=40)
    assert_close(case.product(tile)[0], case.exact(), "float32", tile, case.k)
    if not tile.bare:
        Layer(seed, counts, 40, 144, max_tokens=40).check(tile, per_expert=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan(kernel, seed):
    """A row of NaN reaches itself, weights of NaN their own column: whatever shares a tile stays as it was."""
    for tile in TILES[kernel]:
        case = Case(seed, [5, 0, 2 * tile.rows + 3], 48, 144)
        clean, _ = case.product(tile)
        case.x[7, 3], case.w[2, 5, 143], case.w[1] = 0x7F, 0xFF, 0xFF
        got, _ = case.product(tile)
        bad = cupy.zeros(got.shape, bool)
        bad[7], bad[5:, 5] = True, True
        assert bool((cupy.isnan(got) == bad).all()), tile
        assert same_bits(*(cupy.where(bad, np.float32(0), y) for y in (got, clean))), tile


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", ENDING, ids=str)
def test_ends(tile, seed):
    """Activated values, their maximum and their codes at every row count; scales of every kind."""
    sizes = ((16, 16, "row", "(E,)"), (19, 272, "expert", "(E, 2)"), (272, 1040, "one", "(E, 1)"),
             (7, 48, "number", "(E, 1, 1)"))
    for cols, k, x_kind, kind in sizes:
        Layer(seed, all_edges(tile.kernel), cols, k, kind=kind, x_kind=x_kind).check(tile, per_expert=cols % 16 > 0)
    Layer(seed, [0] * 40, 16, 48).check(tile)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("i", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_activations(i, kernel, seed):
    act, tile = list(ACTIVATIONS)[i], TILES[kernel][1]
    bias = ("float32", "float16", "bfloat16", None)[i % 4]
    kinds = KINDS[ACTIVATIONS[act].gated]
    counts = edges(tile)
    for cols in (16, 19, 40):  # with and without columns beyond, of which a pair may have one
        for kind in ("(E, n)", "(E, n, 1)") if i % 2 else [kind for kind in kinds if "n" not in kind]:
            Layer(seed + cols, counts, cols, 512, act=act, kind=kind, bias=bias).check(tile)


# ---- large --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_than_2_to_31_bytes_of_weights(kernel, seed):
    free_device_memory()
    counts = np.zeros(37, np.int32)
    counts[[0, 18, 36]] = 5, 17, 70
    case = Case(seed, counts, 8192, 8192)
    assert case.w.size > 2**31
    want = case.exact()
    for tile in TILES[kernel]:
        assert_close(case.product(tile)[0], want, "float32", tile, case.k)
    del case, want
    free_device_memory()


@pytest.mark.parametrize("tile", ALL, ids=str)
def test_many_rows(tile, seed):
    counts = np.random.default_rng(seed).multinomial(100_000, [0.7, 0.1, 0, 0.1, 0.05, 0.05, 0, 0])
    case = Case(seed, counts, 48, 48)
    assert_close(case.product(tile)[0], case.exact(), "float32", tile, case.k)
    if not tile.bare:
        Layer(seed, counts, 24, 48).check(tile)


# ---- random -------------------------------------------------------------------------------------------------------


def check_random(kernel, seed):
    rng = np.random.default_rng(seed)
    tile, padded = TILES[kernel][rng.integers(len(TILES[kernel]))], rng.random() < 0.25
    experts = round(2 ** rng.uniform(0, 4 if padded else 8))
    counts = np.zeros(experts, np.int32)
    busy = rng.permutation(experts)[: rng.integers(0, 9)]
    counts[busy] = np.where(
        rng.random(len(busy)) < 0.5, rng.choice(edges(tile), len(busy)), rng.integers(0, 3 * tile.rows, len(busy))
    )
    max_tokens = int(counts.max() + rng.integers(1, 9)) if padded else 0
    n, k = (16 * round(2 ** rng.uniform(0, most)) for most in (4.5, 6))
    end = ("float32", "float16", "activated")[rng.integers(2 if tile.bare else 3)]
    print(f"seed {seed}: {tile}, {end}, n {n}, k {k}, {experts} experts, {max_tokens} each, rows {counts[counts > 0]}")
    if end == "activated":
        x_kind, kind = rng.choice(["row", "expert", "one", "number"]), rng.choice(["(E,)", "(E, 1)", "(E, 2)"])
        cols = max(n // 2 - int(rng.integers(0, 16)), 1)
        case = Layer(seed, counts, cols, k, kind=str(kind), x_kind=str(x_kind), max_tokens=max_tokens)
        case.check(tile, per_expert=rng.random() < 0.5)
    else:
        case = Case(seed, counts, n, k, max_tokens=max_tokens)
        assert_close(case.product(tile, end)[1], case.exact(), end, tile, k)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases(part, kernel):
    """2,000 of them for each kernel, or as many as CUPY_MOE_RANDOM_CASES says."""
    for case in range(part, RANDOM_CASES, PARTS):
        check_random(kernel, case)


# ---- launches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_memory_of_one_kernel(kernel, seed):
    """A launch that needs less than another one, and is prepared after it, leaves that one enough."""
    tile = TILES[kernel][0]
    cases = [Case(seed, [3] * experts, 48, 80) for experts in (256, 2)]
    outs = [poison(cupy.empty((len(case.x), case.n), np.float32)) for case in cases]
    end = End("PRODUCT", unit=1.0)
    for launch in [case.launch(out, end, tile) for case, out in zip(cases, outs, strict=True)]:
        launch(cupy.cuda.get_current_stream().ptr)
    for case, out in zip(cases, outs, strict=True):
        assert_close(out[case.valid], case.exact(), "float32", tile, case.k)


@pytest.mark.parametrize("kernel", [*KERNELS, "sm90 clusters", "sm90 in step", "sm90 in turns"])
@pytest.mark.parametrize("overlap", [False, True])
def test_many_launches(overlap, kernel, seed, monkeypatch):
    """Two GEMMs, the second on the codes of the first, 50,000 times each without a pause; more tiles than blocks."""
    clusters = [tile for tile in TILES["sm90"] if tile.tile.cluster > 1 and not tile.bare]
    special = {
        "sm90 clusters": clusters, "sm90 in step": clusters,
        "sm90 in turns": [tile for tile in TILES["sm90"] if tile.bare],
    }
    counts, tile = [20] * 12, TILES[kernel][1] if kernel in TILES else special[kernel][-1]
    first_tile = TILES["sm90"][1] if tile.bare else tile
    if kernel == "sm90 in step":
        monkeypatch.setattr(sm90, "IN_STEP_BYTES", 0)
    first = Layer(seed, counts, 256, 64)
    second = Case(seed + 9, counts, 2048, 256)
    codes, product = second.x, poison(cupy.empty((len(second.x), 2048), np.float16))
    launches = [
        first.launch(codes, first.end("CODES", RowScale(value=0.01)), first_tile, paired=True),
        second.launch(product, End("PRODUCT", unit=e4m3.half_unit(256)), tile),
    ]
    stream = cupy.cuda.get_current_stream().ptr
    for launch in launches:
        launch(stream)
    want = product.copy()
    assert_close(want[second.valid].astype(np.float64) * e4m3.half_unit(256), second.exact(), "float16", tile, 256)
    if overlap:  # each finds its own tables and weights as they were: only the codes come from the launch in front
        launches = [launch.overlapping() for launch in launches]
    poison(product)
    codes[second.valid] = 0
    for _ in range(50_000):
        for launch in launches:
            launch(stream)
    assert same_bits(product, want)
    assert not first.claims.any()
    assert not second.claims.any()
