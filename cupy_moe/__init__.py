# SPDX-License-Identifier: Apache-2.0
"""Fused fp8 Mixture-of-Experts layers for NVIDIA GPUs, from CUDA source compiled at run time."""

from cupy_moe._version import __version__
from cupy_moe.backend import backends
from cupy_moe.experts import Experts
from cupy_moe.fused import fused_experts
from cupy_moe.routing import Routing
from cupy_moe.routing_steps import gather_scales, route, shuffle_rows, topk_softmax
from cupy_moe.steps import activation_quantize, combine, grouped_gemm_fp8, quantize_fp8
from cupy_moe.workspace import Workspace

__all__ = [
    "Experts",
    "Routing",
    "Workspace",
    "__version__",
    "activation_quantize",
    "backends",
    "combine",
    "fused_experts",
    "gather_scales",
    "grouped_gemm_fp8",
    "quantize_fp8",
    "route",
    "shuffle_rows",
    "topk_softmax",
]
