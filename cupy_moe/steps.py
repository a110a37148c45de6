# SPDX-License-Identifier: Apache-2.0
"""The steps that calculate: `quantize_fp8`, `activation_quantize`, `grouped_gemm_fp8` and `combine`.

NumPy arrays and torch CPU tensors run the reference's twin of the same name; CuPy arrays and torch CUDA tensors run the
layer's kernels on the caller's current stream. Sizes: M tokens, K hidden, N intermediate, E experts, rows = M * topk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupy_moe import arrays, checks, dispatch, e4m3, launches, products, reference
from cupy_moe import backend as backend_choice
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.checks import FLOATS, FP8
from cupy_moe.launches import Bias, Matrix
from cupy_moe.reference_scales import TINY_AMAX
from cupy_moe.step_arguments import Arguments


def quantize_fp8(x: Any, scale: Any = None, *, per_token: bool = False) -> tuple[Any, Any]:
    """Quantise to e4m3: ``q = e4m3(x / scale)``, round to nearest even, saturating.

    Parameters
    ----------
    x
        (M, C) float16, bfloat16 or float32; any distance between rows.
    scale
        float32. None: dynamic, ``max(amax, 1e-30) / 448`` over the finite values. A number, (), (1,) or (1, 1): for
        all of ``x``. (M, 1): one per token.
    per_token
        A dynamic scale per token instead of one for all; ignored if ``scale`` is given.

    Returns
    -------
    q
        (M, C) float8_e4m3fn of the OCP 8-bit floating point specification (uint8 codes in CuPy).
    scale
        As given, a number or () as (1,); else (1,) or (M, 1) float32.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        In a CUDA graph capture that could not keep its scratch memory.
    """
    arguments = Arguments("x", x)
    info = arguments.expect("x", x, FLOATS, ("M", "C"), rows_only=True)
    tokens, cols = info.shape
    checks.flag("per_token", per_token)
    given = arguments.row_scale("scale", scale, (*checks.ONE, (tokens, 1)))
    if arguments.on_cpu:
        return arguments.reference_pair(reference.quantize_fp8, x, scale, per_token=per_token)
    mode, made, addresses = _made_scale(arguments, scale, per_token, tokens, arguments.empty)
    codes = arguments.empty((tokens, cols), "uint8")
    out = Matrix(arguments.pointer(codes), cols, "uint8")
    if 0 not in info.shape:
        arguments.run(*dispatch.quantize(
            arguments.device, mode, arguments.matrix(info), tokens, cols, out, cols, scale=given, **addresses,
        ))
    elif scale is None:
        made = arguments.filled(tuple(made.shape), TINY_AMAX / e4m3.MAX)
    return arguments.library.as_fp8(codes), made


def _made_scale(
    arguments: Arguments, scale: Any, per_token: bool, rows: int, make: Callable[..., Any]
) -> tuple[str, Any, dict[str, Any]]:
    """The kernel's mode, the scale of the result, new where it is dynamic, and what the kernels write to find that."""
    if scale is not None:
        return "STATIC", arguments.as_scale(scale), {}
    partials = 0 if per_token else arguments.scratch((launches.PARTIALS,), "float32")
    made = make((rows, 1) if per_token else (1,), "float32")
    return "TOKEN" if per_token else "TENSOR", made, {"partials": partials, "scale_out": arguments.pointer(made)}


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
        Of the result: None dynamic; a number, (), (1,) or (1, 1) static; (E,) static per expert.
    per_token
        Dynamic scales per row instead of one; ignored if ``scale`` is given.
    x_scale
        Of the rows: None for 1; a number, (), (1,) or (1, 1); (rows, 1); (E,) per expert.
    w_scale
        Of the weights, any kind that `Experts` takes for ``w1_scale``; None for 1.
    bias
        (E, 2N) or (E, N): float16, bfloat16 or float32.
    row_experts
        (rows,) int32 expert of each row, from 0 to E - 1 (on a GPU nobody looks), or -1 for none: such a row counts
        for no maximum and becomes zero codes. Needed with any argument per expert; None: all rows belong to expert 0.

    Returns
    -------
    q
        (rows, N) float8_e4m3fn (uint8 codes in CuPy).
    scale
        As given, or (1,) or (rows, 1) float32; those of rows without an expert mean nothing.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        In a CUDA graph capture that could not keep its scratch memory.
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
    by_row = arguments.row_scale("x_scale", x_scale, (*checks.ONE, (rows, 1), (experts,)))
    given = arguments.row_scale("scale", scale, (*checks.ONE, (experts,)))
    shift = arguments.optional("bias", bias, FLOATS, (experts, cols))
    if arguments.on_cpu:
        return arguments.reference_pair(
            reference.activation_quantize, x, activation, scale=scale, per_token=per_token, x_scale=x_scale,
            w_scale=w_scale, bias=bias, row_experts=row_experts,
        )
    # Zeros: nobody writes the codes and the scale of a row without an expert.
    mode, made, addresses = _made_scale(arguments, scale, per_token, rows, arguments.zeros)
    codes = arguments.zeros((rows, width), "uint8")
    if 0 not in info.shape:
        arguments.run(*launches.activation_quantize(
            arguments.device, mode, activation, gated, arguments.matrix(info), rows, width, width,
            Matrix(arguments.pointer(codes), width, "uint8"), width, x_scale=by_row, w_scale=by_weight,
            bias=Bias(shift.pointer, shift.dtype), row_experts=owners, scale=given, **addresses,
        ))
    elif scale is None:
        made = arguments.filled(tuple(made.shape), TINY_AMAX / e4m3.MAX)
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
        (E + 1,) int32, none less than the one before: the rows of expert ``e`` are
        ``expert_offsets[e] : expert_offsets[e + 1]``.
    a_scale
        None for 1; a number, (), (1,) or (1, 1); (rows, 1); (E,) per expert.
    b_scale
        None for 1; per tensor (E,), (E, 1) or (E, 1, 1); per channel (E, n) or (E, n, 1).
    bias
        (E, n) float16, bfloat16 or float32.
    out_dtype
        float16, bfloat16 or float32.
    backend
        A name of `cupy_moe.backends`; None takes the first that is available there, on a GPU not the reference.

    Returns
    -------
    array (rows, n) of ``out_dtype``; rows in front of ``expert_offsets[0]`` and from ``expert_offsets[E]`` on are zero

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        If the backend is not available here, or in a CUDA graph capture.
    """
    arguments = Arguments("a", a)
    left = arguments.expect("a", a, FP8, ("rows", "K"))
    right = arguments.expect("b", b, FP8, ("E", "n", left.shape[1]))
    experts, n, _ = right.shape
    arguments.expect("expert_offsets", expert_offsets, ("int32",), (experts + 1,))
    by_row = arguments.row_scale("a_scale", a_scale, (*checks.ONE, (left.shape[0], 1), (experts,)))
    by_weight = arguments.weight_scale("b_scale", b_scale, experts, n, 0)
    shift = arguments.optional("bias", bias, FLOATS, (experts, n))
    dtype = checks.float_dtype("out_dtype", out_dtype)
    if not arguments.on_cpu:  # in front of the choice, which may try a library out
        arguments.refuse_capture()
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
        product, unit, owners = products.multiply(
            arguments.device, chosen, *map(arguments.numeric, (a, b, expert_offsets))
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
        (M, topk) int32: row of each (token, slot); a slot with a number outside 0 .. rows - 1 adds nothing.
    topk_weights
        (M, topk) float32; None: weights of 1.
    x_scale, w_scale, bias, row_experts
        As in `activation_quantize`, with K columns: ``w_scale`` is one per expert or per channel (E, K). A row without
        an expert adds nothing.
    out_dtype
        float16, bfloat16 or float32; None is that of ``x``.

    Returns
    -------
    array (M, K) of ``out_dtype``

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    """
    arguments = Arguments("x", x)
    info = arguments.expect("x", x, FLOATS, ("rows", "K"), rows_only=True)
    rows, cols = info.shape
    index = arguments.expect("src2dst_map", src2dst_map, ("int32",), ("M", "topk"))
    weights = arguments.optional("topk_weights", topk_weights, ("float32",), index.shape)
    experts, owners = arguments.experts(row_experts, rows, w_scale=w_scale, bias=bias, x_scale=x_scale)
    by_weight = arguments.weight_scale("w_scale", w_scale, experts, cols, 0)
    by_row = arguments.row_scale("x_scale", x_scale, (*checks.ONE, (rows, 1), (experts,)))
    shift = arguments.optional("bias", bias, FLOATS, (experts, cols))
    dtype = info.dtype if out_dtype is None else checks.float_dtype("out_dtype", out_dtype)
    if arguments.on_cpu:
        return arguments.reference(
            reference.combine, x, src2dst_map, topk_weights=topk_weights, x_scale=x_scale, w_scale=w_scale, bias=bias,
            row_experts=row_experts, out_dtype=dtype,
        )
    tokens, topk = index.shape
    if topk > checks.MOST_SLOTS:
        raise ValueError(f"src2dst_map: expected at most {checks.MOST_SLOTS} slots per token on a GPU; got {topk}")
    out = arguments.zeros((tokens, cols), dtype)
    if 0 not in (*info.shape, tokens, topk):
        arguments.run(launches.combine(
            arguments.device, arguments.matrix(info), rows, tokens, topk, cols,
            Matrix(arguments.pointer(out), cols, dtype), x_scale=by_row, w_scale=by_weight,
            bias=Bias(shift.pointer, shift.dtype), src2dst=index.pointer, row_experts=owners,
            topk_weights=weights.pointer,
        ))
    return out
