# SPDX-License-Identifier: Apache-2.0
"""The steps of the layer as functions of their own.

NumPy arrays and torch CPU tensors run the reference's twin of the same name; CuPy arrays and torch CUDA tensors run the
layer's kernels on the caller's current stream. Sizes: M tokens, K hidden, N intermediate, E experts, rows = M * topk.
"""

from __future__ import annotations

from typing import Any

from cupy_moe import arrays, checks, grouped_gemm, launches, reference
from cupy_moe import backend as backend_choice
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.checks import FLOATS, FP8, INDICES
from cupy_moe.launches import Bias, Maps, Matrix
from cupy_moe.routing import Routing
from cupy_moe.step_arguments import Arguments


def route(topk_ids: Any, num_experts: int, *, expert_map: Any = None) -> Routing:
    """Sort the (token, slot) pairs by expert: by (expert, token, slot).

    Parameters
    ----------
    topk_ids
        (M, topk) int32 or int64. A negative id, one of ``num_experts`` or more, and one mapped outside is dropped.
    num_experts
        E, the number of local experts.
    expert_map
        (global_num_experts,) int32: global id to local one or -1; None: ids are local.

    Returns
    -------
    Routing
        Offsets and counts per expert, the maps in both directions and each row's expert; int32.
    """
    arguments = Arguments("topk_ids", topk_ids)
    ids = arguments.expect("topk_ids", topk_ids, INDICES, ("M", "topk"))
    experts = checks.count("num_experts", num_experts, 1)
    mapped = arguments.optional("expert_map", expert_map, ("int32",), ("global_num_experts",))
    checks.not_empty("expert_map", mapped)
    if arguments.on_cpu:
        return Routing(*arguments.reference(reference.route, topk_ids, experts, expert_map=expert_map))
    tokens, topk = ids.shape
    rows = tokens * topk
    made = Routing(
        *(arguments.empty(shape, "int32") for shape in ((experts + 1,), (experts,), (rows,), (tokens, topk), (rows,)))
    )
    maps = Maps(*(arguments.pointer(x) for x in made))
    scratch = arguments.empty((launches.route_blocks(rows) * experts,), "int32")
    arguments.run(*launches.route(
        arguments.device, ids.pointer, ids.dtype, tokens, topk, experts, maps,
        expert_map=mapped.pointer, map_size=mapped.shape[0] if mapped.shape else 0, scratch=arguments.pointer(scratch),
    ))
    return made


def shuffle_rows(x: Any, dst2src_map: Any, *, out: Any = None) -> Any:
    """Gather rows: ``out[r] = x[dst2src_map[r]]``, zeros where the map is negative or at least M.

    Parameters
    ----------
    x
        (M, C) of any dtype; any distance between rows.
    dst2src_map
        (rows,) int32.
    out
        (rows, C) of the dtype of ``x``; None allocates it.

    Returns
    -------
    array (rows, C)
    """
    arguments = Arguments("x", x)
    source = arguments.expect("x", x, (arguments.first.dtype,), ("M", "C"), rows_only=True)
    index = arguments.expect("dst2src_map", dst2src_map, ("int32",), ("rows",))
    shape = (index.shape[0], source.shape[1])
    try:
        out = arguments.result("out", out, shape, source.dtype)
    except KeyError:
        raise TypeError(f"x: expected a dtype that torch shares with NumPy; got {source.dtype}") from None
    if arguments.on_cpu:
        arguments.reference(reference.shuffle_rows, x, dst2src_map, out=out)
    elif 0 not in shape:
        itemsize = arrays.numpy_dtype(source.dtype).itemsize
        pitch = source.strides[0] if source.shape[0] > 1 else shape[1]
        arguments.run(launches.shuffle_rows(
            arguments.device, source.pointer, pitch * itemsize, source.shape[0], index.pointer, shape[0],
            shape[1] * itemsize, arguments.pointer(out),
        ))
    return out


def gather_scales(scales: Any, dst2src_map: Any) -> Any:
    """Gather the scales of tokens for sorted rows, as `shuffle_rows` gathers rows.

    Parameters
    ----------
    scales
        (M, 1) or (M,) float32.
    dst2src_map
        (rows,) int32.

    Returns
    -------
    array (rows, 1) float32; zeros where the map is negative or at least M
    """
    arguments = Arguments("scales", scales)
    info = arguments.expect("scales", scales, ("float32",), ("M", 1), ("M",))
    return shuffle_rows(scales.reshape(info.shape[0], 1), dst2src_map)


def quantize_fp8(x: Any, scale: Any = None, *, per_token: bool = False) -> tuple[Any, Any]:
    """Quantise to e4m3: ``q = e4m3(x / scale)``, round to nearest even, saturating.

    Parameters
    ----------
    x
        (M, C) float16, bfloat16 or float32; any distance between rows.
    scale
        float32. None: dynamic, ``max(amax, 1e-30) / 448`` over the finite values. A number, () or (1,): for all of
        ``x``. (M, 1): one per token.
    per_token
        A dynamic scale per token instead of one for all.

    Returns
    -------
    q
        (M, C) float8_e4m3fn (uint8 codes in CuPy).
    scale
        (1,) or (M, 1) float32.
    """
    arguments = Arguments("x", x)
    info = arguments.expect("x", x, FLOATS, ("M", "C"), rows_only=True)
    tokens, cols = info.shape
    checks.flag("per_token", per_token)
    given = arguments.row_scale("scale", scale, ((), (1,), (tokens, 1)))
    if arguments.on_cpu:
        return arguments.reference_pair(reference.quantize_fp8, x, scale, per_token=per_token)
    codes = arguments.empty((tokens, cols), "uint8")
    out = Matrix(arguments.pointer(codes), cols, "uint8")
    partials = arguments.empty((launches.PARTIALS,), "float32")
    if scale is not None:
        mode, made = "STATIC", arguments.as_scale(scale)
    else:
        mode = "TOKEN" if per_token else "TENSOR"
        made = arguments.empty((tokens if per_token else 1, 1)[: 1 + per_token], "float32")
    if 0 not in info.shape:
        arguments.run(*launches.quantize(
            arguments.device, mode, arguments.matrix(info), tokens, cols, out, cols, scale=given,
            partials=arguments.pointer(partials), scale_out=0 if mode == "STATIC" else arguments.pointer(made),
        ))
    elif scale is None:
        made[...] = 1e-30 / 448
    return arguments.library.as_fp8(codes), made


def activation_quantize(
    x: Any, activation: str = "silu", *, scale: Any = None, per_token: bool = False, x_scale: Any = None,
    w_scale: Any = None, bias: Any = None, row_experts: Any = None,
) -> tuple[Any, Any]:
    """Scale, activate and quantise the product of GEMM 1: ``e4m3(act(x * (x_scale * w_scale) + bias) / scale)``.

    Parameters
    ----------
    x
        (rows, 2N), gates then ups, or (rows, N) if not gated: float16, bfloat16 or float32.
    activation
        As in `Experts`.
    scale
        Of the result: None dynamic; a number, () or (1,) static; (E,) static per expert.
    per_token
        Dynamic scales per row instead of one.
    x_scale
        Of the rows: None for 1; a number, () or (1,); (rows, 1); (E,) per expert.
    w_scale
        Of the weights, any kind that `Experts` takes for ``w1_scale``; None for 1.
    bias
        (E, 2N) or (E, N): float16, bfloat16 or float32.
    row_experts
        (rows,) int32 expert of each row, -1 for none: such a row counts for no maximum and becomes zero codes. Needed
        with any argument per expert; None: all rows belong to expert 0.

    Returns
    -------
    q
        (rows, N) float8_e4m3fn (uint8 codes in CuPy).
    scale
        As given, or (1,) or (rows, 1) float32; those of rows without an expert mean nothing.
    """
    arguments = Arguments("x", x)
    checks.option("activation", activation, ACTIVATIONS)
    gated = ACTIVATIONS[activation].gated
    info = arguments.expect("x", x, FLOATS, ("rows", "2N" if gated else "N"), rows_only=True)
    rows, cols = info.shape
    if cols % (2 if gated else 1):
        raise ValueError(f"x: expected an even number of columns for activation {activation!r}; got {info.shape}")
    width = cols // 2 if gated else cols
    checks.flag("per_token", per_token)
    experts, owners = arguments.experts(
        row_experts, rows, w_scale=w_scale, bias=bias, scale=scale, x_scale=x_scale
    )
    by_weight = arguments.weight_scale("w_scale", w_scale, experts, cols, width if gated else 0)
    by_row = arguments.row_scale("x_scale", x_scale, ((), (1,), (rows, 1), (experts,)))
    given = arguments.row_scale("scale", scale, ((), (1,), (experts,)))
    shift = arguments.optional("bias", bias, FLOATS, (experts, cols))
    if arguments.on_cpu:
        return arguments.reference_pair(
            reference.activation_quantize, x, activation, scale=scale, per_token=per_token, x_scale=x_scale,
            w_scale=w_scale, bias=bias, row_experts=row_experts,
        )
    codes = arguments.zeros((rows, width), "uint8")
    partials = arguments.empty((launches.PARTIALS,), "float32")
    if scale is not None:
        mode, made = "STATIC", arguments.as_scale(scale)
    else:
        mode = "TOKEN" if per_token else "TENSOR"
        made = arguments.zeros((rows, 1) if per_token else (1,))
    if 0 not in info.shape:
        arguments.run(*launches.activation_quantize(
            arguments.device, mode, activation, gated, arguments.matrix(info), rows, width, width,
            Matrix(arguments.pointer(codes), width, "uint8"), width, x_scale=by_row, w_scale=by_weight,
            bias=Bias(shift.pointer, shift.dtype), row_experts=owners, scale=given,
            partials=arguments.pointer(partials), scale_out=0 if mode == "STATIC" else arguments.pointer(made),
        ))
    elif scale is None:
        made[...] = 1e-30 / 448
    return arguments.library.as_fp8(codes), made


def grouped_gemm_fp8(
    a: Any, b: Any, expert_offsets: Any, *, a_scale: Any = None, b_scale: Any = None, bias: Any = None,
    out_dtype: Any = "bfloat16", backend: str | None = None,
) -> Any:
    """Multiply each expert's rows by its weights: ``a[rows of e] @ b[e].T * (a_scale * b_scale) + bias``.

    Parameters
    ----------
    a
        (rows, K) fp8, sorted by expert.
    b
        (E, n, K) fp8.
    expert_offsets
        (E + 1,) int32: the rows of expert ``e`` are ``expert_offsets[e] : expert_offsets[e + 1]``.
    a_scale
        None for 1; a number, () or (1,); (rows, 1); (E,) per expert.
    b_scale
        None for 1; per tensor (E,), (E, 1) or (E, 1, 1); per channel (E, n) or (E, n, 1).
    bias
        (E, n) float16, bfloat16 or float32.
    out_dtype
        float16, bfloat16 or float32.
    backend
        A name of `cupy_moe.backends`; None takes the fastest available.

    Returns
    -------
    array (rows, n); rows from ``expert_offsets[E]`` on are zero
    """
    arguments = Arguments("a", a)
    left = arguments.expect("a", a, FP8, ("rows", "K"))
    right = arguments.expect("b", b, FP8, ("E", "n", left.shape[1]))
    experts, n, _ = right.shape
    arguments.expect("expert_offsets", expert_offsets, ("int32",), (experts + 1,))
    by_row = arguments.row_scale("a_scale", a_scale, ((), (1,), (left.shape[0], 1), (experts,)))
    by_weight = arguments.weight_scale("b_scale", b_scale, experts, n, 0)
    shift = arguments.optional("bias", bias, FLOATS, (experts, n))
    dtype = checks.float_dtype("out_dtype", out_dtype)
    chosen = backend_choice.choose(arguments.device, backend)
    if chosen == "reference":
        return arguments.reference(
            reference.grouped_gemm_fp8, a, b, expert_offsets, a_scale=a_scale, b_scale=b_scale, bias=bias,
            out_dtype=dtype,
        )
    out = arguments.zeros((left.shape[0], n), dtype)
    if 0 in left.shape or 0 in right.shape:
        return out
    with arrays.numeric_scope(arguments.library, arguments.device):
        product, unit, owners = grouped_gemm.multiply(
            backend_choice.cublaslt_context(arguments.device), *map(arguments.numeric, (a, b, expert_offsets))
        )
    arguments.run(launches.combine(
        arguments.device, Matrix(product.data.ptr, product.shape[1], "float16"), len(product), left.shape[0], 1, n,
        Matrix(arguments.pointer(out), n, dtype), x_scale=by_row, unit=unit, w_scale=by_weight,
        bias=Bias(shift.pointer, shift.dtype), row_experts=owners.data.ptr,
    ))
    return out


def combine(
    x: Any, src2dst_map: Any, *, topk_weights: Any = None, x_scale: Any = None, w_scale: Any = None, bias: Any = None,
    row_experts: Any = None, out_dtype: Any = None,
) -> Any:
    """Bring rows back to tokens: the sum over slots, in slot order, of ``weight * (x * (x_scale * w_scale) + bias)``.

    Parameters
    ----------
    x
        (rows, K) float16, bfloat16 or float32; any distance between rows.
    src2dst_map
        (M, topk) int32: row of each (token, slot); a slot with -1 adds nothing.
    topk_weights
        (M, topk) float32; None: weights of 1.
    x_scale, w_scale, bias, row_experts
        As in `activation_quantize`, with K columns: ``w_scale`` is one per expert or per channel (E, K).
    out_dtype
        float16, bfloat16 or float32; None is that of ``x``.

    Returns
    -------
    array (M, K)
    """
    arguments = Arguments("x", x)
    info = arguments.expect("x", x, FLOATS, ("rows", "K"), rows_only=True)
    rows, cols = info.shape
    index = arguments.expect("src2dst_map", src2dst_map, ("int32",), ("M", "topk"))
    weights = arguments.optional("topk_weights", topk_weights, ("float32",), index.shape)
    experts, owners = arguments.experts(row_experts, rows, w_scale=w_scale, bias=bias, x_scale=x_scale)
    by_weight = arguments.weight_scale("w_scale", w_scale, experts, cols, 0)
    by_row = arguments.row_scale("x_scale", x_scale, ((), (1,), (rows, 1), (experts,)))
    shift = arguments.optional("bias", bias, FLOATS, (experts, cols))
    dtype = info.dtype if out_dtype is None else checks.float_dtype("out_dtype", out_dtype)
    if arguments.on_cpu:
        return arguments.reference(
            reference.combine, x, src2dst_map, topk_weights=topk_weights, x_scale=x_scale, w_scale=w_scale, bias=bias,
            row_experts=row_experts, out_dtype=dtype,
        )
    tokens, topk = index.shape
    out = arguments.zeros((tokens, cols), dtype)
    if 0 not in (*info.shape, tokens, topk):
        arguments.run(launches.combine(
            arguments.device, arguments.matrix(info), rows, tokens, topk, cols,
            Matrix(arguments.pointer(out), cols, dtype), x_scale=by_row, w_scale=by_weight,
            bias=Bias(shift.pointer, shift.dtype), src2dst=index.pointer, row_experts=owners,
            topk_weights=weights.pointer,
        ))
    return out


def topk_softmax(gating: Any, topk: int, *, renormalize: bool = False) -> tuple[Any, Any]:
    """Choose experts: the ``topk`` largest logits of each token and their softmax probabilities, largest first.

    Parameters
    ----------
    gating
        (M, E) float16, bfloat16 or float32 logits, E at most 1024; any distance between rows. They are clamped to the
        finite range, NaN counts as the smallest; of equal ones the lowest id wins.
    topk
        From 1 to E.
    renormalize
        Divide the chosen probabilities by their sum.

    Returns
    -------
    topk_weights
        (M, topk) float32.
    topk_ids
        (M, topk) int32.
    """
    arguments = Arguments("gating", gating)
    info = arguments.expect("gating", gating, FLOATS, ("M", "E"), rows_only=True)
    tokens, experts = info.shape
    if not 1 <= experts <= 1024:
        raise ValueError(f"gating: expected from 1 to 1024 experts; got shape {info.shape}")
    topk = checks.count("topk", topk, 1, experts)
    checks.flag("renormalize", renormalize)
    if arguments.on_cpu:
        return arguments.reference_pair(reference.topk_softmax, gating, topk, renormalize=renormalize)
    weights, ids = arguments.empty((tokens, topk), "float32"), arguments.empty((tokens, topk), "int32")
    if tokens:
        arguments.run(launches.topk_softmax(
            arguments.device, arguments.matrix(info), tokens, experts, topk, renormalize, arguments.pointer(weights),
            arguments.pointer(ids),
        ))
    return weights, ids

