# SPDX-License-Identifier: Apache-2.0
"""A torch module with the router and the experts of one MoE layer, eager and under torch.compile.

On a CUDA device CuPy and torch share memory and stream; without one, torch tensors on the CPU run the reference.
"""

import torch
from torch import nn

import cupy_moe

M, K, N, E, TOPK = 48, 512, 768, 8, 2  # tokens, hidden size, intermediate size, experts, experts per token
LAYERS = {}  # by name: an operator of torch takes no Experts; put both into a module of your own, imported once


# What a call launches are no operators of torch, so torch.compile has to be told what comes out of it.
@torch.library.custom_op("example::moe", mutates_args=())
def moe(tokens: torch.Tensor, logits: torch.Tensor, topk: int, layer: str) -> torch.Tensor:
    """(M, K) and the router's (M, E) -> (M, K)."""
    topk_weights, topk_ids = cupy_moe.topk_softmax(logits, topk, renormalize=True)
    return LAYERS[layer](tokens, topk_weights, topk_ids)


@moe.register_fake
def _(tokens, logits, topk, layer):
    return torch.empty_like(tokens)


class MoE(nn.Module):
    """Router and experts.

    Parameters
    ----------
    router
        (E, K) float32: in bfloat16 many logits would be equal.
    w1, w2
        (E, 2N, K), gates then ups, and (E, K, N); quantised here with one scale per row.
    name
        Of the layer, each its own.
    """

    def __init__(self, router, w1, w2, topk, name):
        super().__init__()
        self.topk, self.name = topk, name
        self.register_buffer("router", router)
        # `Experts` holds tensors, not parameters: make the module on the device where it will run.
        q1, w1_scale = quantize_weights(w1)
        q2, w2_scale = quantize_weights(w2)
        if name in LAYERS:
            raise ValueError(f"there is a layer called {name!r} already")
        LAYERS[name] = cupy_moe.Experts(
            q1, q2, w1_scale=w1_scale, w2_scale=w2_scale, per_act_token=True, backend=available_backend(w1.device)
        )

    def forward(self, x):
        """(..., K) -> (..., K)."""
        tokens = x.reshape(-1, x.shape[-1])
        return moe(tokens, tokens.float() @ self.router.T, self.topk, self.name).reshape(x.shape)


def quantize_weights(w):
    """Quantise (E, rows, cols) with one scale per row -> float8_e4m3fn of the same shape, and (E, rows) scales."""
    q, scale = cupy_moe.quantize_fp8(w.reshape(-1, w.shape[2]), per_token=True)
    return q.reshape(w.shape), scale.reshape(w.shape[:2])


def available_backend(device):
    """Return the first backend that is available on `device`."""
    if device.type == "cpu":
        return "reference"
    return next(name for name, status in cupy_moe.backends(device.index).items() if status == "available")


def pick_device():
    """Return the current CUDA device if torch and CuPy both have one, else the CPU and why."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "torch finds no CUDA device"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return torch.device("cpu"), f"CuPy is needed for a CUDA device ({error})"
    return torch.device("cuda", torch.cuda.current_device()), ""


def float32_layer(x, router, w1, w2):
    """Compute the same layer with torch in float32, the experts not quantised."""
    topk_weights, topk_ids = (x.float() @ router.T).softmax(dim=1).topk(TOPK)
    topk_weights = topk_weights / topk_weights.sum(dim=1, keepdim=True)
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(E):
        tokens, slots = torch.where(topk_ids == expert)
        gate, up = (x[tokens].float() @ w1[expert].float().T).chunk(2, dim=1)
        rows = (nn.functional.silu(gate) * up) @ w2[expert].float().T
        y.index_add_(0, tokens, topk_weights[tokens, slots, None] * rows)
    return y


@torch.inference_mode()
def main():
    device, reason = pick_device()
    print("device  ", torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {reason}")
    torch.manual_seed(0)
    like = {"device": device, "dtype": torch.bfloat16}
    router = torch.randn(E, K, device=device)
    w1 = torch.randn(E, 2 * N, K, **like) / K**0.5
    w2 = torch.randn(E, K, N, **like) / N**0.5
    x = torch.randn(3, M // 3, K, **like)

    layer = MoE(router, w1, w2, TOPK, "layer 0")
    print("backend  " + LAYERS["layer 0"].explain().replace("\n", "\n         "))
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.device == x.device
    # As with torch's default backend; this one needs no C++ compiler.
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), y)

    want = float32_layer(x.reshape(M, K), router, w1, w2).reshape(x.shape)
    error = float((y.float() - want).norm() / want.norm())
    print(f"error    {error:.1e} against the layer in float32, the experts not quantised (limit 8e-2)")
    assert error < 8e-2


if __name__ == "__main__":
    main()
