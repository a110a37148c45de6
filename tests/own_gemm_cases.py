# SPDX-License-Identifier: Apache-2.0
"""Cases for the grouped GEMMs of our own alone: what there is to run, operands, launch, exact result, comparison.

Rows that belong to no expert hold NaN, and so does every output before the launch.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from gpu_cases import CODE_STD, cupy, host, normal, poison, random_codes, relative_error, same_bits, weight_scale

from cupy_moe import backend, e4m3, mma, sm90
from cupy_moe.activations import ACTIVATIONS, activate
from cupy_moe.launches import (
    GROUP_ROWS,
    NO_BIAS,
    PACKED,
    PARTIALS,
    UNSCALED,
    Bias,
    Matrix,
    RowScale,
    WeightScale,
    packed_rows,
    requantize,
)
from cupy_moe.tiles import End, Groups

LIMITS = {"float32": 3e-4, "float16": 4e-4, "activated": 1e-3}
"""Relative Frobenius error; the rounding to float16 adds its own, and a square doubles it."""
SHORT = 2e-4, 3e-7
"""What the tensor cores' own sums add to that where they are those of a whole tile, and per column."""
FEW = 1000
"""Of fewer results than this the error is a matter of luck: three times as much may be."""


KERNELS = {"sm90": (sm90, {}), "mma fp8": (mma, {"fp8": True}), "mma float16": (mma, {"fp8": False})}
"""What prepares each kernel, and the options of that."""


class Variant(NamedTuple):
    """A kernel and one of its tiles."""

    kernel: str
    tile: Any

    def __str__(self):
        return f"{self.kernel} {'x'.join(map(str, self.tile))}"

    @property
    def rows(self):
        return self.tile.rows

    @property
    def bare(self):
        """Whether the tensor cores' own sums are those of a whole tile, which is for bare products alone."""
        return getattr(self.tile, "window", 1) == 0


TILES = {name: [Variant(name, tile) for tile in module.TILES] for name, (module, _) in KERNELS.items()}
ALL = [tile for tiles in TILES.values() for tile in tiles]


def problem(kernel):
    """Why a kernel cannot run here, or None."""
    name = kernel.split()[0]
    status = backend.backends(0)[name]
    if status != "available":
        return f"{name}: {status}"
    if kernel == "mma fp8" and backend.capability_of(0) < mma.FP8_CAPABILITY:
        return "mma with fp8 needs compute capability 8.9"
    return None


def edges(tile):
    """Numbers of rows around everything that depends on ROWS."""
    rows = tile.rows
    piece = 32 if rows > 192 else 16 if rows > 64 else 8  # as in gemm_sm90.cu
    parts = {*range(0, rows, piece), *range(0, rows, getattr(tile.tile, "box", rows)), rows, 2 * rows, 3 * rows}
    parts.add(rows + 32)  # two tiles that are not whole
    return sorted({max(part + by, 0) for part in parts for by in (-1, 0, 1)})


def all_edges(kernel):
    """Those of every tile of a kernel, each an expert, with empty experts between."""
    counts = sorted(set().union(*map(edges, TILES[kernel])))
    counts += [0] * len(counts)
    return np.random.default_rng(0).permutation(counts)


class Case:
    """Operands for experts with ``counts`` rows, 3 rows of nobody behind them or, if padded, behind each expert's."""

    def __init__(self, seed, counts, n, k, *, max_tokens=0):
        self.counts, self.n, self.k, self.max_tokens = np.asarray(counts, np.int32), n, k, max_tokens
        self.experts = len(self.counts)
        offsets = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        self.first = np.arange(self.experts) * max_tokens if max_tokens else offsets[:-1]
        rows = self.experts * max_tokens if max_tokens else int(offsets[-1]) + 3
        owners = np.full(rows, -1)
        for expert in np.flatnonzero(self.counts):
            owners[self.rows_of(expert)] = expert
        self.valid, self.nobody = (cupy.asarray(np.flatnonzero(mask)) for mask in (owners >= 0, owners < 0))
        self.owners = cupy.asarray(owners[owners >= 0])
        self.x, self.w = random_codes(seed, (rows, k)), random_codes(seed + 1, (self.experts, n, k))
        self.x[self.nobody] = 0xFF
        self.spans = cupy.asarray(np.stack([self.first, self.counts], axis=1), np.int32)
        self.claims = cupy.zeros(2, np.int32)

    def rows_of(self, expert):
        return slice(self.first[expert], self.first[expert] + self.counts[expert])

    def exact(self, *, on_host=False):
        """The products of the rows that belong to experts, float64; ``on_host``: made with NumPy."""
        parts = [cupy.zeros((0, self.n))]
        for expert in np.flatnonzero(self.counts):
            operands = self.x[self.rows_of(expert)], self.w[expert]
            x, w = (e4m3.decode(host(x) if on_host else x).astype(np.float64) for x in operands)
            parts.append(cupy.asarray(x @ w.T))
        return cupy.concatenate(parts)

    def launch(self, out, end, tile, *, to=None, paired=False, batch_invariant=False):
        module, options = KERNELS[tile.kernel]
        weights = module.Weights(
            self.w.data.ptr, self.experts, self.n, self.k, paired=paired, batch_invariant=batch_invariant
        )
        groups = Groups(self.spans.data.ptr, self.claims.data.ptr)
        x = Matrix(self.x.data.ptr, self.k, "uint8")
        to = to or Matrix(out.data.ptr, out.shape[1], out.dtype.name)
        return module.grouped_gemm(0, weights, x, len(self.x), groups, to, end, tile.tile, **options)

    def run(self, dtype, cols, end, tile, **options):
        """The rows that belong to experts, of a result with ``cols`` columns."""
        out = poison(cupy.empty((len(self.x), cols), dtype))
        self.launch(out, end, tile, **options)(cupy.cuda.get_current_stream().ptr)
        assert not self.claims.any(), f"{tile}: claims {self.claims}"
        assert (out.view(np.uint8)[self.nobody] == 0xFF).all(), f"{tile}: wrote to rows of nobody"
        return out[self.valid]

    def product(self, tile, dtype="float32", **options):
        """The product in the unit that the layer takes, and what it stands for."""
        unit = 1.0 if dtype == "float32" else e4m3.half_unit(self.k)
        got = self.run(dtype, self.n, End("PRODUCT", unit=unit), tile, **options)
        return got, got.astype(np.float64) * unit


def assert_close(got, want, kind, tile, k):
    error = relative_error(got, want)
    limit = LIMITS[kind] + (SHORT[0] + SHORT[1] * k if tile.bare else 0)
    limit *= 1 if got.size >= FEW else 3
    assert error <= limit, f"{tile}, {kind}: relative error {error:.2e}"


class Layer(Case):
    """A first GEMM: ``cols`` channels that are there, in weights padded to a multiple of 16, with scales and bias."""

    def __init__(self, seed, counts, cols, k, *, act="silu", kind="(E,)", x_kind="row", bias=None, max_tokens=0):
        self.act, self.gated, self.cols = act, ACTIVATIONS[act].gated, cols
        self.halves, self.pitch = 2 if self.gated else 1, -(-cols // 16) * 16
        super().__init__(seed, counts, self.halves * self.pitch, k, max_tokens=max_tokens)
        rng, channels = np.random.default_rng(seed), self.halves * cols
        self.w_scale = weight_scale(rng, kind, self.experts, channels, k)
        shape = {"row": len(self.x), "expert": self.experts, "one": 1, "number": 1}[x_kind]
        self.x_scale, self.x_kind = cupy.asarray(rng.uniform(0.8, 1.2, shape) / CODE_STD, np.float32), x_kind
        self.bias = None if bias is None else normal(seed + 2, (self.experts, channels), bias)
        self.code_scale = cupy.asarray(rng.uniform(0.005, 0.02, self.experts), np.float32)
        self.partials = cupy.empty(PARTIALS, np.float32)

    def end(self, kind, scale=UNSCALED):
        checked = SimpleNamespace(pointer=self.w_scale.data.ptr, shape=self.w_scale.shape)
        w_scale = WeightScale.of(checked, self.halves * self.cols, self.cols if self.gated else 0)
        address = self.x_scale.data.ptr
        x_scale = {
            "row": RowScale(address, row_stride=1), "expert": RowScale(address, expert_stride=1),
            "one": RowScale(address), "number": RowScale(value=float(self.x_scale[0])),
        }[self.x_kind]
        bias = NO_BIAS if self.bias is None else Bias(self.bias.data.ptr, self.bias.dtype.name)
        return End(
            kind, self.act, self.cols, x_scale=x_scale, w_scale=w_scale, bias=bias, scale=scale,
            partials=self.partials.data.ptr,
        )

    def want(self, *, on_host=False):
        """What is in front of the requantisation, (valid rows, pitch)."""
        if not len(self.valid):
            return cupy.zeros((0, self.pitch))
        rows = self.exact(on_host=on_host).reshape(-1, self.halves, self.pitch)
        rows = rows[:, :, : self.cols].reshape(len(rows), self.halves * self.cols)
        x_scale = {"row": self.valid, "expert": self.owners}.get(self.x_kind, cupy.zeros_like(self.owners))
        w_scale = self.w_scale.reshape(self.experts, -1)
        w_scale = cupy.repeat(w_scale, rows.shape[1] // w_scale.shape[1], axis=1)
        rows = rows * self.x_scale[x_scale][:, None].astype(np.float64) * w_scale[self.owners]
        if self.bias is not None:
            rows = rows + self.bias.astype(np.float32)[self.owners]
        return cupy.pad(activate(self.act, rows), ((0, 0), (0, self.pitch - self.cols)))

    def check_packed(self, tile, activated):
        """PACKED has the bits of ``activated`` but the last eight, and `requantize` their codes."""
        groups = packed_rows(len(self.x), self.experts) // GROUP_ROWS
        words = poison(cupy.empty((groups, self.pitch // 8, 3, 4, 8), np.uint32))
        packed, stream = Matrix(words.data.ptr, self.pitch, PACKED), cupy.cuda.get_current_stream().ptr
        for mode in ("TENSOR", "TOKEN"):
            poison(self.partials)
            end = self.end("PACKED")
            if mode == "TOKEN":  # its maxima are those of the rows
                end = end._replace(partials=0)
            self.launch(words, end, tile, to=packed, paired=self.gated)(stream)
            got = cupy.ascontiguousarray(self.unpacked(words)[self.places()])
            assert same_bits(got.view(np.uint32), activated.view(np.uint32) & np.uint32(0xFFFFFF00)), f"{tile}: packed"
            if mode == "TENSOR":
                assert float(self.partials.max()) == (float(abs(activated).max()) if activated.size else 0.0)
                amax = self.partials.max()
            else:
                amax = abs(got).max(axis=1, keepdims=True) if len(got) else got[:, :1]
            codes = poison(cupy.empty((len(self.x), self.pitch), np.uint8))
            scale = poison(cupy.empty((len(self.x), 1), np.float32))
            requantize(
                0, mode, packed, len(self.x), self.spans.data.ptr, self.experts,
                Matrix(codes.data.ptr, self.pitch, "uint8"), partials=end.partials, scale_out=scale.data.ptr,
            )(stream)
            want = cupy.maximum(amax, np.float32(1e-30)) / np.float32(448)
            assert same_bits(scale[0, 0] if mode == "TENSOR" else scale[self.valid], want), f"{tile}, {mode}: scale"
            assert same_bits(codes[self.valid], e4m3.encode(got / want)), f"{tile}, {mode}: codes"
            assert bool((codes[self.nobody] == 0xFF).all()), f"{tile}, {mode}: wrote to rows of nobody"
            if mode == "TOKEN":
                assert bool((scale[self.nobody].view(np.uint32) == 0xFFFFFFFF).all()), f"{tile}: scales of nobody"

    def unpacked(self, words):
        """(groups * 16, pitch) float32 of the words that ``packed.cuh`` describes."""
        three = [words[:, :, i] for i in range(3)]
        fourth = sum((word & np.uint32(0xFF)) << np.uint32(24 - 8 * i) for i, word in enumerate(three))
        values = cupy.stack([*(word & np.uint32(0xFFFFFF00) for word in three), fourth])
        # (rows 8 apart, next to each other, group, eight columns, quarter, column)
        values = values.reshape(2, 2, *fourth.shape)
        rows = values.transpose(2, 0, 4, 1, 3, 5).reshape(-1, self.pitch)
        return cupy.ascontiguousarray(rows).view(np.float32)

    def places(self):
        """Where the rows that belong to experts are among those of `unpacked`."""
        parts = [np.zeros(0, int)]
        for expert, (first, count) in enumerate(zip(self.first, self.counts, strict=True)):
            parts.append((first // GROUP_ROWS + expert) * GROUP_ROWS + np.arange(count))
        return cupy.asarray(np.concatenate(parts))

    def check(self, tile, *, per_expert=False, want=None):
        """ACTIVATED against ``want``, its maximum, and CODES against it; PACKED, where the kernel has it."""
        poison(self.partials)
        got = self.run("float32", self.pitch, self.end("ACTIVATED"), tile, paired=self.gated)
        assert_close(got, self.want() if want is None else want, "activated", tile, self.k)
        assert not got[:, self.cols :].any()
        largest = float(abs(got).max()) if got.size else 0.0
        assert float(self.partials.max()) == largest, f"{tile}: the maximum is {largest}"
        assert bool((self.partials >= 0).all())
        if tile.kernel == "sm90":
            self.check_packed(tile, got)
        scale = RowScale(self.code_scale.data.ptr, expert_stride=1) if per_expert else RowScale(value=0.01)
        codes = self.run("uint8", self.pitch, self.end("CODES", scale), tile, paired=self.gated)
        divisor = self.code_scale[self.owners][:, None] if per_expert else np.float32(0.01)
        assert same_bits(codes, e4m3.encode(got / divisor)), f"{tile}: codes are not those of the activated values"
