# SPDX-License-Identifier: Apache-2.0
"""A layer's weights, scales and options, checked once: everything that does not depend on the tokens."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cupy_moe import checks
from cupy_moe.activations import ACTIVATIONS
from cupy_moe.arrays import CPU, Array, Library


class Operand(NamedTuple):
    """An argument: the caller's array, kept alive, and its description."""

    array: Any
    info: Array


Scale = Operand | float
"""A scale of activations: an array, or a number that travels as a kernel argument."""


@dataclass(frozen=True)
class LayerSpec:
    """The checked arguments of `cupy_moe.Experts`; the names are those of its parameters."""

    library: Library
    device: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    w1: Operand
    w2: Operand
    w1_scale: Operand
    w2_scale: Operand
    a1_scale: Scale | None
    a2_scale: Scale | None
    w1_bias: Operand | None
    w2_bias: Operand | None
    expert_map: Operand | None
    per_act_token: bool
    activation: str
    apply_router_weight_on_input: bool
    out_dtype: str | None
    batch_invariant: bool
    validate: bool

    @property
    def gated(self) -> bool:
        """Whether ``w1`` holds gates and ups."""
        return ACTIVATIONS[self.activation].gated

    @property
    def experts_routed_to(self) -> int:
        """How many experts the tokens choose from, those held elsewhere included."""
        return max(self.expert_map.info.shape[0], self.num_experts) if self.expert_map else self.num_experts

    def operands(self) -> dict[str, Scale | None]:
        """The array arguments (and scales that are numbers) by name."""
        return {name: getattr(self, name) for name in _OPERANDS}

    def without_arrays(self) -> LayerSpec:
        """The same with the addresses only: hashable, and keeps nothing alive."""
        bare: dict[str, Any] = {
            name: Operand(None, x.info) for name, x in self.operands().items() if isinstance(x, Operand)
        }
        return replace(self, **bare)

    def result_dtype(self, hidden_dtype: str) -> str:
        """The dtype of the output for hidden states of ``hidden_dtype``."""
        if self.out_dtype:
            return self.out_dtype
        return "bfloat16" if hidden_dtype in checks.FP8 else hidden_dtype


_OPERANDS = (
    "w1", "w2", "w1_scale", "w2_scale", "a1_scale", "a2_scale", "w1_bias", "w2_bias", "expert_map"
)


def layer_spec(
    w1: Any, w2: Any, *, w1_scale: Any, w2_scale: Any, a1_scale: Any = None, a2_scale: Any = None,
    per_act_token: bool = False, activation: str = "silu", w1_bias: Any = None, w2_bias: Any = None,
    expert_map: Any = None, apply_router_weight_on_input: bool = False, out_dtype: Any = None,
    batch_invariant: bool = False, validate: bool = False,
) -> LayerSpec:
    """Check the arguments of `cupy_moe.Experts`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what is allowed and what came.
    """
    library = checks.library_of("w1", w1)
    device = checks.info("w1", w1, library).device
    checks.option("activation", activation, ACTIVATIONS)
    gated = ACTIVATIONS[activation].gated
    first, second = _weights(library, device, w1, w2, activation)
    num_experts, rows, hidden_size = first.shape

    def operand(name: str, x: Any, dtypes: tuple[str, ...], *shapes: checks.Shape) -> Operand | None:
        if x is None:
            return None
        return Operand(x, checks.expect(name, checks.describe(name, x, library, device), dtypes, *shapes))

    def weight_scale(name: str, x: Any, channels: int, halves: bool) -> Operand:
        if x is None:
            raise ValueError(f"{name}: expected float32 of shape (E,), or (E, {channels}) per channel; got None")
        shapes = checks.weight_scale_shapes(num_experts, channels, halves)
        info = checks.describe(name, x, library, device)
        in_blocks = len(info.shape) == 3 and 1 not in info.shape[1:]
        blocks = " (block-wise scales are not supported)" if in_blocks else ""
        return Operand(x, checks.expect(name, info, ("float32",), *shapes, since=blocks))

    def activation_scale(name: str, x: Any) -> Scale | None:
        if x is None:
            return None
        value = checks.number(name, x)
        if value is not None:
            return value
        shapes: list[checks.Shape] = [*checks.ONE, (num_experts,)]
        if name == "a1_scale":  # (M, 1) belongs to fp8 hidden states: whether they are is known at the call
            shapes.append(("M", 1))
        return Operand(x, checks.expect(name, checks.describe(name, x, library, device), ("float32",), *shapes))

    mapping = operand("expert_map", expert_map, ("int32",), ("global_num_experts",))
    if mapping is not None:
        checks.not_empty("expert_map", mapping.info)
    made = LayerSpec(
        library=library, device=device, num_experts=num_experts, hidden_size=hidden_size,
        intermediate_size=second.shape[2], w1=Operand(w1, first), w2=Operand(w2, second),
        w1_scale=weight_scale("w1_scale", w1_scale, rows, gated),
        w2_scale=weight_scale("w2_scale", w2_scale, hidden_size, False),
        a1_scale=activation_scale("a1_scale", a1_scale), a2_scale=activation_scale("a2_scale", a2_scale),
        w1_bias=operand("w1_bias", w1_bias, checks.FLOATS, (num_experts, rows)),
        w2_bias=operand("w2_bias", w2_bias, checks.FLOATS, (num_experts, hidden_size)),
        expert_map=mapping,
        per_act_token=checks.flag("per_act_token", per_act_token), activation=activation,
        apply_router_weight_on_input=checks.flag("apply_router_weight_on_input", apply_router_weight_on_input),
        out_dtype=None if out_dtype is None else checks.float_dtype("out_dtype", out_dtype),
        batch_invariant=checks.flag("batch_invariant", batch_invariant), validate=checks.flag("validate", validate),
    )
    _check_scale_of_all(made, "a2_scale", made.a2_scale, "")
    return made


def _weights(library: Library, device: int, w1: Any, w2: Any, activation: str) -> tuple[Array, Array]:
    """Both weights, described and checked."""
    gated = ACTIVATIONS[activation].gated
    first = checks.expect("w1", checks.info("w1", w1, library), checks.FP8, ("E", "2N" if gated else "N", "K"))
    experts, rows, hidden_size = first.shape
    if 0 in first.shape or rows % (2 if gated else 1):
        halves = " and an even second size (gates, then ups)" if gated else ""
        raise ValueError(f"w1: expected sizes of at least 1{halves} for activation {activation!r}; got {first.shape}")
    second = checks.expect(
        "w2", checks.describe("w2", w2, library, device), checks.FP8, (experts, hidden_size, rows // (1 + gated)),
        since=f", since w1 has {first.shape} and the activation {activation!r} is {'' if gated else 'not '}gated",
    )
    return first, second


def _check_scale_of_all(spec: LayerSpec, name: str, scale: Scale | None, or_else: str) -> None:
    """With `batch_invariant`, refuse a dynamic scale per tensor."""
    if spec.batch_invariant and scale is None and not spec.per_act_token:
        raise ValueError(
            f"{name}: expected a static scale, or per_act_token=True{or_else}, with batch_invariant=True; got None, a "
            "dynamic scale per tensor, which depends on all tokens of the call"
        )


class Call(NamedTuple):
    """The arguments of one call, described but not yet checked against the layer."""

    hidden: Array
    ids: Array  # topk_ids; expert_num_tokens in the padded form
    topk_weights: Array | None  # None: the padded form
    out: Array | None
    a1_scale: Scale | None  # of the call, or else of the layer
    scale_given: bool  # it is that of the call

    @property
    def padded(self) -> bool:
        """Whether this is a call of the padded form."""
        return self.topk_weights is None

    def signature(self) -> Hashable:
        """All that the checks and the choice of launches depend on: addresses count by their alignment only."""
        scale = self.a1_scale
        return (
            self.hidden[1:], self.hidden.pointer % 16, self.ids[1:], self.topk_weights and self.topk_weights[1:],
            self.out and (self.out[1:], self.out.pointer % 16), self.scale_given,
            scale.info[1:] if isinstance(scale, Operand) else None,
        )


def describe_call(
    spec: LayerSpec, hidden_states: Any, ids: Any, topk_weights: Any, out: Any, a1_scale: Any, *, padded: bool
) -> Call:
    """Describe the arguments of a call: arrays of the layer's kind, on its device."""
    library, device = spec.library, spec.device
    scale = spec.a1_scale
    if a1_scale is not None:
        scale = checks.number("a1_scale", a1_scale)
        if scale is None:
            scale = Operand(a1_scale, checks.describe("a1_scale", a1_scale, library, device))
    return Call(
        checks.describe("hidden_states", hidden_states, library, device),
        checks.describe("expert_num_tokens" if padded else "topk_ids", ids, library, device),
        None if padded else checks.describe("topk_weights", topk_weights, library, device),
        None if out is None else checks.describe("out", out, library, device),
        scale,
        a1_scale is not None,
    )


def check_call(spec: LayerSpec, call: Call) -> None:
    """Check the arguments of a call against the layer."""
    hidden = call.hidden
    dtypes = (*checks.FLOATS, *checks.FP8)
    if call.topk_weights is None:
        if spec.apply_router_weight_on_input:
            raise ValueError(
                "apply_router_weight_on_input: expected False, since the padded form has no router weights; got True"
            )
        checks.expect("hidden_states", hidden, dtypes, (spec.num_experts, "max_tokens", spec.hidden_size))
        checks.expect("expert_num_tokens", call.ids, checks.INDICES, (spec.num_experts,))
    else:
        checks.expect("hidden_states", hidden, dtypes, ("M", spec.hidden_size), rows_only=True)
        checks.expect("topk_ids", call.ids, checks.INDICES, (hidden.shape[0], "topk"))
        checks.expect("topk_weights", call.topk_weights, ("float32",), call.ids.shape)
        if call.ids.shape[1] < 1:
            raise ValueError(f"topk_ids: expected at least one expert per token; got shape {call.ids.shape}")
        if spec.device != CPU and call.ids.shape[1] > checks.MOST_SLOTS:
            most = f"at most {checks.MOST_SLOTS} experts per token on a GPU"
            raise ValueError(f"topk_ids: expected {most}; got shape {call.ids.shape}")
    _check_hidden_scale(spec, call)
    if call.out is not None:
        allowed = (spec.out_dtype,) if spec.out_dtype else checks.FLOATS
        checks.expect("out", call.out, allowed, hidden.shape, rows_only=True)


def _check_hidden_scale(spec: LayerSpec, call: Call) -> None:
    hidden, scale = call.hidden, call.a1_scale
    if hidden.dtype in checks.FP8:
        per_token = (*hidden.shape[:-1], 1)
        if scale is None:
            raise ValueError(
                f"a1_scale: expected one scale, or one per token {per_token}, with fp8 hidden_states; got None"
            )
        if isinstance(scale, Operand):
            checks.expect("a1_scale", scale.info, ("float32",), *checks.ONE, per_token)
        return
    if call.scale_given:
        came = type(scale.array if isinstance(scale, Operand) else scale).__name__
        raise ValueError(
            f"a1_scale: expected None in a call with {hidden.dtype} hidden_states (it is the scale of fp8 ones); "
            f"got {came}"
        )
    _check_scale_of_all(spec, "a1_scale", scale, ", or fp8 hidden_states")
    if isinstance(scale, Operand) and scale.info.shape not in (*checks.ONE, (spec.num_experts,)):
        raise ValueError(
            f"a1_scale: expected one scale, or one per expert ({spec.num_experts},), with {hidden.dtype} "
            f"hidden_states; got {scale.info.shape} (one per token goes with fp8 hidden_states)"
        )
