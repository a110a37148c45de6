# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer of models that people serve, as their configurations have them."""

Shape = tuple[int, int, int, int]
"""``(E, topk, K, N)``: experts, experts per token, hidden size, intermediate size."""

MODELS: dict[str, Shape] = {
    "Mixtral 8x7B": (8, 2, 4096, 14336),
    "Llama 4 Scout": (16, 1, 5120, 8192),
    "GLM-4.5-Air": (128, 8, 4096, 1408),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Qwen3-235B-A22B": (128, 8, 4096, 1536),
    "Qwen3-Next-80B-A3B": (512, 10, 2048, 512),
    "DeepSeek-V3": (256, 8, 7168, 2048),
}
