# SPDX-License-Identifier: Apache-2.0
"""The layer step by step with NumPy: the same steps, in the same order, that a GPU runs as kernels."""

import numpy as np

import cupy_moe

M, K, N, E, TOPK = 37, 96, 80, 6, 3  # tokens, hidden size, intermediate size, experts, experts per token


def main():
    rng = np.random.default_rng(0)
    hidden_states = rng.standard_normal((M, K)).astype(np.float16)
    w1, w1_scale = quantize_weights(rng.standard_normal((E, 2 * N, K), dtype=np.float32))
    w2, w2_scale = quantize_weights(rng.standard_normal((E, K, N), dtype=np.float32))
    topk_weights, topk_ids = cupy_moe.topk_softmax(rng.standard_normal((M, E), dtype=np.float32), TOPK)

    # Sort the (token, slot) pairs by expert.
    routing = cupy_moe.route(topk_ids, E)
    print("rows of each expert:", *routing.expert_counts)

    # Quantise each token once, then bring the codes and their scales into expert order.
    codes, scales = cupy_moe.quantize_fp8(hidden_states, per_token=True)
    a1 = cupy_moe.shuffle_rows(codes, routing.dst2src_map)
    a1_scale = cupy_moe.gather_scales(scales, routing.dst2src_map)

    # GEMM 1 leaves the scales to the activation, which quantises again for GEMM 2.
    product = cupy_moe.grouped_gemm_fp8(a1, w1, routing.expert_offsets, out_dtype="float32")
    a2, a2_scale = cupy_moe.activation_quantize(
        product, "silu", per_token=True, x_scale=a1_scale, w_scale=w1_scale, row_experts=routing.row_experts
    )

    # GEMM 2 leaves its scales to the weighted sum over each token's slots.
    product = cupy_moe.grouped_gemm_fp8(a2, w2, routing.expert_offsets, out_dtype="float32")
    y = cupy_moe.combine(
        product, routing.src2dst_map, topk_weights=topk_weights, x_scale=a2_scale, w_scale=w2_scale,
        row_experts=routing.row_experts, out_dtype="float16",
    )

    in_one_call = cupy_moe.fused_experts(
        hidden_states, w1, w2, topk_weights, topk_ids, w1_scale=w1_scale, w2_scale=w2_scale, per_act_token=True
    )
    np.testing.assert_array_equal(y, in_one_call)
    print(f"{y.shape} {y.dtype}: the steps give the same bits as fused_experts")


def quantize_weights(w):
    """Quantise (E, rows, cols) with one scale per expert -> float8_e4m3fn of the same shape, and (E,) scales."""
    pairs = [cupy_moe.quantize_fp8(expert) for expert in w]
    return np.stack([q for q, _ in pairs]), np.concatenate([scale for _, scale in pairs])


if __name__ == "__main__":
    main()
