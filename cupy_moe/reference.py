# SPDX-License-Identifier: Apache-2.0
"""The specification of the layer: `fused_experts` as a line of steps, each with the public signature.

Written over the namespace of its arrays, so NumPy runs it anywhere and CuPy runs the same text on a GPU. It
is meant to be read and tested against, not to be fast. Everything is float32; the only rounding between the
steps is e4m3. Arguments are taken as valid: the public functions of the same names check them.
"""

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from cupy_moe import e4m3
from cupy_moe.activations import activate
from cupy_moe.e4m3 import Array, array_namespace
from cupy_moe.reference_scales import as_scale, dynamic_scale, per_row, rescale
from cupy_moe.routing import Routing


@np.errstate(all="ignore")
def fused_experts(
    hidden_states: Array,
    w1: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    *,
    w1_scale: Array,
    w2_scale: Array,
    a1_scale: Any = None,
    a2_scale: Any = None,
    per_act_token: bool = False,
    activation: str = "silu",
    w1_bias: Array | None = None,
    w2_bias: Array | None = None,
    expert_map: Array | None = None,
    apply_router_weight_on_input: bool = False,
    out: Array | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
) -> Array:
    """Run the whole layer: (M, K) -> (M, K).

    `backend` and `validate` are the public function's business and change nothing here. `batch_invariant` makes the
    sums of the products exact before they are rounded: no other token can change their order then.
    """
    out_dtype = _result_dtype(out_dtype, out, hidden_states)
    weights_in, weights_out = (topk_weights, None) if apply_router_weight_on_input else (None, topk_weights)

    routing = route(topk_ids, len(w1), expert_map=expert_map)
    experts = routing.row_experts
    q1, q1_scale = _quantize_shuffle(hidden_states, routing, weights_in, a1_scale, per_act_token)
    product1 = _grouped_product(q1, w1, routing.expert_offsets, exact=batch_invariant)
    q2, q2_scale = activation_quantize(
        product1, activation, scale=a2_scale, per_token=per_act_token,
        x_scale=q1_scale, w_scale=w1_scale, bias=w1_bias, row_experts=experts,
    )
    product2 = _grouped_product(q2, w2, routing.expert_offsets, exact=batch_invariant)
    result = combine(
        product2, routing.src2dst_map, topk_weights=weights_out,
        x_scale=q2_scale, w_scale=w2_scale, bias=w2_bias, row_experts=experts, out_dtype=out_dtype,
    )
    return _deliver(result, out)


@np.errstate(all="ignore")
def batched(
    hidden_states: Array,
    expert_num_tokens: Array,
    w1: Array,
    w2: Array,
    *,
    a1_scale: Any = None,
    out: Array | None = None,
    out_dtype: Any = None,
    **options: Any,
) -> Array:
    """Run the layer, unweighted, on tokens sorted by a dispatcher: (E, max_tokens, K) -> the same shape.

    Only the first ``expert_num_tokens[e]`` tokens of expert ``e`` count; the others are zero in the result.
    Options are those of `fused_experts`, except `expert_map` and `apply_router_weight_on_input`; `a1_scale`
    of fp8 input may be (E, max_tokens, 1).
    """
    xp = array_namespace(hidden_states)
    experts, max_tokens, hidden = hidden_states.shape
    slots = xp.arange(max_tokens)[None, :]
    ids = xp.where(slots < expert_num_tokens[:, None], xp.arange(experts)[:, None], -1).reshape(-1, 1)
    # Padding is cleared first: whatever it holds must not count in a dynamic per-tensor scale.
    tokens = hidden_states.reshape(experts * max_tokens, hidden)
    tokens = shuffle_rows(tokens, xp.where(ids[:, 0] >= 0, xp.arange(len(tokens)), -1))
    if np.ndim(a1_scale) > 1:
        a1_scale = a1_scale.reshape(-1, 1)
    ones = xp.ones(ids.shape, np.float32)
    out_dtype = _result_dtype(out_dtype, out, hidden_states)
    result = fused_experts(tokens, w1, w2, ones, ids, a1_scale=a1_scale, out_dtype=out_dtype, **options)
    return _deliver(result.reshape(hidden_states.shape), out)


def route(topk_ids: Array, num_experts: int, *, expert_map: Array | None = None) -> Routing:
    """Sort the (token, slot) pairs of (M, topk) ids by (expert, token, slot); dropped ids come last."""
    xp = array_namespace(topk_ids)
    topk = topk_ids.shape[1]
    local = topk_ids.reshape(-1)
    if expert_map is not None:
        local = _rows_or_fill(expert_map, local, fill=-1)
    local = xp.where((local >= 0) & (local < num_experts), local, num_experts)

    order = xp.argsort(local, kind="stable")
    offsets = xp.searchsorted(local[order], xp.arange(num_experts + 1), side="left").astype(np.int32)
    rows = xp.arange(len(order), dtype=np.int32)
    in_use = rows < offsets[-1]
    src2dst_map = xp.empty_like(rows)
    src2dst_map[order] = xp.where(in_use, rows, -1)
    return Routing(
        expert_offsets=offsets,
        expert_counts=xp.diff(offsets),
        dst2src_map=xp.where(in_use, order // topk, -1).astype(np.int32),
        src2dst_map=src2dst_map.reshape(topk_ids.shape),
        row_experts=xp.where(in_use, local[order], -1).astype(np.int32),
    )


def shuffle_rows(x: Array, dst2src_map: Array, *, out: Array | None = None) -> Array:
    """Gather the rows of (M, C), any dtype -> (rows, C); zeros where the map is negative or at least M."""
    xp = array_namespace(x)
    as_bytes = xp.ascontiguousarray(x).view(np.uint8)  # moved as bytes: NaNs keep their bits
    return _deliver(_rows_or_fill(as_bytes, dst2src_map, fill=0).view(x.dtype), out)


def gather_scales(scales: Array, dst2src_map: Array) -> Array:
    """Gather per-token scales, (M, 1) or (M,) -> (rows, 1) float32; zeros where `shuffle_rows` has zeros."""
    return shuffle_rows(scales.reshape(-1, 1).astype(np.float32), dst2src_map)


@np.errstate(all="ignore")
def quantize_fp8(x: Array, scale: Any = None, *, per_token: bool = False) -> tuple[Array, Array]:
    """Quantise (M, K) to fp8 by a scale (1,) or (M, 1), or a dynamic one: per token (M, 1), else (1,)."""
    xp = array_namespace(x)
    x = x.astype(np.float32, copy=False)
    scale = dynamic_scale(x, per_token) if scale is None else as_scale(scale, xp)
    return e4m3.as_fp8(e4m3.encode(x / scale)), scale


@np.errstate(all="ignore")
def activation_quantize(
    x: Array,
    activation: str = "silu",
    *,
    scale: Any = None,
    per_token: bool = False,
    x_scale: Any = None,
    w_scale: Array | None = None,
    bias: Array | None = None,
    row_experts: Array | None = None,
) -> tuple[Array, Array]:
    """Activate and quantise ``x * (x_scale * w_scale) + bias``: (rows, 2N), or N if not gated -> (rows, N).

    `scale` is static per tensor (1,) or per expert (E,), or None: dynamic per tensor (1,) or per token
    (rows, 1). Rows whose expert is -1 count for no maximum and become zero codes.
    """
    xp = array_namespace(x)
    valid = xp.ones((len(x), 1), dtype=bool) if row_experts is None else row_experts[:, None] >= 0
    y = activate(activation, rescale(x, x_scale, w_scale, bias, row_experts))
    y = xp.where(valid, y, 0)
    scale = dynamic_scale(y, per_token) if scale is None else as_scale(scale, xp)
    return e4m3.as_fp8(e4m3.encode(y / per_row(scale, row_experts))), scale


@np.errstate(all="ignore")
def grouped_gemm_fp8(
    a: Array,
    b: Array,
    expert_offsets: Array,
    *,
    a_scale: Any = None,
    b_scale: Array | None = None,
    bias: Array | None = None,
    out_dtype: Any = "bfloat16",
    backend: str | None = None,
) -> Array:
    """Multiply the rows of each expert, a (rows, K) fp8, by its weights, b (E, n, K) fp8 -> (rows, n).

    Products accumulate in float32; then ``* (a_scale * b_scale) + bias``. Rows of no expert are zero.
    """
    xp = array_namespace(a)
    product = _grouped_product(a, b, expert_offsets)
    row_experts = xp.searchsorted(expert_offsets, xp.arange(len(a), dtype=np.int32), side="right") - 1
    in_use = (row_experts >= 0) & (row_experts < len(b))
    row_experts = xp.where(in_use, row_experts, -1)
    result = xp.where(in_use[:, None], rescale(product, a_scale, b_scale, bias, row_experts), 0)
    return result.astype(_dtype(out_dtype))


@np.errstate(all="ignore")
def combine(
    x: Array,
    src2dst_map: Array,
    *,
    topk_weights: Array | None = None,
    x_scale: Any = None,
    w_scale: Array | None = None,
    bias: Array | None = None,
    row_experts: Array | None = None,
    out_dtype: Any = None,
) -> Array:
    """Sum over slots, in slot order, of weight * (x * (x_scale * w_scale) + bias): (rows, K) -> (M, K).

    The row of a (token, slot) is in `src2dst_map`; a slot without one, or with one of no expert, adds nothing.
    `topk_weights` None: weights of 1. `out_dtype` None: that of `x`.
    """
    xp = array_namespace(x)
    rows = rescale(x, x_scale, w_scale, bias, row_experts)
    if row_experts is not None:
        rows = xp.where((row_experts >= 0)[:, None], rows, 0)
    weights = xp.where(src2dst_map >= 0, 1 if topk_weights is None else topk_weights, 0).astype(np.float32)
    result = xp.zeros((len(src2dst_map), x.shape[1]), np.float32)
    for slot in range(src2dst_map.shape[1]):
        result += weights[:, slot, None] * _rows_or_fill(rows, src2dst_map[:, slot], fill=0)
    return result.astype(x.dtype if out_dtype is None else _dtype(out_dtype))


@np.errstate(all="ignore")
def topk_softmax(gating: Array, topk: int, *, renormalize: bool = False) -> tuple[Array, Array]:
    """Choose the `topk` largest logits of (M, E), ties to the lowest id -> softmax weights and ids.

    Logits are clamped to the finite range and NaN counts as the smallest, so every weight is finite.
    """
    xp = array_namespace(gating)
    largest = float(np.finfo(np.float32).max)
    logits = gating.astype(np.float32)
    logits = xp.where(xp.isnan(logits), -largest, xp.minimum(xp.maximum(logits, -largest), largest))
    powers = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
    probabilities = powers / xp.sum(powers, axis=1, keepdims=True)
    ids = xp.argsort(-logits, axis=1, kind="stable")[:, :topk]
    weights = xp.take_along_axis(probabilities, ids, axis=1)
    if renormalize:
        weights = weights / xp.sum(weights, axis=1, keepdims=True)
    return weights, ids.astype(np.int32)


# ---- parts of the steps ------------------------------------------------------------------------------------


def _quantize_shuffle(
    hidden_states: Array, routing: Routing, topk_weights: Array | None, a1_scale: Any, per_token: bool
) -> tuple[Array, Array]:
    """Step 2: fp8 rows in expert order, and their scales as (1,), (E,) or (rows, 1)."""
    xp = array_namespace(hidden_states)
    source = routing.dst2src_map
    if e4m3.is_fp8(hidden_states):
        scale = as_scale(a1_scale, xp)
        scale = scale if scale.size == 1 else gather_scales(scale, source)
        if topk_weights is not None:  # the codes are fixed, so the weight goes into the scale
            scale = scale.reshape(-1, 1) * _row_weights(topk_weights, routing)
        return shuffle_rows(hidden_states, source), scale

    scale = None if a1_scale is None else as_scale(a1_scale, xp)
    if topk_weights is None and scale is None:
        q, scale = quantize_fp8(hidden_states, per_token=per_token)
        return shuffle_rows(q, source), gather_scales(scale, source) if per_token else scale

    rows = shuffle_rows(hidden_states, source).astype(np.float32)
    if topk_weights is not None:
        rows = rows * _row_weights(topk_weights, routing)
    if scale is None:
        return quantize_fp8(rows, per_token=per_token)
    q, _ = quantize_fp8(rows, per_row(scale, routing.row_experts))
    return q, scale


def _row_weights(topk_weights: Array, routing: Routing) -> Array:
    """Router weights (M, topk) in the order of the sorted rows, (rows, 1); zero for dropped ids."""
    xp = array_namespace(topk_weights)
    weights = xp.zeros(topk_weights.size + 1, np.float32)
    weights[routing.src2dst_map.reshape(-1)] = topk_weights.reshape(-1)  # dropped ids: -1, the extra element
    return weights[:-1, None]


def _grouped_product(a: Array, b: Array, expert_offsets: Array, *, exact: bool = False) -> Array:
    """Each expert's rows times its weights, float32; rows of no expert are zero. `exact`: rounded once."""
    xp = array_namespace(a)
    product = xp.zeros((a.shape[0], b.shape[1]), np.float32)
    for expert, (first, last) in enumerate(pairwise(expert_offsets.tolist())):
        if first < last:
            multiply = e4m3.exact_matmul if exact else xp.matmul
            product[first:last] = multiply(e4m3.decode(a[first:last]), e4m3.decode(b[expert]).T)
    return product


def _rows_or_fill(x: Array, index: Array, fill: int) -> Array:
    """Return x[index], with `fill` wherever the index is outside the array."""
    xp = array_namespace(x)
    padded = xp.concatenate([x, xp.full((1, *x.shape[1:]), fill, x.dtype)])
    return padded[xp.where((index >= 0) & (index < len(x)), index, len(x))]


def _result_dtype(out_dtype: Any, out: Array | None, hidden_states: Array) -> Any:
    """Take the type asked for, else that of `out`, else that of the input (bfloat16 if that is fp8)."""
    if out_dtype is None and out is not None:
        return out.dtype
    if out_dtype is None:
        return "bfloat16" if e4m3.is_fp8(hidden_states) else hidden_states.dtype
    return out_dtype


def _dtype(name: Any) -> Any:
    return np.dtype(ml_dtypes.bfloat16) if str(name) == "bfloat16" else np.dtype(name)


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
