# SPDX-License-Identifier: Apache-2.0
"""What the layer has to give: float32 in plain torch, for all tokens of a call or for a sample of them.

A layer's result for a token depends on the other tokens only through the two scales of scheme ``"tensor"``. A sample is
calculated with the scales of the whole call, so it is held to the same limits as a call that is checked whole.
"""

from __future__ import annotations

import torch

from benchmarks.cases import FP8_MAX, Inputs, Weights

SAMPLE = 256
"""Tokens checked of a call with more than twice as many."""
_HALF_UNIT = 2.0**-8
"""Codes times this are exact in float16, and no sum of products of a layer here exceeds its range."""
_ROWS_AT_ONCE = 4096


def sample_of(tokens: int, device: str | torch.device) -> torch.Tensor | None:
    """The tokens of a call that are checked, ``(SAMPLE,)`` int64 in ascending order; None: all of them."""
    if tokens <= 2 * SAMPLE:
        return None
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))[:SAMPLE]
    return chosen.sort().values.to(device)


def quantize(
    x: torch.Tensor, per_token: bool, amax: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 codes of ``x (rows, C)`` and their float32 scale, ``(rows, 1)`` or ``(1,)``; ``amax`` is that of ``x``."""
    x = x.float()
    if amax is None:
        amax = x.abs().amax(dim=1, keepdim=True) if per_token else x.abs().amax()
    # torch multiplies by the reciprocal of a number. The last bit of the scale decides where x / scale lies halfway
    # between two codes, as one half-precision x in a few hundred may.
    amax = amax.float().clamp_min(1e-30)
    scale = amax / torch.full_like(amax, FP8_MAX)
    scale = scale if per_token else scale.reshape(1)
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def references(inputs: Inputs, sample: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in float32, twice ``(M, K)``: with quantised activations, and without.

    Slow and plain: one expert at a time, weights dequantised. The first result is what an implementation has
    to give; the second is what the quantisation itself is measured against. ``sample`` names the tokens to
    calculate, in this order; None is all of them.
    """
    w, hidden, topk_weights, ids = inputs.weights, inputs.hidden_states, inputs.topk_weights, inputs.topk_ids
    per_token = w.scheme == "token"
    x_amax = activated_amax = None
    if sample is not None:
        if not per_token:
            x_amax = hidden.abs().amax()
            activated_amax = largest_activation(inputs)
        hidden, topk_weights, ids = hidden[sample], topk_weights[sample], ids[sample]
    x = torch.stack([rounded(hidden, per_token, x_amax), hidden.float()])
    activated = _activated(w, x, ids)
    activated[0] = rounded(activated[0], per_token, activated_amax)

    tokens, topk = ids.shape
    out = torch.zeros((2, tokens, w.w2.shape[1]), device=ids.device)
    for e in torch.unique(ids).tolist():
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        product = activated[:, token * topk + slot] @ _dequantized(w.w2[e], w.w2_scale[e]).T
        out[:, token] += topk_weights[token, slot, None] * product
    return out[0], out[1]


def largest_activation(inputs: Inputs) -> torch.Tensor:
    """The largest magnitude of silu(gate) * up over all rows of a call of scheme ``"tensor"``, float32.

    Found with half-precision products of the codes, then calculated anew in float32 for the rows that came close.
    """
    w, ids = inputs.weights, inputs.topk_ids
    codes, scale = quantize(inputs.hidden_states, per_token=False)
    halves = codes.half().mul_(_HALF_UNIT)
    largest = torch.zeros(ids.shape, device=ids.device)
    for e in torch.unique(ids).tolist():
        weights = w.w1[e].half().mul_(_HALF_UNIT).T
        unit = scale * w.w1_scale[e] / _HALF_UNIT**2
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        for first in range(0, len(token), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            product = (halves[token[part]] @ weights).float().mul_(unit)
            largest[token[part], slot[part]] = silu_and_mul(product).abs_().amax(dim=1)
    # float16 leaves an error of 0.1 percent in gates and ups, and more where the library adds parts of a sum in it.
    token, slot = torch.nonzero(largest >= 0.95 * largest.max(), as_tuple=True)
    close = halves[token].float().mul_(scale / _HALF_UNIT)
    return _activated(w, close, ids[token, slot][:, None]).abs().amax()


def _activated(w: Weights, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, ``(..., tokens * topk, N)`` for ``x (..., tokens, K)`` and ``ids (tokens, topk)``."""
    tokens, topk = ids.shape
    activated = torch.zeros((*x.shape[:-2], tokens * topk, w.w2.shape[2]), device=x.device)
    for e in torch.unique(ids).tolist():
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        product = x[..., token, :] @ _dequantized(w.w1[e], w.w1_scale[e]).T
        activated[..., token * topk + slot, :] = silu_and_mul(product)
    return activated


def silu_and_mul(product: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, ``(..., N)`` for ``product (..., 2N)``."""
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def rounded(x: torch.Tensor, per_token: bool, amax: torch.Tensor | None) -> torch.Tensor:
    """``x`` as its codes and scale hold it, float32."""
    codes, scale = quantize(x, per_token, amax)
    return codes.float() * scale


def _dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float().mul_(scale[:, None] if scale.dim() else scale)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    return float(torch.linalg.vector_norm(value.float() - expected) / torch.linalg.vector_norm(expected))
