# SPDX-License-Identifier: Apache-2.0
"""`fused_experts`: one layer in one call, over `Experts` that are found again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from cupy_moe import arrays, checks, driver, spec
from cupy_moe.experts import Experts
from cupy_moe.spec import LayerSpec
from cupy_moe.workspace import Workspace

LAYERS_KEPT = 1024
"""Layers that are found again, once for each stream that they are called on; the one called longest ago goes first.
With more of them in turns, each call would make its own anew."""


def fused_experts(
    hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *, w1_scale: Any, w2_scale: Any,
    a1_scale: Any = None, a2_scale: Any = None, per_act_token: bool = False, activation: str = "silu",
    w1_bias: Any = None, w2_bias: Any = None, expert_map: Any = None, apply_router_weight_on_input: bool = False,
    out: Any = None, out_dtype: Any = None, backend: str | None = None, batch_invariant: bool = False,
    validate: bool = False,
) -> Any:
    """Run one MoE layer: the arguments of `Experts` and of its call in one, where they are described.

    ``hidden_states`` (M, K), ``w1`` (E, 2N, K), or (E, N, K) without gates, ``w2`` (E, K, N), ``topk_weights`` and
    ``topk_ids`` (M, topk).

    What depends on the weights alone is found again for the same arrays, so repeated calls cost little more than those
    of `Experts`; the arrays themselves are not kept. Where K or N is no multiple of 16, each call copies the weights
    into padded ones: make an `Experts` for those. Calls on one stream share their scratch memory, and a captured call
    takes that of the calls before the capture: branches of a graph that may run side by side, or beside such calls,
    take `Experts` with a `Workspace` each.

    Returns
    -------
    array (M, K) of the kind of ``hidden_states`` and of ``out_dtype``

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        If the backend is not available here; the message says why and what to do.
    """
    names = (
        "w1", "w2", "w1_scale", "w2_scale", "a2_scale", "per_act_token", "activation", "w1_bias", "w2_bias",
        "expert_map", "apply_router_weight_on_input", "out_dtype", "batch_invariant", "validate",
    )
    given = locals()
    options = {name: given[name] for name in names}
    ready = _is_fp8(hidden_states)
    checked = spec.layer_spec(**options, a1_scale=None if ready else a1_scale)
    experts = _cached_experts(checked, backend)
    result = experts(hidden_states, topk_weights, topk_ids, out, a1_scale=a1_scale if ready else None)
    if experts._captured:
        _recorded.add(experts)
    return result


_layers_lock = threading.Lock()
_Place = tuple[int, tuple[int, int]]  # device, stream
_Key = tuple[_Place, str | None, LayerSpec]  # where, backend, addresses and options
_layers: OrderedDict[_Key, Experts] = OrderedDict()
_workspaces: dict[_Place, Workspace] = {}
_recorded: set[Experts] = set()  # whose tables CUDA graphs hold: they stay


def _cached_experts(checked: LayerSpec, backend: str | None) -> Experts:
    """The `Experts` made earlier for the same addresses and options, if it holds no copy of their contents."""
    if checked.device == arrays.CPU or backend == "reference":
        return Experts._of(checked, backend, None)
    place = checked.device, driver.stream_identity(checked.library.stream(checked.device))
    key = (place, backend, checked.without_arrays())
    with _layers_lock:
        if key not in _layers and arrays.is_capturing(checked.library, checked.device):
            # Captures run on streams of their own: what the calls before the capture made is what this graph takes.
            key = next((other for other in _layers if other[1:] == key[1:] and other[0][0] == place[0]), key)
        experts = _layers.get(key)
        if experts is not None:
            _layers.move_to_end(key)
            return experts
        experts = Experts._of(checked, backend, _workspaces.setdefault(place, Workspace()))
        if experts.backend == "reference" or experts._layer.copies:
            return experts
        experts._spec = checked.without_arrays()
        _layers[key] = experts
        if len(_layers) > LAYERS_KEPT:
            _layers.popitem(last=False)
        return experts


def _is_fp8(x: Any) -> bool:
    library = arrays.library_of(x)
    return library is not None and checks.info("hidden_states", x, library).dtype in checks.FP8
