# SPDX-License-Identifier: Apache-2.0
"""One call of the layer on the GPU, from routing to the weighted sum.

`Layer` holds what does not depend on the tokens. `Plan` holds the launches for one shape of call, in the order in which
the data goes through them; running it changes a few addresses and enqueues them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupy_moe import dispatch, gemms, grids, launches, replay, tuning
from cupy_moe.buffers import Buffers
from cupy_moe.checks import FP8
from cupy_moe.cublaslt import ALIGNMENT
from cupy_moe.driver import Launch, Step
from cupy_moe.launches import NO_BIAS, Bias, Matrix, RowScale, WeightScale
from cupy_moe.replay import Replay
from cupy_moe.spec import LayerSpec, Operand, Scale
from cupy_moe.workspace import Workspace, dedicated

CALLS_BEFORE_REPLAY = 2
"""Calls of a plan that launch kernel by kernel; making a CUDA graph pays for plans that are used again."""
MOST_EXPERTS = 2048
"""The schedule of the GEMMs and the counts of routing are in shared memory, also where a block has 99 KiB of it."""
OVERLAP = True
"""Whether kernels start while the one in front still runs; off where each is to be seen by itself."""


class CallShape(NamedTuple):
    """Everything about a call that its launches depend on, addresses apart."""

    tokens: int  # M; E * max_tokens in the padded form
    topk: int
    max_tokens: int  # 0, or that of the padded form
    hidden: Matrix  # with the address modulo 16 for an address, as in `out`
    out: Matrix
    id_dtype: str
    hidden_scale_stride: int  # of fp8 hidden states: 0 for one scale, 1 for one per token

    @property
    def rows(self) -> int:
        """(token, slot) pairs."""
        return self.tokens * self.topk


class Addresses(NamedTuple):
    """What changes from call to call."""

    hidden: int
    ids: int  # topk_ids, or expert_num_tokens in the padded form
    topk_weights: int
    hidden_scale: RowScale  # of fp8 hidden states
    out: int


class Layer:
    """A layer on one device: weights as the GEMMs want them, scales, tables and the GEMMs of a backend."""

    def __init__(self, spec: LayerSpec, backend: str) -> None:
        if spec.num_experts > MOST_EXPERTS:
            raise ValueError(f"w1: expected at most {MOST_EXPERTS} experts on a GPU; got {spec.num_experts}")
        import cupy

        tuning.CACHE.load()
        self.spec = spec.without_arrays()
        self.device = spec.device
        halves = 2 if spec.gated else 1
        self.hidden = grids.up(spec.hidden_size, ALIGNMENT)
        self.intermediate = grids.up(spec.intermediate_size, ALIGNMENT)
        self.product = halves * self.intermediate  # columns of GEMM 1
        # Weights whose sizes the GEMM cannot take are copied, padded with zeros, once; others are used in place.
        self.copies: list[Any] = []
        w1 = self._weights(spec.w1, halves, self.intermediate, self.hidden)
        w2 = self._weights(spec.w2, 1, self.hidden, self.intermediate)
        self.w1_scale = WeightScale.of(
            spec.w1_scale.info, halves * spec.intermediate_size, spec.intermediate_size if spec.gated else 0
        )
        self.w2_scale = WeightScale.of(spec.w2_scale.info, spec.hidden_size, 0)
        self.a1_scale = row_scale(spec.a1_scale) if spec.a1_scale is not None else None
        self.a2_scale = row_scale(spec.a2_scale) if spec.a2_scale is not None else None
        self.w1_bias, self.w2_bias = _bias(spec.w1_bias), _bias(spec.w2_bias)

        # Prepared launches hold these addresses: the tables live as long as the layer and never move.
        experts = spec.num_experts
        self.expert_offsets = dedicated((experts + 1,), np.int32)
        self.expert_counts = dedicated((experts,), np.int32)
        self.spans = dedicated((experts, 2), np.int32)
        self.partials = dedicated((2, launches.PARTIALS), np.float32)
        self.tensor_scales = dedicated((2,), np.float32)
        # It keeps no reference to the layer: memory in a cycle would be given back at any time, even during a capture.
        self.gemms: gemms.Gemms = gemms.BACKENDS[backend](self, w1, w2)
        cupy.cuda.get_current_stream().synchronize()  # calls may come on other streams

    def _weights(self, operand: Operand, halves: int, rows: int, cols: int) -> int:
        """Address of the weights (E, halves * r, c) as codes (E, halves * rows, cols), zeros in what is new."""
        experts, old_rows, old_cols = operand.info.shape
        if (old_rows, old_cols) == (halves * rows, cols) and operand.info.pointer % ALIGNMENT == 0:
            return operand.info.pointer
        codes = self.spec.library.to_numeric(operand.array).view(np.uint8)
        padded = dedicated((experts, halves, rows, cols), np.uint8)
        padded[:, :, : old_rows // halves, :old_cols] = codes.reshape(experts, halves, -1, old_cols)
        self.copies.append(padded)
        return int(padded.data.ptr)

    def tune(self, tokens: int, topk: int, workspace: Workspace) -> dict[str, tuning.Record]:
        """Find the fastest algorithms of both GEMMs for uniform routing and random codes, on the current stream.

        The experts of a map are equally likely; the first ones are taken for those held here.
        """
        rows, experts = tokens * topk, self.spec.num_experts
        nbytes = Buffers(self, rows, comparable=True).nbytes
        buffers = Buffers(self, rows, workspace.reserve(nbytes, self.device), comparable=True)
        counts = tuning.uniform_counts(tokens, topk, self.spec.experts_routed_to)[:experts]
        counts[0] += not counts.any()
        first, total = np.cumsum(counts, dtype=np.int64) - counts, int(counts.sum())
        self.expert_counts.set(counts)
        self.spans.set(np.stack([first, counts], axis=1).astype(np.int32))
        return self.gemms.tune(self, rows, buffers, total)


class Plan:
    """The launches of one shape of call."""

    def __init__(self, layer: Layer, shape: CallShape, workspace: Workspace) -> None:
        self.layer, self.shape = layer, shape
        self.buffers = Buffers(layer, shape.rows, workspace.reserve(Buffers(layer, shape.rows).nbytes, layer.device))
        self.generation, self.tuned = workspace.generation, tuning.CACHE.generation
        self.ready = shape.hidden.dtype in FP8

        front, x_scale = self._front()
        first, a_scale = layer.gemms.first(layer, shape, self.buffers, x_scale)
        second = layer.gemms.second(layer, shape, self.buffers)
        combine = self._combine(a_scale)
        self.steps: list[Step] = [*front, *first, *second, combine]

        # What changes from call to call: the stored arguments themselves.
        ids = "expert_num_tokens" if shape.max_tokens else "ids"
        weighting = front if layer.spec.apply_router_weight_on_input else [combine]
        self._hidden = _arguments("x", front)
        self._ids = _arguments(ids, front)
        self._topk_weights = _arguments("topk_weights", weighting)
        self._scale = [*_arguments("scale_in", front), *_arguments("scale_value", front)] if self.ready else []
        self._out = combine.argument("out")
        self._changing = [launch for launch in front if {"x", ids} & launch.kernel.parameters.keys()] + [combine]
        self._at: Addresses | None = None
        self._calls = 0
        self._moved = False  # since the replay took the addresses over
        self._replay: Replay | None = None
        for step in self.steps:
            if OVERLAP and isinstance(step, Launch):
                step.overlapping()

    def __call__(self, stream: int, at: Addresses, *, capturing: bool) -> None:
        """Enqueue the call on ``stream``; ``capturing``: it is being captured into a CUDA graph."""
        if at != self._at:
            self._set(at)
        self._calls += 1
        if capturing or self._calls <= CALLS_BEFORE_REPLAY or not replay.available():
            for step in self.steps:
                step(stream)
            return
        if self._replay is None:
            self._replay = Replay(self.steps, self._changing)
        elif self._moved:
            self._replay.update()
        self._moved = False
        self._replay(stream)

    def _set(self, at: Addresses) -> None:
        self._at = None  # if this is interrupted, the next call does it again
        for argument in self._hidden:
            argument.value = at.hidden
        for argument in self._ids:
            argument.value = at.ids
        for argument in self._topk_weights:
            argument.value = at.topk_weights
        if self._scale:
            self._scale[0].value, self._scale[1].value = at.hidden_scale.pointer, at.hidden_scale.value
        self._out.value = at.out
        self._at = at
        self._moved = True

    def _front(self) -> tuple[list[Launch], RowScale]:
        """The launches in front of GEMM 1, and where the scales of the rows are then."""
        layer, shape, buffers = self.layer, self.shape, self.buffers
        spec = layer.spec
        partials, tensor_scale = layer.partials[0].data.ptr, layer.tensor_scales.data.ptr
        if self.ready:
            mode, given = "STATIC", RowScale(row_stride=shape.hidden_scale_stride)
            scale_out, result = buffers.x_scales, RowScale(buffers.x_scales, row_stride=1)
        else:
            mode, given, scale_out, result = gemms.scaling(
                layer.a1_scale, spec.per_act_token, buffers.x_scales, tensor_scale
            )
        route, rows = self._routing()
        return [*route, *dispatch.quantize(
            layer.device, mode, shape.hidden, shape.tokens, spec.hidden_size, buffers.x, layer.hidden, **rows,
            weighted=spec.apply_router_weight_on_input, scale=given, partials=partials,
            valid_only=bool(shape.max_tokens), scale_out=scale_out,
        )], result

    def _routing(self) -> tuple[list[Launch], dict[str, Any]]:
        """The launches that are routing by themselves, and what `dispatch.quantize` is told of the rows."""
        layer, shape, buffers = self.layer, self.shape, self.buffers
        maps, experts = buffers.maps, layer.spec.num_experts
        tables = layer.gemms.tables(buffers)
        if shape.max_tokens:
            route = dispatch.route_padded(layer.device, 0, shape.id_dtype, experts, shape.max_tokens, maps, tables)
            return [route], {"topk": 1, "src2dst": maps.src2dst, "row_experts": maps.row_experts}
        expert_map = layer.spec.expert_map
        return [], {"routing": dispatch.Pairs(
            0, shape.id_dtype, shape.topk, experts, maps, expert_map=expert_map.info.pointer if expert_map else 0,
            map_size=expert_map.info.shape[0] if expert_map else 0, tables=tables, scratch=buffers.scratch,
        )}

    def _combine(self, a_scale: RowScale) -> Launch:
        layer, shape, maps = self.layer, self.shape, self.buffers.maps
        return launches.combine(
            layer.device, self.buffers.y, shape.rows, shape.tokens, shape.topk, layer.spec.hidden_size, shape.out,
            x_scale=a_scale, unit=layer.gemms.unit, w_scale=layer.w2_scale, bias=layer.w2_bias, src2dst=maps.src2dst,
            row_experts=maps.row_experts, skip_padding=bool(shape.max_tokens),
        )


def _arguments(name: str, of: list[Launch]) -> list[Any]:
    """The stored arguments called ``name``, of the launches that have one."""
    return [launch.argument(name) for launch in of if name in launch.kernel.parameters]


def row_scale(scale: Scale | None) -> RowScale:
    """A scale of activations as the kernels take it."""
    if not isinstance(scale, Operand):
        return RowScale(value=1.0 if scale is None else scale)
    return RowScale.of(scale.info)


def _bias(bias: Operand | None) -> Bias:
    return Bias(bias.info.pointer, bias.info.dtype) if bias else NO_BIAS
