# SPDX-License-Identifier: Apache-2.0
"""The steps that decide and move rows: `topk_softmax`, `route`, `shuffle_rows` and `gather_scales`.

NumPy arrays and torch CPU tensors run the reference's twin of the same name; CuPy arrays and torch CUDA tensors run the
layer's kernels on the caller's current stream. Sizes: M tokens, E experts, rows = M * topk.
"""

from __future__ import annotations

from typing import Any

from cupy_moe import arrays, checks, dispatch, launches, reference
from cupy_moe.checks import FLOATS, INDICES
from cupy_moe.launches import Maps
from cupy_moe.routing import Routing
from cupy_moe.step_arguments import Arguments


def topk_softmax(gating: Any, topk: int, *, renormalize: bool = False) -> tuple[Any, Any]:
    """Choose experts: the ``topk`` largest logits of each token, largest first, and their part in the softmax of all E.

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

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
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

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        In a CUDA graph capture that could not keep its scratch memory.
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
    needed = dispatch.route_scratch(arguments.device, rows, experts)
    scratch = arguments.scratch((needed,), "int32") if needed else 0
    made = Routing(
        *(arguments.empty(shape, "int32") for shape in ((experts + 1,), (experts,), (rows,), (tokens, topk), (rows,)))
    )
    maps = Maps(*(arguments.pointer(x) for x in made))
    arguments.run(*dispatch.route(
        arguments.device, tokens, dispatch.Pairs(
            ids.pointer, ids.dtype, topk, experts, maps, expert_map=mapped.pointer,
            map_size=mapped.shape[0] if mapped.shape else 0, scratch=scratch,
        ),
    ))
    return made


def shuffle_rows(x: Any, dst2src_map: Any, *, out: Any = None) -> Any:
    """Gather rows: ``out[r] = x[dst2src_map[r]]``, zeros where the map is negative or at least M.

    Parameters
    ----------
    x
        (M, C); any distance between rows. Any dtype of numbers; of torch real ones that NumPy has too, bfloat16 and
        float8_e4m3fn.
    dst2src_map
        (rows,) int32.
    out
        (rows, C) of the dtype of ``x``, which must not share memory with it; None allocates it.

    Returns
    -------
    array (rows, C)

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    """
    arguments = Arguments("x", x)
    dtype = arguments.first.dtype
    source = arguments.expect(
        "x", x, arrays.NUMBERS if arguments.library.name == "torch" else (dtype,), ("M", "C"), rows_only=True
    )
    try:
        itemsize = arrays.numpy_dtype(dtype).itemsize
    except TypeError:
        raise TypeError(f"x: expected numbers; got {dtype}") from None
    index = arguments.expect("dst2src_map", dst2src_map, ("int32",), ("rows",))
    shape = (index.shape[0], source.shape[1])
    pitch = source.strides[0] if source.shape[0] > 1 else shape[1]
    out = arguments.result("out", out, shape, source.dtype)
    to = arguments.pointer(out)
    if 0 not in (*shape, source.shape[0]):
        end = source.pointer + ((source.shape[0] - 1) * pitch + shape[1]) * itemsize
        if source.pointer < to + shape[0] * shape[1] * itemsize and to < end:
            raise ValueError("out: expected memory apart from that of x; got an array that overlaps it")
    if arguments.on_cpu:
        arguments.reference(reference.shuffle_rows, x, dst2src_map, out=out)
    elif 0 not in shape:
        arguments.run(launches.shuffle_rows(
            arguments.device, source.pointer, pitch * itemsize, source.shape[0], index.pointer, shape[0],
            shape[1] * itemsize, to,
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

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    """
    arguments = Arguments("scales", scales)
    info = arguments.expect("scales", scales, ("float32",), ("M", 1), ("M",))
    return shuffle_rows(scales.reshape(info.shape[0], 1), dst2src_map)
