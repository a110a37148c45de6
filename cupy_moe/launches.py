# SPDX-License-Identifier: Apache-2.0
"""One function per kernel: choose the variant and the grid, return the prepared `Launch`. `dispatch` has more of them.

Addresses are integers (0 for null). Everything is on one device; nothing is enqueued here.
"""

from __future__ import annotations

from typing import NamedTuple

from cupy_moe import compiler, grids
from cupy_moe.arrays import Array
from cupy_moe.checks import ONE
from cupy_moe.driver import Kernel, Launch
from cupy_moe.grids import STRETCH_THREADS, VECTOR

SCAN_THREADS = 512
"""Threads of a block that looks for the maximum of a tensor, at most."""
PARTIALS = 256
"""Blocks of the kernels that find the maximum of a tensor, each of which leaves a float; as in ``common.cuh``."""
PACKED, GROUP_ROWS = "packed", 16
"""The form of many activated values, 24 bits each, and the rows that it takes together; as in ``packed.cuh``."""
MOST_HELD_COLUMNS = 2048
"""Columns of a group of packed rows of which a multiprocessor's shared memory holds two."""
COMBINED_PAIRS = 8
"""Slots of a block of `combine` where there are many tokens: with more, a thread would load several times in turn."""
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1, PACKED: 3}


class Matrix(NamedTuple):
    """Rows in device memory: address, elements from one row to the next, dtype name."""

    pointer: int
    pitch: int
    dtype: str

    @classmethod
    def of(cls, info: Array) -> Matrix:
        """A checked matrix with contiguous rows, or more dimensions without gaps."""
        apart = len(info.shape) == 2 and info.shape[0] > 1  # the stride of a single row says nothing
        return cls(info.pointer, info.strides[0] if apart else info.shape[-1], info.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _ITEMSIZE[self.dtype]

    def aligned(self, cols: int) -> bool:
        """Whether vectors of eight elements can be loaded whole, from every row and up to column ``cols``."""
        alignment = 8 if self.itemsize == 1 else 16
        return not (self.pointer % alignment or self.pitch * self.itemsize % alignment or cols % VECTOR)


class RowScale(NamedTuple):
    """Scales of activations: ``pointer[row * row_stride + expert * expert_stride]``, or ``value`` for address 0."""

    pointer: int = 0
    row_stride: int = 0
    expert_stride: int = 0
    value: float = 1.0

    @classmethod
    def of(cls, scale: Array) -> RowScale:
        """A checked scale: one, (), (1,) or (1, 1); one per expert, (E,); or one per row, (rows, 1)."""
        one = scale.shape in ONE
        per_expert = len(scale.shape) == 1 and not one
        return cls(scale.pointer, row_stride=int(not (one or per_expert)), expert_stride=int(per_expert))

    def times(self, unit: float) -> float:
        """``unit``, multiplied by the scale where that is a number."""
        return unit if self.pointer else unit * self.value


class WeightScale(NamedTuple):
    """Scales of weights: ``pointer[expert * stride + up * up_offset]``, ``+ col`` if per channel; 1 for address 0."""

    pointer: int = 0
    stride: int = 0
    up_offset: int = 0
    per_channel: bool = False

    @classmethod
    def of(cls, scale: Array, channels: int, up_channel: int) -> WeightScale:
        """A checked scale of weights with ``channels`` rows per expert, the ups from ``up_channel`` on (0: no ups)."""
        per_expert = scale.shape[1] if len(scale.shape) > 1 else 1
        if per_expert == 1:
            return cls(scale.pointer, 1)
        if per_expert == channels:
            return cls(scale.pointer, channels, up_channel, per_channel=True)
        return cls(scale.pointer, 2, 1)


class Bias(NamedTuple):
    """A bias ``(E, columns)``; address 0 for none."""

    pointer: int = 0
    dtype: str = "None"


NO_BIAS, UNSCALED, UNSCALED_WEIGHT = Bias(), RowScale(), WeightScale()


class Tables(NamedTuple):
    """Where the grouped GEMMs find the rows of each expert, ``struct Tables`` of ``route.cu``."""

    pointers: int = 0
    base: tuple[int, ...] = (0, 0, 0, 0)
    pitch: tuple[int, ...] = (0, 0, 0, 0)


class Maps(NamedTuple):
    """Addresses of what routing writes."""

    expert_offsets: int
    expert_counts: int
    dst2src: int
    src2dst: int
    row_experts: int
    spans: int = 0  # (E, 2) int32, first row and count, for kernels that start while routing runs


def packed_rows(rows: int, experts: int) -> int:
    """Rows that ``rows`` rows of ``experts`` experts take in the form `PACKED`, in whole groups."""
    return (rows // GROUP_ROWS + experts + 1) * GROUP_ROWS


def requantize(
    device: int, mode: str, x: Matrix, rows: int, spans: int, experts: int, out: Matrix, *, partials: int,
    scale_out: int,
) -> Launch:
    """``requantize`` of ``x``, `PACKED`; what it holds afterwards is not known."""
    # A group is divided as a row is, by pieces of four columns of four rows instead of vectors.
    grid, held = grids.stretches(x.pitch * VECTOR), 0
    if mode == "TOKEN":
        grid, held = grid._replace(stretches=1), x.pitch * GROUP_ROWS * x.itemsize
    return Launch(
        compiler.kernel("requantize.cu", "requantize", device, MODE=mode),
        (packed_rows(rows, experts) // GROUP_ROWS, grid.stretches), grid.threads, shared_bytes=held, x=x.pointer,
        cols=x.pitch, spans=spans, experts=experts, partials=partials, out=out.pointer, out_pitch=out.pitch,
        scale_out=scale_out,
    )


def activation_quantize(
    device: int, mode: str, activation: str, gated: bool, x: Matrix, rows: int, cols: int, up_column: int, out: Matrix,
    out_cols: int, *, x_scale: RowScale = UNSCALED, unit: float = 1.0, w_scale: WeightScale = UNSCALED_WEIGHT,
    bias: Bias = NO_BIAS, row_experts: int = 0, scale: RowScale = UNSCALED, partials: int = 0, scale_out: int = 0,
) -> list[Launch]:
    """``activation_quantize``, in mode TENSOR behind ``amax_rows``: ``cols`` gates (ups from ``up_column``)."""
    aligned = x.aligned(cols) and (not gated or x.aligned(up_column)) and _columns_aligned(cols, w_scale, bias)
    grid, shared = grids.stretches(out_cols, per_thread=2 if rows >= grids.MANY_ROWS else 1), 0
    if mode == "TOKEN":
        # Few rows: as many threads to each as registers allow. Otherwise blocks that leave a multiprocessor to two.
        # Where the input is as light as TWO_ROWS of activation.cu asks for.
        more = rows <= compiler.multiprocessors(device) and aligned and x.itemsize == 2 and bias.dtype == NO_BIAS.dtype
        grid = grids.whole_rows(out_cols, grids.MORE_ROW_THREADS if more else grids.MAX_ROW_THREADS, several=False)
        shared = grids.in_shared(grid)

    def kernel(name: str) -> Kernel:
        return compiler.kernel(
            "activation.cu", name, device, In=compiler.CUDA_TYPES[x.dtype],
            Bias=compiler.CUDA_TYPES.get(bias.dtype, "None"), MODE=mode, ACT=activation.upper(),
            VECS=grid.per_thread, IN_SHARED=shared, ROW_THREADS=grids.bound(grid.threads), IN_ALIGNED=aligned,
            OUT_ALIGNED=out.aligned(out_cols), PER_CHANNEL=w_scale.per_channel,
        )

    source = {
        "x": x.pointer, "x_pitch": x.pitch, "up_column": up_column, "row_experts": row_experts,
        "x_scale": x_scale.pointer, "x_scale_row_stride": x_scale.row_stride,
        "x_scale_expert_stride": x_scale.expert_stride, "unit": x_scale.times(unit), "w_scale": w_scale.pointer,
        "w_scale_stride": w_scale.stride, "w_scale_up": w_scale.up_offset, "bias": bias.pointer, "cols": cols,
    }
    amax = [] if mode != "TENSOR" else [
        Launch(kernel("amax_rows"), (PARTIALS, 1), SCAN_THREADS, source=source, rows=rows, partials=partials)
    ]
    return [*amax, Launch(
        kernel("activation_quantize"), (rows, grid.stretches), grid.threads,
        shared_bytes=shared * grid.threads * VECTOR * 4, source=source, partials=partials, scale_in=scale.pointer,
        scale_value=scale.value, scale_expert_stride=scale.expert_stride, out_cols=out_cols, out=out.pointer,
        out_pitch=out.pitch, scale_out=scale_out,
    )]


def combine(
    device: int, x: Matrix, rows: int, tokens: int, topk: int, cols: int, out: Matrix, *, x_scale: RowScale = UNSCALED,
    unit: float = 1.0, w_scale: WeightScale = UNSCALED_WEIGHT, bias: Bias = NO_BIAS, src2dst: int = 0,
    row_experts: int = 0, topk_weights: int = 0, skip_padding: bool = False,
) -> Launch:
    """``combine``; ``src2dst`` of 0 takes row ``t`` for token ``t``, ``topk_weights`` of 0 weighs each row by 1."""
    # All tokens of a stretch run one after another: the scales of its columns stay in the L1 cache.
    grid = grids.stretches(cols, grids.NARROW_THREADS if w_scale.per_channel else grids.STRETCH_THREADS)
    # With scales or bias for each column a slot takes more registers, and with many tokens more blocks are worth more.
    most, of_block = 16 // x.itemsize, 1
    if tokens >= grids.MANY_ROWS:
        most = 2 if w_scale.per_channel or bias.pointer else most
        of_block = max(COMBINED_PAIRS // topk, 1)
    kernel = compiler.kernel(
        "combine.cu", "combine", device, In=compiler.CUDA_TYPES[x.dtype], Out=compiler.CUDA_TYPES[out.dtype],
        Bias=compiler.CUDA_TYPES.get(bias.dtype, "None"), TOPK=topk, TOKENS=of_block,
        IN_ALIGNED=x.aligned(cols) and _columns_aligned(cols, w_scale, bias), OUT_ALIGNED=out.aligned(cols),
        PER_CHANNEL=w_scale.per_channel, MOST=most,
    )
    return Launch(
        kernel, (-(-tokens // of_block), grid.stretches), grid.threads, x=x.pointer, x_pitch=x.pitch, rows=rows,
        tokens=tokens, src2dst_map=src2dst, row_experts=row_experts, topk_weights=topk_weights,
        x_scale=x_scale.pointer, x_scale_row_stride=x_scale.row_stride, x_scale_expert_stride=x_scale.expert_stride,
        x_scale_value=x_scale.value, unit=unit, w_scale=w_scale.pointer, w_scale_stride=w_scale.stride,
        bias=bias.pointer, skip_padding=skip_padding, cols=cols, out=out.pointer, out_pitch=out.pitch,
    )


def shuffle_rows(
    device: int, x: int, pitch_bytes: int, tokens: int, dst2src: int, rows: int, row_bytes: int, out: int
) -> Launch:
    """``shuffle_rows`` in the widest words that the rows and addresses allow."""
    types = {16: "uint4", 8: "u64", 4: "u32", 2: "u16", 1: "u8"}
    size = next(n for n in types if not (x % n or out % n or row_bytes % n or pitch_bytes % n))
    words = row_bytes // size
    grid, row_threads, stripes = grids.words(tokens, rows, words)
    return Launch(
        compiler.kernel("shuffle.cu", "shuffle_rows", device, Word=types[size]), grid, STRETCH_THREADS, x=x,
        x_pitch=pitch_bytes // size, dst2src_map=dst2src, tokens=tokens, rows=rows, words=words,
        row_threads=row_threads, stripes=stripes, out=out,
    )


def topk_softmax(
    device: int, gating: Matrix, tokens: int, experts: int, topk: int, renormalize: bool, weights: int, ids: int
) -> Launch:
    """``topk_softmax``, four tokens per block."""
    kernel = compiler.kernel(
        "topk_softmax.cu", "topk_softmax", device, In=compiler.CUDA_TYPES[gating.dtype], VALUES=-(-experts // 32)
    )
    return Launch(
        kernel, (-(-tokens // 4), 1), 128, gating=gating.pointer, gating_pitch=gating.pitch, tokens=tokens,
        experts=experts, topk=topk, renormalize=renormalize, topk_weights=weights, topk_ids=ids,
    )


def _columns_aligned(cols: int, w_scale: WeightScale, bias: Bias) -> bool:
    """Whether per-channel scales and bias allow vectors of eight columns wherever they are used."""
    scales = not w_scale.per_channel or not (w_scale.pointer % 16 or w_scale.stride % 4 or w_scale.up_offset % 4)
    return scales and not (bias.pointer % 16) and cols % VECTOR == 0
