# SPDX-License-Identifier: Apache-2.0
"""The layers and GEMMs that cupy_moe is measured beside.

``VllmLayer`` drives the compiled operators of vLLM 0.22.1 in the order of its non-batched, non-blockwise fp8
CUTLASS path; ``TorchGroupedGemms`` is the two grouped GEMMs alone, through ``torch._scaled_grouped_mm``. What
a machine does not have raises ``PeerUnavailable`` with the reason.
"""

from __future__ import annotations

import importlib.util
import lzma
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.cases import Inputs, Weights, scheme_of
from benchmarks.expected import largest_activation, quantize

LIBRARIES = ("_C_stable_libtorch.abi3.so", "_moe_C.abi3.so")

# Argument names of the operators used, as this build of vLLM registers them: another build is refused here
# instead of being called with arguments in the wrong places.
OPERATORS: dict[str, str] = {
    "_C::dynamic_scaled_fp8_quant": "result input scale",
    "_C::dynamic_per_token_scaled_fp8_quant": "result input scale scale_ub",
    "_C::get_cutlass_moe_mm_problem_sizes_from_expert_offsets": "expert_first_token_offset problem_sizes1 "
    "problem_sizes2 n k swap_ab",
    "_C::cutlass_moe_mm": "out_tensors a_tensors b_tensors a_scales b_scales expert_offsets problem_sizes "
    "a_strides b_strides c_strides per_act_token per_out_ch",
    "_C::silu_and_mul": "result input",
    "_moe_C::moe_permute": "input topk_ids token_expert_indices expert_map n_expert n_local_expert topk "
    "permuted_input expert_first_token_offset inv_permuted_idx permuted_idx",
    "_moe_C::moe_unpermute": "permuted_hidden_states topk_weights inv_permuted_idx "
    "expert_first_token_offset topk hidden_states",
}


class PeerUnavailable(RuntimeError):
    """A peer cannot run here; the message says why."""


def _check_operators() -> None:
    problems = []
    for name, expected in OPERATORS.items():
        namespace, operator = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is None:
            problems.append(f"{name} is not registered")
            continue
        found = " ".join(argument.name for argument in packet.default._schema.arguments)
        if found != expected:
            problems.append(f"{name} takes ({found}), not ({expected})")
    if problems:
        raise PeerUnavailable("these are not the operators of vLLM 0.22.1: " + "; ".join(problems))


def _load_library(folder: Path, name: str, scratch: Path) -> None:
    path, packed = folder / name, folder / (name + ".xz")
    if not path.exists():
        if not packed.exists():
            raise PeerUnavailable(f"{folder} has neither {path.name} nor {packed.name}")
        path = scratch / name
        with lzma.open(packed) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{error} {error.__cause__ or ''}"
        raise PeerUnavailable(
            f"torch {torch.__version__} cannot load {name}, built for torch 2.11 with CUDA 13: {reason}"
        ) from error


def load_vllm_ops(ops_dir: str | None = None) -> None:
    """Register vLLM's operators in ``torch.ops._C`` and ``torch.ops._moe_C``, once.

    Parameters
    ----------
    ops_dir : folder with ``_C_stable_libtorch.abi3.so`` and ``_moe_C.abi3.so``, or these with ``.xz`` added.
        None takes an installed vLLM's folder (vLLM itself is not imported).

    Raises
    ------
    PeerUnavailable
        Naming the missing file, or each operator that is missing or has other arguments.

    """
    if not (hasattr(torch.ops._C, "cutlass_moe_mm") and hasattr(torch.ops._moe_C, "moe_permute")):
        if ops_dir is None:
            spec = importlib.util.find_spec("vllm")
            if spec is None or not spec.submodule_search_locations:
                raise PeerUnavailable(f"vLLM is not installed, and no folder with {LIBRARIES} was given")
            ops_dir = spec.submodule_search_locations[0]
        with tempfile.TemporaryDirectory() as scratch:  # a loaded library outlives its file
            for name in LIBRARIES:
                _load_library(Path(ops_dir), name, Path(scratch))
    _check_operators()


class VllmLayer:
    """vLLM's fp8 MoE layer: operators, order, buffers and helper launches of ``run_cutlass_moe_fp8``.

    All tokens go through in one pass, as in vLLM, whose versions that cut a call into chunks begin at more than
    16384 tokens.

    Parameters
    ----------
    w1, w2 : (E, 2N, K), (E, K, N) float8_e4m3fn CUDA tensors
    w1_scale, w2_scale : float32, (E,) each (then per-tensor activations), or (E, 2N) and (E, K) (per-token)
    topk : experts per token
    ops_dir : see ``load_vllm_ops``

    """

    name = "vllm"

    def __init__(
        self,
        w1: torch.Tensor,
        w2: torch.Tensor,
        w1_scale: torch.Tensor,
        w2_scale: torch.Tensor,
        topk: int,
        ops_dir: str | None = None,
    ) -> None:
        load_vllm_ops(ops_dir)
        self.scheme = scheme_of(w1, w2, w1_scale, w2_scale)
        self._per_token = self.scheme == "token"
        self._w1, self._w2, self.topk = w1, w2, topk
        self._w1_scale, self._w2_scale = w1_scale.float().contiguous(), w2_scale.float().contiguous()
        self._experts, self._k, self._n = w2.shape
        # Row lengths per expert: of both operands and of the product, for either GEMM.
        ones = torch.ones(self._experts, dtype=torch.int64, device=w1.device)
        self._ab_strides1, self._c_strides1 = ones * self._k, ones * (2 * self._n)
        self._ab_strides2, self._c_strides2 = ones * self._n, ones * self._k
        self._kept: dict[tuple[int, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def _buffers(self, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Views of two buffers, kept between calls as vLLM's workspace manager keeps them, for one number of rows.

        What a buffer holds is consumed before its next view is written: the sorted codes, the activation and
        product 2 share one; product 1 and the activation's codes the other.
        """
        if (rows, dtype) not in self._kept:
            k, n, device = self._k, self._n, self._w1.device
            self._kept.clear()  # a graph of a call with other rows is done by now
            first = torch.empty(rows * max(2 * n, k), dtype=dtype, device=device)
            second = torch.empty(rows * max(n, k), dtype=dtype, device=device)
            self._kept[rows, dtype] = (
                second.view(torch.float8_e4m3fn)[: rows * k].view(rows, k),
                first[: rows * 2 * n].view(rows, 2 * n),
                second[: rows * n].view(rows, n),
                first.view(torch.float8_e4m3fn)[: rows * n].view(rows, n),
                second[: rows * k].view(rows, k),
            )
        return self._kept[rows, dtype]

    def _quantize(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Writes ``codes``; the scale, ``(rows, 1)`` or ``(1,)``."""
        if self._per_token:
            scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
            torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, x, scale, None)
        else:
            scale = torch.empty(1, dtype=torch.float32, device=x.device)  # the operator zeroes it itself
            torch.ops._C.dynamic_scaled_fp8_quant(codes, x, scale)
        return scale

    def _permute(
        self, codes: torch.Tensor, scale: torch.Tensor, topk_ids: torch.Tensor, permuted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Writes the rows in expert order to ``permuted``; their scales, the offsets and the inverse map."""
        tokens, topk = topk_ids.shape
        rows, device = tokens * topk, codes.device
        token_expert_indices = torch.arange(0, rows, dtype=torch.int32, device=device).reshape(tokens, topk)
        offsets = torch.empty(self._experts + 1, dtype=torch.int64, device=device)
        permuted_idx = torch.full((rows,), rows, dtype=torch.int32, device=device)
        inverse = torch.empty((tokens, topk), dtype=torch.int32, device=device)
        torch.ops._moe_C.moe_permute(
            codes, topk_ids.to(torch.int32), token_expert_indices, None, self._experts, self._experts, topk,
            permuted, offsets, inverse, permuted_idx,
        )
        if scale.dim() > 1:
            scale = scale[permuted_idx.clamp(max=rows - 1) // topk]
        return scale, offsets, inverse.flatten()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(M, K)`` like ``hidden_states`` (float16 or bfloat16); safe in graph capture after one call.

        ``topk_weights (M, topk)`` float32, ``topk_ids (M, topk)`` int32, every id valid.
        """
        tokens, k = hidden_states.shape
        if hidden_states.dtype not in (torch.float16, torch.bfloat16) or k != self._k:
            raise TypeError(
                f"hidden_states must be float16 or bfloat16 (M, {self._k}), got {hidden_states!r}"
            )
        if topk_ids.shape != (tokens, self.topk) or topk_weights.shape != topk_ids.shape:
            raise ValueError(f"topk_ids, topk_weights must be {(tokens, self.topk)}, got {topk_ids.shape}")
        rows, n, device = tokens * self.topk, self._n, self._w1.device
        permuted, product1, activated, activated_codes, product2 = self._buffers(rows, hidden_states.dtype)
        codes = torch.empty((tokens, k), dtype=torch.float8_e4m3fn, device=device)
        sizes1 = torch.empty((self._experts, 3), dtype=torch.int32, device=device)
        sizes2 = torch.empty_like(sizes1)
        by_row = self._per_token

        scale = self._quantize(hidden_states, codes)
        scale, offsets, inverse = self._permute(codes, scale, topk_ids, permuted)
        # Up to 64 rows the GEMM kernels swap their operands, and so must the problem sizes.
        torch.ops._C.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(
            offsets, sizes1, sizes2, n, k, rows <= 64
        )
        torch.ops._C.cutlass_moe_mm(
            product1, permuted, self._w1, scale, self._w1_scale, offsets[:-1], sizes1,
            self._ab_strides1, self._ab_strides1, self._c_strides1, by_row, by_row,
        )
        torch.ops._C.silu_and_mul(activated, product1)
        scale = self._quantize(activated, activated_codes)
        torch.ops._C.cutlass_moe_mm(
            product2, activated_codes, self._w2, scale, self._w2_scale, offsets[:-1], sizes2,
            self._ab_strides2, self._ab_strides2, self._c_strides2, by_row, by_row,
        )
        result = torch.empty_like(hidden_states) if out is None else out
        torch.ops._moe_C.moe_unpermute(product2, topk_weights, inverse, offsets, self.topk, result)
        return result


class TorchGroupedGemms:
    """The layer's two grouped GEMMs alone: ``torch._scaled_grouped_mm``, row-wise scales, bfloat16 out.

    ``prepare`` sorts and quantises one call's rows, outside the timed part; a call runs the two GEMMs;
    ``combine`` turns their result into the layer's output, for the check.
    """

    name = "torch"

    def __init__(self, weights: Weights, topk: int) -> None:
        if not hasattr(torch, "_scaled_grouped_mm"):
            raise PeerUnavailable(f"torch {torch.__version__} has no _scaled_grouped_mm")
        capability = torch.cuda.get_device_capability()
        if capability not in ((9, 0), (10, 0)):
            raise PeerUnavailable(f"torch._scaled_grouped_mm needs capability 9.0 or 10.0, not {capability}")
        experts, k, n = weights.w2.shape
        if k % 16 or n % 16:
            raise PeerUnavailable(f"torch._scaled_grouped_mm needs multiples of 16, not K={k}, N={n}")
        self.topk, self._n, self._per_token = topk, n, weights.scheme == "token"
        # (E, K, 2N) and (E, N, K) as transposed views, and a scale for each of their columns.
        self._b1, self._b2 = weights.w1.transpose(1, 2), weights.w2.transpose(1, 2)
        self._b1_scale = weights.w1_scale.reshape(experts, -1).expand(experts, 2 * n).contiguous()
        self._b2_scale = weights.w2_scale.reshape(experts, -1).expand(experts, k).contiguous()
        self._operands: list[tuple[torch.Tensor, ...]] = []

    def _quantize(self, x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = quantize(x, self._per_token, amax)
        return codes, scale.reshape(-1).expand(x.shape[0]).contiguous()

    def _multiply(self, a: torch.Tensor, b: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        return torch._scaled_grouped_mm(
            a, b, *scales, offs=self._ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def prepare(self, inputs: Inputs) -> None:
        """Sort and quantise the rows of this call, and the activation between the GEMMs."""
        self._topk_weights = inputs.topk_weights
        flat = inputs.topk_ids.flatten().long()
        order = torch.argsort(flat, stable=True)
        self._inverse = torch.argsort(order)
        self._ends = torch.cumsum(torch.bincount(flat, minlength=self._b1.shape[0]), 0).to(torch.int32)
        codes, scale = self._quantize(inputs.hidden_states)
        source = order // self.topk
        codes = codes.view(torch.uint8)[source].view(torch.float8_e4m3fn)
        first = (codes, self._b1, scale[source].contiguous(), self._b1_scale)
        product = self._multiply(*first).float()
        activated = torch.nn.functional.silu(product[:, : self._n]) * product[:, self._n :]
        # One scale for all is that of the definition: the maximum of bfloat16 products moves the codes of all rows.
        amax = None if self._per_token else largest_activation(inputs)
        activated_codes, activated_scale = self._quantize(activated, amax)
        self._operands = [first, (activated_codes, self._b2, activated_scale, self._b2_scale)]

    def __call__(self) -> torch.Tensor:
        """Both GEMMs on the prepared rows; the second's product ``(rows, K)`` bfloat16, in expert order."""
        first, second = self._operands
        self._multiply(*first)
        return self._multiply(*second)

    def combine(self, product: torch.Tensor) -> torch.Tensor:
        """The layer's output ``(M, K)`` float32 from the second product."""
        rows = product[self._inverse].float().view(*self._topk_weights.shape, -1)
        return (rows * self._topk_weights[..., None]).sum(dim=1)
