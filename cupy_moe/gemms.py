# SPDX-License-Identifier: Apache-2.0
"""The middle of a call, by backend: both grouped GEMMs, and what lies between them.

Each class takes a layer's codes ``x`` (rows, K) to GEMM 2's codes ``a`` (rows, N) in `first`, and those to the product
``y`` (rows, K) in `second`. What GEMM 1 leaves for the next kernel is the buffer ``inner``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cupy_moe import backend, dispatch, e4m3, launches, mma, sm90, tuning
from cupy_moe.buffers import Buffers, as_array
from cupy_moe.driver import Step
from cupy_moe.grouped_gemm import GroupedGemm
from cupy_moe.launches import UNSCALED, Matrix, RowScale, Tables
from cupy_moe.tiles import End, Groups, expected_rows
from cupy_moe.tuning import Record
from cupy_moe.workspace import dedicated

if TYPE_CHECKING:
    from cupy_moe.pipeline import CallShape, Layer

FINE_ELEMENTS = 1 << 20
"""Up to this many elements, 4 MB, GEMM 1's product costs nothing worth saving."""
PACKED_ROWS = {"tensor": 32, "token": 192}
"""Rows per expert, by scheme, from which on what GEMM 1 leaves is packed: groups of rows are filled up."""
SHORT_COLUMNS = 4096
"""Columns of ``w2`` whose products the tensor cores may add up on their own, in sums shorter than float32.

The relative error of a product is some 5e-4 with 1024 of them and 1.3e-3 with 4096. That of ``w1`` could not have it:
its values are encoded, and what they deviate by becomes other codes here and there, which is more.
"""


def packs(rows: int, experts: int, columns: int, *, per_token: bool) -> bool:
    """Whether it pays to pack what GEMM 1 leaves of ``rows`` rows. Wide ones with a scale each would be read twice."""
    if per_token and columns > launches.MOST_HELD_COLUMNS:
        return False
    return rows >= PACKED_ROWS["token" if per_token else "tensor"] * experts


def scaling(
    static: RowScale | None, per_token: bool, row_scales: int, tensor_scale: int
) -> tuple[str, RowScale, int, RowScale]:
    """The kernel's mode, the scale given, where a scale made goes, and where the next kernel finds the rows' scales."""
    if static is not None:
        return "STATIC", static, 0, static
    if per_token:
        return "TOKEN", UNSCALED, row_scales, RowScale(row_scales, row_stride=1)
    return "TENSOR", UNSCALED, tensor_scale, RowScale(tensor_scale)


def a_scaling(layer: Layer, buffers: Buffers) -> tuple[str, RowScale, int, RowScale]:
    """`scaling` of the codes ``a``."""
    tensor_scale = layer.tensor_scales.data.ptr + layer.tensor_scales.itemsize
    return scaling(layer.a2_scale, layer.spec.per_act_token, buffers.a_scales, tensor_scale)


class CublasltGemms:
    """GEMM 1 of cuBLASLt, a kernel for activation and quantisation, GEMM 2 of cuBLASLt."""

    def __init__(self, layer: Layer, w1: int, w2: int) -> None:
        context = backend.cublaslt_context(layer.device)
        counts, experts, routed_to = layer.expert_counts.data.ptr, layer.spec.num_experts, layer.spec.experts_routed_to
        self._gemm1 = GroupedGemm(context, w1, experts, layer.product, layer.hidden, counts, routed_to)
        self._gemm2 = GroupedGemm(context, w2, experts, layer.hidden, layer.intermediate, counts, routed_to)
        self.unit = self._gemm2.unit  # of y
        self._pointers = dedicated((4, experts), np.int64)  # of x, inner, a and y, where routing puts them

    def inner(self, layer: Layer, rows: int, comparable: bool) -> tuple[int, int, str]:
        """Rows, columns and dtype of GEMM 1's product."""
        # It is quantised again, which turns its rounding into flipped codes: small ones stay float32.
        columns = layer.product
        return rows, columns, "float32" if rows * columns <= FINE_ELEMENTS else "float16"

    def tables(self, buffers: Buffers) -> Tables:
        """Where routing is to write the address of each expert's rows."""
        operands = buffers.x, buffers.inner, buffers.a, buffers.y
        return Tables(
            self._pointers.data.ptr, tuple(matrix.pointer for matrix in operands),
            tuple(matrix.pitch * matrix.itemsize for matrix in operands),
        )

    def first(
        self, layer: Layer, shape: CallShape, buffers: Buffers, x_scale: RowScale
    ) -> tuple[list[Step], RowScale]:
        """The launches from ``x`` to ``a``, and the scale of ``a``."""
        spec, tables = layer.spec, self._pointers
        mode, given, scale_out, result = a_scaling(layer, buffers)
        gemm = self._gemm1.prepare(shape.rows, tables[0].data.ptr, tables[1].data.ptr, buffers.inner.dtype)
        return [gemm, *launches.activation_quantize(
            layer.device, mode, spec.activation, spec.gated, buffers.inner, shape.rows, spec.intermediate_size,
            layer.intermediate, buffers.a, layer.intermediate, x_scale=x_scale, unit=self._gemm1.unit,
            w_scale=layer.w1_scale, bias=layer.w1_bias, row_experts=buffers.maps.row_experts, scale=given,
            partials=layer.partials[1].data.ptr, scale_out=scale_out,
        )], result

    def second(self, layer: Layer, shape: CallShape, buffers: Buffers) -> list[Step]:
        """The launches from ``a`` to ``y``."""
        tables = self._pointers
        return [self._gemm2.prepare(shape.rows, tables[2].data.ptr, tables[3].data.ptr)]

    def tune(self, layer: Layer, rows: int, buffers: Buffers, total: int) -> dict[str, Record]:
        """Records of the fastest algorithms for ``rows`` rows, ``total`` of which the layer's tables name now."""
        tables, records = [table.data.ptr for table in self._pointers], {}
        first, of = layer.spans.get()[:, 0].astype(np.int64), self.tables(buffers)
        self._pointers.set(np.stack([base + first * pitch for base, pitch in zip(of.base, of.pitch, strict=True)]))
        for i, gemm, operand, result in (
            (0, self._gemm1, buffers.x, buffers.inner), (2, self._gemm2, buffers.a, buffers.y)
        ):
            tuning.fill_with_codes(as_array(operand, total))
            records.update(gemm.tune(rows, tables[i], tables[i + 1], as_array(result, total)))
        return records


class OwnGemms:
    """A kernel of our own: activation in the end of GEMM 1, and codes too where their scale is given."""

    kernel: ClassVar[ModuleType]  # what prepares it
    can_pack: ClassVar[bool]  # whether every tile has whole groups of rows

    def __init__(self, layer: Layer, w1: int, w2: int) -> None:
        spec = layer.spec
        self._claims = dedicated((2, 2), np.int32)
        common = {"batch_invariant": spec.batch_invariant, "routed_to": spec.experts_routed_to}
        self._w1 = self.kernel.Weights(
            w1, spec.num_experts, layer.product, layer.hidden, paired=spec.gated, **common
        )
        self._w2 = self.kernel.Weights(
            w2, spec.num_experts, layer.hidden, layer.intermediate, paired=False, short_columns=SHORT_COLUMNS, **common
        )
        self.unit = e4m3.half_unit(layer.intermediate)

    def inner(self, layer: Layer, rows: int, comparable: bool) -> tuple[int, int, str]:
        """Rows, columns and dtype of what GEMM 1 leaves, activated; none where it makes the codes."""
        if layer.a2_scale is not None:
            return 0, 0, "float32"
        columns, experts = layer.intermediate, layer.spec.num_experts
        as_numbers = comparable or layer.spec.batch_invariant  # packing depends on the number of rows
        expected = expected_rows(rows, experts, layer.spec.experts_routed_to)
        if self.can_pack and not as_numbers and packs(expected, experts, columns, per_token=layer.spec.per_act_token):
            return launches.packed_rows(rows, experts), columns, launches.PACKED
        return rows, columns, "float32"

    def tables(self, buffers: Buffers) -> Tables:
        """None: the kernel takes the rows of each expert from the spans."""
        return Tables()

    def _groups(self, buffers: Buffers, gemm: int) -> Groups:
        return Groups(buffers.maps.spans, self._claims[gemm].data.ptr)

    def _gemm1(self, layer: Layer, buffers: Buffers, x_scale: RowScale) -> tuple[Matrix, End]:
        """Where GEMM 1's result goes, and how it ends."""
        spec, static = layer.spec, layer.a2_scale
        kind = "CODES" if static else "PACKED" if buffers.inner.dtype == launches.PACKED else "ACTIVATED"
        return buffers.inner if static is None else buffers.a, End(
            kind, spec.activation, spec.intermediate_size, x_scale=x_scale,
            w_scale=layer.w1_scale, bias=layer.w1_bias, scale=static or UNSCALED,
            partials=0 if static or spec.per_act_token else layer.partials[1].data.ptr,
        )

    def first(
        self, layer: Layer, shape: CallShape, buffers: Buffers, x_scale: RowScale
    ) -> tuple[list[Step], RowScale]:
        """The launches from ``x`` to ``a``, and the scale of ``a``."""
        mode, _, scale_out, result = a_scaling(layer, buffers)
        out, end = self._gemm1(layer, buffers, x_scale)
        gemm = self.kernel.grouped_gemm(
            layer.device, self._w1, buffers.x, shape.rows, self._groups(buffers, 0), out, end
        )
        if mode == "STATIC":
            return [gemm], result
        if end.kind == "PACKED":
            return [gemm, launches.requantize(
                layer.device, mode, out, shape.rows, buffers.maps.spans, layer.spec.num_experts, buffers.a,
                partials=end.partials, scale_out=scale_out,
            )], result
        return [gemm, *dispatch.quantize(
            layer.device, mode, out, shape.rows, layer.spec.intermediate_size, buffers.a, layer.intermediate,
            row_experts=buffers.maps.row_experts, partials=end.partials, scale_out=scale_out, fresh=True,
        )], result

    def second(self, layer: Layer, shape: CallShape, buffers: Buffers) -> list[Step]:
        """The launches from ``a`` to ``y``."""
        return [self.kernel.grouped_gemm(
            layer.device, self._w2, buffers.a, shape.rows,
            self._groups(buffers, 1), buffers.y, End("PRODUCT", unit=self.unit),
        )]

    def tune(self, layer: Layer, rows: int, buffers: Buffers, total: int) -> dict[str, Record]:
        """Records of the fastest tiles for ``rows`` rows, ``total`` of which the layer's tables name now."""
        records = {}
        second = buffers.y, End("PRODUCT", unit=self.unit)
        products = ((self._w1, buffers.x, *self._gemm1(layer, buffers, UNSCALED)), (self._w2, buffers.a, *second))
        for i, (weights, operand, result, end) in enumerate(products):
            groups = self._groups(buffers, i)
            tuning.fill_with_codes(as_array(operand, total))
            candidates: list[tuple[Record, Step]] = []
            for tile in self.kernel.candidates(layer.device, weights, rows):
                launch = self.kernel.grouped_gemm(layer.device, weights, operand, rows, groups, result, end, tile)
                candidates.append((dict(tile._asdict()), launch))
            records[self.kernel.key(layer.device, weights, rows)] = tuning.fastest(candidates, as_array(result, total))
        return records


class Sm90Gemms(OwnGemms):
    """The kernel of ``gemm_sm90.cu``."""

    kernel: ClassVar[ModuleType] = sm90
    can_pack: ClassVar[bool] = True


class MmaGemms(OwnGemms):
    """The kernel of ``gemm_mma.cu``."""

    kernel: ClassVar[ModuleType] = mma
    can_pack: ClassVar[bool] = False


Gemms = CublasltGemms | OwnGemms
BACKENDS: dict[str, type[CublasltGemms] | type[OwnGemms]] = {
    "cublaslt": CublasltGemms, "sm90": Sm90Gemms, "mma": MmaGemms
}
