# SPDX-License-Identifier: Apache-2.0
"""The public layer: `Experts`, which calculates once what it can."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cupy_moe import arrays, checks, driver, reference, spec, tuning, validation
from cupy_moe import backend as backend_choice
from cupy_moe.arrays import Array
from cupy_moe.buffers import Buffers
from cupy_moe.launches import Matrix
from cupy_moe.pipeline import Addresses, CallShape, Layer, Plan, row_scale
from cupy_moe.spec import Call, LayerSpec, Operand
from cupy_moe.workspace import Workspace

PLANS_KEPT = 256


class Experts:
    """The experts of one MoE layer: fp8 weights, scales and options, ready to be called with tokens.

    Sizes: E experts held here, hidden size K, intermediate size N; R is 2N for gated activations (rows ``0..N-1`` of
    ``w1[e]`` gate, ``N..2N-1`` up) and N for the others. All arrays are of one kind (NumPy, CuPy or torch) and on one
    device; they are used in place and have to stay unchanged.

    Parameters
    ----------
    w1, w2
        (E, R, K) and (E, K, N): float8_e4m3fn, or uint8 holding its bits.
    w1_scale, w2_scale
        float32. Per tensor (E,), (E, 1) or (E, 1, 1); gate and up apart (E, 2), for ``w1`` only; per channel (E, R) or
        (E, R, 1), and (E, K) or (E, K, 1).
    a1_scale, a2_scale
        Scales of the activations in front of each GEMM. None: dynamic. A number, or an array (), (1,) or (1, 1):
        static. (E,): static per expert. ``a1_scale`` of fp8 hidden states: one, or (M, 1). From 2**-126 to 2**126.
    per_act_token
        Dynamic scales per token instead of per tensor.
    activation
        Gated, ``act(gate) * up``: "silu" ``x / (1 + exp(-x))``, "gelu" (with erf), "gelu_tanh" (its approximation, both
        Hendrycks and Gimpel 2016), and "swigluoai" of gpt-oss, ``g / (1 + exp(-1.702 g)) * (u + 1)`` with g = min(gate,
        7) and u = clip(up, -7, 7). Not gated: "silu_no_mul", "gelu_no_mul", "relu2_no_mul" ``max(x, 0)^2``
        (So et al. 2021).
    w1_bias, w2_bias
        (E, R) and (E, K): float16, bfloat16 or float32.
    expert_map
        (global_num_experts,) int32: global expert id to local one, or -1 for experts held elsewhere.
    apply_router_weight_on_input
        The router weight multiplies the hidden states instead of the output.
    out_dtype
        float16, bfloat16 or float32; None is that of the hidden states (bfloat16 if those are fp8).
    backend
        A name of `cupy_moe.backends`; None takes the first that is available there, on a GPU not the reference.
    batch_invariant
        A token's output has the same bits whichever other tokens share the call, in whatever number, order and routing.
        Takes a backend that promises it, and scales of activations that depend on the token alone: ``per_act_token``,
        static ones, or those that fp8 hidden states bring.
    workspace
        Scratch memory to share with other layers that run one after another on the same stream; None makes one. Calls
        on streams that may overlap need an `Experts` with a workspace of its own each.
    validate
        Check ``expert_map`` once, and the ids and hidden states of every call, and raise ValueError; costs a device
        synchronisation, so such calls cannot be captured.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument: the message names it, what came and what is allowed.
    RuntimeError
        If the backend is not available here; the message says why and what to do.
    """

    def __init__(
        self, w1: Any, w2: Any, *, w1_scale: Any, w2_scale: Any, a1_scale: Any = None, a2_scale: Any = None,
        per_act_token: bool = False, activation: str = "silu", w1_bias: Any = None, w2_bias: Any = None,
        expert_map: Any = None, apply_router_weight_on_input: bool = False, out_dtype: Any = None,
        backend: str | None = None, batch_invariant: bool = False, workspace: Workspace | None = None,
        validate: bool = False,
    ) -> None:
        options = locals().copy()
        for name in ("self", "backend", "workspace"):
            del options[name]
        self._setup(spec.layer_spec(**options), backend, workspace)

    @classmethod
    def _of(cls, checked: LayerSpec, backend: str | None, workspace: Workspace | None) -> Experts:
        self = cls.__new__(cls)
        self._setup(checked, backend, workspace)
        return self

    def _setup(self, checked: LayerSpec, backend: str | None, workspace: Workspace | None) -> None:
        if not isinstance(workspace, Workspace | None):
            raise TypeError(f"workspace: expected a cupy_moe.Workspace or None; got {type(workspace).__name__}")
        # Looked at first: the choice may try a library out, which a capture does not survive.
        if checked.device != arrays.CPU and arrays.is_capturing(checked.library, checked.device):
            raise RuntimeError("Experts has to be made, and called once, before the capture of a CUDA graph begins")
        self._spec = checked
        self._backend = backend_choice.choose(checked.device, backend, batch_invariant=checked.batch_invariant)
        self._plans: dict[Hashable, Plan] = {}
        self._workspace = workspace or Workspace()
        self._captured = False
        if checked.validate:
            validation.check_map(checked)
        if self._backend != "reference":
            with arrays.numeric_scope(checked.library, checked.device):
                self._layer = Layer(checked, self._backend)

    def __reduce__(self) -> Any:
        raise TypeError("Experts can be neither copied nor pickled, since it holds addresses: make it from its weights")

    def __repr__(self) -> str:
        own = self._spec
        sizes = f"E={own.num_experts}, K={own.hidden_size}, N={own.intermediate_size}"
        return f"<Experts {sizes}, {own.activation}, {self._backend} on {checks.place(own.device)}>"

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._backend

    def explain(self) -> str:
        """Which backend runs, and in one sentence each why the others do not."""
        own = self._spec
        return backend_choice.explain(own.device, self._backend, batch_invariant=own.batch_invariant)

    def __call__(
        self, hidden_states: Any, topk_weights: Any, topk_ids: Any, out: Any = None, *, a1_scale: Any = None
    ) -> Any:
        """Run the layer.

        Parameters
        ----------
        hidden_states
            (M, K) float16, bfloat16 or float32, any distance between rows; or fp8.
        topk_weights, topk_ids
            (M, topk) float32; (M, topk) int32 or int64. An id that is negative, out of range or mapped to -1 adds
            nothing to the output.
        out
            Where to write the result, (M, K) with any distance between rows, ``hidden_states`` itself too; None
            allocates it with the caller's library.
        a1_scale
            Scale of fp8 hidden states: a number, or float32 (), (1,), (1, 1) or (M, 1); None is that of the layer.

        Returns
        -------
        array (M, K) of the kind of ``hidden_states`` and of ``out_dtype``

        Raises
        ------
        TypeError, ValueError
            For a wrong argument: the message names it, what came and what is allowed.
        RuntimeError
            In a CUDA graph capture that waits for the device, by ``validate`` or the reference.
        """
        call = spec.describe_call(self._spec, hidden_states, topk_ids, topk_weights, out, a1_scale, padded=False)
        if self._backend != "reference" and not self._spec.validate:
            return self._run(call, out)
        arrays_of_call = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids}
        return self._run_slowly(call, out, validation.check_tokens, reference.fused_experts, arrays_of_call)

    def batched(self, hidden_states: Any, expert_num_tokens: Any, out: Any = None, *, a1_scale: Any = None) -> Any:
        """Run the layer on tokens that a dispatcher (PPLX, DeepEP) has already sorted into a padded batch.

        Parameters
        ----------
        hidden_states
            (E, max_tokens, K), contiguous; the dtypes of a call. What lies behind an expert's last token is not used.
        expert_num_tokens
            (E,) int32 or int64: tokens of each expert.
        out
            (E, max_tokens, K) or None. Rows behind an expert's last token are left as they are, whatever is in a new
            array (the reference writes zeros).
        a1_scale
            Scale of fp8 hidden states: one, or (E, max_tokens, 1); None is that of the layer.

        Returns
        -------
        array (E, max_tokens, K) of the kind of ``hidden_states`` and of ``out_dtype``, not weighted; ``expert_map``
        has no part in it

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for a call.
        """
        call = spec.describe_call(self._spec, hidden_states, expert_num_tokens, None, out, a1_scale, padded=True)
        if self._backend != "reference" and not self._spec.validate:
            return self._run(call, out)
        arrays_of_call = {"hidden_states": hidden_states, "expert_num_tokens": expert_num_tokens}
        return self._run_slowly(call, out, validation.check_padded, reference.batched, arrays_of_call)

    def workspace_nbytes(self, M: int, topk: int) -> int:
        """Bytes of scratch memory that a call takes, from a `Workspace`.

        Parameters
        ----------
        M, topk
            Tokens and experts per token; for `batched`, E * max_tokens and 1.

        Returns
        -------
        int
            0 where the reference runs.
        """
        rows = checks.count("M", M, 0) * checks.count("topk", topk, 1)
        return 0 if self._backend == "reference" else Buffers(self._layer, rows).nbytes

    def tune(self, M: int | Sequence[int] | None = None, *, topk: int) -> dict[str, tuning.Record]:
        """Time the variants of both GEMMs on this layer's weights, and take the fastest from now on.

        They are kept in a file too, in the folder CUPY_MOE_CACHE_DIR or else in ``cupy_moe`` in the user's folder of
        caches, for other processes with the same device, backend (with its version) and shape. Variants are tiles of
        `sm90` and `mma`, and algorithms of `cublaslt`. What is not tuned runs a good default, which also stays unless
        another variant takes at least 2 % less time: a smaller difference between products need not be one of calls.

        Results may change by their rounding, but not with ``batch_invariant``. CUDA graphs captured before stay as
        they are. Takes seconds, and memory beside the workspace.

        Parameters
        ----------
        M
            Numbers of tokens, each for all with the same power of two of rows that the experts here can expect; None:
            1, 2, 4, ... 4096.
        topk
            Experts per token, which are drawn uniformly. For `batched` 1, and E * max_tokens as ``M``.

        Returns
        -------
        dict
            What was found, by its key: the choice, its microseconds ``us``, and those of the default, ``default_us``.
            Empty where the reference runs.

        Raises
        ------
        TypeError, ValueError
            For a wrong number.
        RuntimeError
            While a CUDA graph is being captured.
        """
        own = self._spec
        tokens = tuning.tokens_of("M", M)
        topk = checks.count("topk", topk, 1, own.expert_map.info.shape[0] if own.expert_map else own.num_experts)
        records: dict[str, tuning.Record] = {}
        if self._backend == "reference":
            return records
        with self._workspace.lock, arrays.numeric_scope(own.library, own.device):
            if arrays.is_capturing(own.library, own.device):
                raise RuntimeError("Experts.tune cannot run while a CUDA graph is being captured; call it before")
            for each in tokens:
                records = {**self._layer.tune(each, topk, self._workspace), **records}
        tuning.CACHE.store(records)
        return records

    def _run(self, call: Call, out: Any) -> Any:
        """Enqueue a call on the GPU: look up its launches, set the addresses that change, launch."""
        library, device = self._spec.library, self._spec.device
        with self._workspace.lock, arrays.on_device(device):
            signature = call.signature()
            plan = self._plans.get(signature)
            if plan is None or plan.generation != self._workspace.generation or plan.tuned != tuning.CACHE.generation:
                plan = self._prepare(signature, call)
            if out is None:
                out = library.empty(call.hidden.shape, plan.shape.out.dtype, device)
            if plan.shape.tokens:
                stream = library.stream(device)
                capturing = driver.is_capturing(stream)
                if capturing:
                    self._captured = True
                    self._workspace.note_capture()
                at = Addresses(
                    call.hidden.pointer, call.ids.pointer, call.topk_weights.pointer if call.topk_weights else 0,
                    row_scale(call.a1_scale), call.out.pointer if call.out else library.pointer(out),
                )
                plan(stream, at, capturing=capturing)
        return out

    def _prepare(self, signature: Hashable, call: Call) -> Plan:
        """Check a call of a new signature and make its plan."""
        spec.check_call(self._spec, call)
        hidden, ids, scale = call.hidden, call.ids, call.a1_scale
        tokens, topk = (hidden.shape[0] * hidden.shape[1], 1) if call.padded else ids.shape
        # A new array is aligned well enough for anything.
        new = Matrix(0, self._spec.hidden_size, self._spec.result_dtype(hidden.dtype))
        shape = CallShape(
            tokens, topk, hidden.shape[1] if call.padded else 0, _matrix(hidden),
            _matrix(call.out) if call.out else new, ids.dtype,
            row_scale(scale).row_stride,
        )
        with arrays.numeric_scope(self._spec.library, self._spec.device):
            plan = Plan(self._layer, shape, self._workspace)
        self._plans[signature] = plan
        if len(self._plans) > PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        return plan

    def _run_slowly(
        self, call: Call, out: Any, validate: Callable[..., None], function: Any, arrays_of_call: dict[str, Any]
    ) -> Any:
        """A call whose data the host looks at, or that the reference runs."""
        own = self._spec
        spec.check_call(own, call)
        if own.device != arrays.CPU and arrays.is_capturing(own.library, own.device):
            what = "validate=True" if own.validate else "backend='reference'"
            raise RuntimeError(f"a call with {what} waits for the device, which a CUDA graph cannot capture")
        if own.validate:
            validate(own, **arrays_of_call)
        if self._backend == "reference":
            return self._run_reference(function, arrays_of_call, call, out)
        return self._run(call, out)

    def _run_reference(self, function: Any, arrays_of_call: dict[str, Any], call: Call, out: Any) -> Any:
        own, scale = self._spec, call.a1_scale
        library = own.library
        if out is None:
            out = library.empty(call.hidden.shape, own.result_dtype(call.hidden.dtype), own.device)
        else:
            checks.writable("out", out)
        with arrays.numeric_scope(library, own.device):
            operands = {
                name: library.to_numeric(x.array) if isinstance(x, Operand) else x
                for name, x in own.operands().items()
            }
            if scale is not None:
                operands["a1_scale"] = library.to_numeric(scale.array) if isinstance(scale, Operand) else scale
            names = ("per_act_token", "activation", "batch_invariant")
            options: dict[str, Any] = {name: getattr(own, name) for name in names}
            if function is reference.batched:
                del operands["expert_map"]
            else:
                options["apply_router_weight_on_input"] = own.apply_router_weight_on_input
            numeric = {name: library.to_numeric(x) for name, x in arrays_of_call.items()}
            function(**numeric, **operands, **options, out=library.to_numeric(out))
        return out


def _matrix(x: Array) -> Matrix:
    """Rows of an array, with its alignment for an address: what the choice of a kernel depends on."""
    return Matrix.of(x._replace(pointer=x.pointer % 16))
