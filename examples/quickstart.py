# SPDX-License-Identifier: Apache-2.0
"""Quantise the weights, route the tokens, run the layer, check the result and time it.

Runs on a GPU through CuPy where there is one, otherwise on the CPU with NumPy.
"""

import platform
import time

import numpy as np

import cupy_moe

M, K, N, E, TOPK = 64, 1024, 2048, 8, 2  # tokens, hidden size, intermediate size, experts, experts per token


def pick_library():
    """Return CuPy, or NumPy and why it is not CuPy."""
    try:
        import cupy
    except ImportError as error:
        return np, str(error)
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return np, str(error)
    return cupy, ""


def float32_layer(x, w1, w2, topk_weights, topk_ids):
    """Compute the same layer with NumPy in float32: nothing is quantised."""
    y = np.zeros_like(x)
    for expert in range(E):
        tokens, slots = np.nonzero(topk_ids == expert)
        gate, up = np.split(x[tokens] @ w1[expert].T, 2, axis=1)
        rows = (gate / (1 + np.exp(-gate)) * up) @ w2[expert].T
        np.add.at(y, tokens, topk_weights[tokens, slots, None] * rows)
    return y


def relative_error(got, want):
    """Frobenius norm of the difference, relative to that of `want`."""
    return float(np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want))


def quantize_weights(w):
    """Quantise (E, rows, cols) with one scale per row -> codes of the same shape, and (E, rows) scales."""
    q, scale = cupy_moe.quantize_fp8(w.reshape(-1, w.shape[2]), per_token=True)
    return q.reshape(w.shape), scale.reshape(w.shape[:2])


def main():
    xp, reason = pick_library()
    on_gpu = xp is not np
    if on_gpu:
        print("device  ", xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())["name"].decode())
    else:
        print(f"device   CPU ({platform.machine()}), through NumPy: no GPU through CuPy ({reason})")

    rng = np.random.default_rng(0)
    hidden_states = rng.standard_normal((M, K), dtype=np.float32)
    w1 = rng.standard_normal((E, 2 * N, K), dtype=np.float32) / K**0.5
    w2 = rng.standard_normal((E, K, N), dtype=np.float32) / N**0.5
    logits = rng.standard_normal((M, E), dtype=np.float32)

    # Once, when the model is loaded.
    q1, w1_scale = quantize_weights(xp.asarray(w1))
    q2, w2_scale = quantize_weights(xp.asarray(w2))
    # backends() lists the preferred one first. Where none is available, the reference has to be asked for by name.
    backend = next(name for name, status in cupy_moe.backends().items() if status == "available")
    experts = cupy_moe.Experts(
        q1, q2, w1_scale=w1_scale, w2_scale=w2_scale, per_act_token=True, out_dtype="float32", backend=backend
    )
    print("backend  " + experts.explain().replace("\n", "\n         "))

    # For each batch of tokens.
    x = xp.asarray(hidden_states)
    topk_weights, topk_ids = cupy_moe.topk_softmax(xp.asarray(logits), TOPK, renormalize=True)
    y = experts(x, topk_weights, topk_ids)
    print(f"shapes   hidden_states {x.shape}, w1 {q1.shape}, w2 {q2.shape}, topk_ids {topk_ids.shape}, y {y.shape}")

    def to_numpy(array):
        return array.get() if on_gpu else array

    weights, ids = to_numpy(topk_weights), to_numpy(topk_ids)
    error = relative_error(to_numpy(y), float32_layer(hidden_states, w1, w2, weights, ids))
    print(f"error    {error:.1e} against the layer in float32, nothing quantised (limit 8e-2)")
    assert error < 8e-2
    if on_gpu:
        codes = map(to_numpy, (q1, q2))
        scales = {"w1_scale": to_numpy(w1_scale), "w2_scale": to_numpy(w2_scale)}
        want = cupy_moe.fused_experts(hidden_states, *codes, weights, ids, **scales, per_act_token=True)
        error = relative_error(to_numpy(y), want)
        print(f"error    {error:.1e} against the NumPy reference (limit 1e-2)")
        assert error < 1e-2

    calls = 3 if backend == "reference" else 200
    start = time.perf_counter()
    for _ in range(calls):
        experts(x, topk_weights, topk_ids, out=y)
    if on_gpu:
        xp.cuda.get_current_stream().synchronize()
    print(f"time     {(time.perf_counter() - start) / calls * 1e3:.3g} ms per call, launched one by one from Python")


if __name__ == "__main__":
    main()
