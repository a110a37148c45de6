# SPDX-License-Identifier: Apache-2.0
"""Capture a call in a CUDA graph, then replay it with other tokens and other routing.

The host reads nothing that depends on the routing, so a replay is right for whatever the buffers hold by then. Needs a
GPU with a fast backend; without one the program says why and exits with status 2.
"""

import sys

import numpy as np

import cupy_moe

M, K, N, E, TOPK = 32, 1024, 768, 8, 2  # tokens, hidden size, intermediate size, experts, experts per token
REPLAYS = 5


def need_fast_backend():
    """Exit with the reasons if only the reference, which cannot be captured, is available."""
    status = cupy_moe.backends()
    if all(text != "available" for name, text in status.items() if name != "reference"):
        reasons = "".join(f"\n  {name}: {text}" for name, text in status.items() if name != "reference")
        print(f"this example needs a GPU with a fast backend:{reasons}", file=sys.stderr)
        sys.exit(2)


def main():
    need_fast_backend()
    import cupy

    rng = np.random.default_rng(0)
    w1, w1_scale = quantize_weights(cupy.asarray(rng.standard_normal((E, 2 * N, K), dtype=np.float32) / K**0.5))
    w2, w2_scale = quantize_weights(cupy.asarray(rng.standard_normal((E, K, N), dtype=np.float32) / N**0.5))
    experts = cupy_moe.Experts(w1, w2, w1_scale=w1_scale, w2_scale=w2_scale, per_act_token=True)

    # The buffers that the graph reads and writes.
    x = cupy.empty((M, K), cupy.float16)
    logits = cupy.empty((M, E), cupy.float32)
    y = cupy.empty((M, K), cupy.float16)

    def layer():
        topk_weights, topk_ids = cupy_moe.topk_softmax(logits, TOPK, renormalize=True)
        experts(x, topk_weights, topk_ids, out=y)
        return topk_weights, topk_ids

    def new_batch():
        x[...] = cupy.asarray(rng.standard_normal((M, K)).astype(np.float16))
        logits[...] = cupy.asarray(rng.standard_normal((M, E), dtype=np.float32))

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        new_batch()
        layer()  # once outside the graph: compiles the kernels, chooses the algorithms, takes the scratch memory
        stream.begin_capture()
        written = layer()  # the graph writes these arrays: they have to live as long as it does
        graph = stream.end_capture()

        for replay in range(REPLAYS):
            new_batch()
            graph.launch(stream)
            got = y.copy()
            rows = cupy_moe.route(written[1], E).expert_counts
            layer()  # the same batch, not from the graph
            stream.synchronize()
            assert bool(cupy.isfinite(got).all())
            assert bool((got == y).all())
            print(f"replay {replay}: {rows} rows per expert, the same bits as a call")


def quantize_weights(w):
    """Quantise (E, rows, cols) with one scale per row -> codes of the same shape, and (E, rows) scales."""
    q, scale = cupy_moe.quantize_fp8(w.reshape(-1, w.shape[2]), per_token=True)
    return q.reshape(w.shape), scale.reshape(w.shape[:2])


if __name__ == "__main__":
    main()
