# SPDX-License-Identifier: Apache-2.0
"""The cells of the benchmark: shapes and numbers of tokens, inputs, the floor of each cell.

A shape is ``(E, topk, K, N)``: experts, experts per token, hidden size, intermediate size. A cell is a shape
and a number of tokens ``M``. Two quantisation schemes: ``"tensor"`` (dynamic per-tensor activations, a scale
per expert) and ``"token"`` (dynamic per-token activations, a scale per output row of a weight). Two routings:
``"uniform"`` (random normal scores) and ``"skewed"`` (an expert is drawn with a probability of one over its rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.models import MODELS, Shape

SHAPES: tuple[Shape, ...] = (
    (8, 2, 4096, 28672),
    (8, 2, 14336, 4096),
    (64, 6, 2048, 1408),
    (32, 8, 1024, 1024),
    (40, 8, 1024, 1536),
)
TOKENS: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256, 512)
PREFILL_TOKENS: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
# From 512 on in quarters of each power of two: what fills the row tiles of an expert just so is not alone then.
SWEEP_TOKENS: tuple[int, ...] = (
    *(1 << power for power in range(9)),
    *(quarters << power for power in range(7, 12) for quarters in (4, 5, 6, 7)),
    16384,
)
MODEL_TOKENS: tuple[int, ...] = (1, 8, 64, 256, 1024, 4096)
Cells = dict[Shape, list[int]]
CELLS: dict[str, Cells] = {
    "all": {shape: list(TOKENS) for shape in SHAPES},
    "prefill": {shape: list(PREFILL_TOKENS) for shape in SHAPES},
    "both": {shape: [*TOKENS, *PREFILL_TOKENS] for shape in SHAPES},
    "sweep": {SHAPES[2]: list(SWEEP_TOKENS)},
    "models": {shape: list(MODEL_TOKENS) for shape in MODELS.values()},
}
SCHEMES: tuple[str, ...] = ("tensor", "token")
ROUTINGS: tuple[str, ...] = ("uniform", "skewed")
FP8_MAX = 448.0


@dataclass(frozen=True)
class Weights:
    """Expert weights of one shape and scheme.

    ``w1 (E, 2N, K)`` and ``w2 (E, K, N)`` are float8_e4m3fn; the float32 scales are ``(E,)`` for scheme
    ``"tensor"`` and ``(E, 2N)``, ``(E, K)`` for ``"token"``. Rows ``0..N-1`` of ``w1`` are the gate.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    scheme: str


@dataclass(frozen=True)
class Inputs:
    """One call: ``hidden_states (M, K)``; ``topk_weights`` float32 and ``topk_ids`` int32, ``(M, topk)``."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    weights: Weights
    routing: str = "uniform"


def scheme_of(w1: torch.Tensor, w2: torch.Tensor, w1_scale: torch.Tensor, w2_scale: torch.Tensor) -> str:
    """The scheme, ``"tensor"`` or ``"token"``, that the scales' shapes mean."""
    experts, k, n = w2.shape
    if w1.shape != (experts, 2 * n, k):
        raise ValueError(
            f"w1 must be {(experts, 2 * n, k)} beside w2 {tuple(w2.shape)}, got {tuple(w1.shape)}"
        )
    for name, weight in (("w1", w1), ("w2", w2)):
        if weight.dtype != torch.float8_e4m3fn or not weight.is_contiguous():
            raise TypeError(f"{name} must be contiguous float8_e4m3fn, got {weight.dtype} {weight.stride()}")
    counts = (w1_scale.numel(), w2_scale.numel())
    if counts == (experts, experts):
        return "tensor"
    if counts == (experts * 2 * n, experts * k):
        return "token"
    raise ValueError(
        f"w1_scale and w2_scale must hold E values each, or E * 2N and E * K; got {tuple(w1_scale.shape)} "
        f"and {tuple(w2_scale.shape)} for E={experts}, N={n}, K={k}"
    )


def _random_weight(
    shape: tuple[int, int, int], per_channel: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``(E, rows, cols)`` of normal / 10 values, and their scales ``(E, rows)`` or ``(E,)``."""
    experts, rows, _ = shape
    device = generator.device
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty((experts, rows) if per_channel else (experts,), device=device)
    for expert in range(experts):  # one expert at a time: the float32 values of all would not fit
        values = torch.randn(shape[1:], generator=generator, device=device).div_(10)
        low, high = torch.aminmax(values, dim=1)
        amax = torch.maximum(high, -low)
        scale = (amax if per_channel else amax.max()) / FP8_MAX
        values.div_(scale[:, None] if per_channel else scale).clamp_(-FP8_MAX, FP8_MAX)
        codes[expert].copy_(values)
        scales[expert] = scale
    return codes, scales


def make_weights(shape: Shape, scheme: str = "tensor", seed: int = 0, device: str = "cuda") -> Weights:
    """Random normal / 10 expert weights, quantised with their true scales.

    They do not depend on M: make them once for all cells of a shape.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    experts, _, k, n = shape
    generator = torch.Generator(device=device).manual_seed(seed)
    w1, w1_scale = _random_weight((experts, 2 * n, k), scheme == "token", generator)
    w2, w2_scale = _random_weight((experts, k, n), scheme == "token", generator)
    return Weights(w1, w2, w1_scale, w2_scale, scheme)


def make_inputs(
    shape: Shape,
    M: int,
    scheme: str = "tensor",
    dtype: str = "float16",
    seed: int = 0,
    *,
    routing: str = "uniform",
    weights: Weights | None = None,
    device: str = "cuda",
) -> Inputs:
    """Random normal hidden states; random scores, softmax over E, the topk largest (not renormalised).

    Parameters
    ----------
    shape : (E, topk, K, N)
    M : tokens
    scheme : "tensor" or "token", only used where ``weights`` is None
    dtype : name of the torch dtype of ``hidden_states``
    routing : one of ROUTINGS
    weights : the shape's weights, to share them between cells; None makes them

    """
    experts, topk, k, _ = shape
    if weights is None:
        weights = make_weights(shape, scheme, seed, device)
    generator = torch.Generator(device=device).manual_seed(seed * 1009 + M)
    hidden_states = torch.randn((M, k), generator=generator, device=device).to(getattr(torch, dtype))
    topk_weights, topk_ids = make_routing(M, topk, experts, generator, routing)
    return Inputs(hidden_states, topk_weights, topk_ids, weights, routing)


def make_routing(
    M: int, topk: int, experts: int, generator: torch.Generator, routing: str = "uniform"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_weights`` float32 and ``topk_ids`` int32, ``(M, topk)``, of random scores on the generator's device."""
    scores = _scores(routing, M, experts, generator)
    topk_weights, topk_ids = torch.topk(torch.softmax(scores, dim=-1), topk, dim=-1)
    return topk_weights.contiguous(), topk_ids.int().contiguous()


def _scores(routing: str, M: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
    device = generator.device
    if routing == "uniform":
        return torch.randn((M, experts), generator=generator, device=device)
    # The largest of log(p) + Gumbel noise are draws without replacement with the probabilities p: as in a real layer,
    # an expert comes at most once per token, and the popular ones stand anywhere.
    rank = 1 + torch.randperm(experts, generator=generator, device=device)
    waits = torch.empty((M, experts), device=device).exponential_(generator=generator)
    return -torch.log(waits.clamp_min(1e-30) * rank)


def active_experts(topk_ids: torch.Tensor) -> int:
    """How many experts have at least one row (reads device data)."""
    return int(torch.unique(topk_ids).numel())


def floor_us(
    shape: Shape, M: int, active: int, read_rate: float, fp8_rate: float, activation_bytes: int = 2
) -> float:
    """The least time of a cell in microseconds.

    The larger of reading the active experts' weights and of the dense fp8 arithmetic, plus activations in and
    out.

    Parameters
    ----------
    active : experts with at least one row
    read_rate : bytes/s
    fp8_rate : FLOP/s
    activation_bytes : bytes of one element of the hidden states and of the output

    """
    # Checked against the published table of one H100 80GB HBM3, at 3.11e12 bytes/s and 1517e12 FLOP/s:
    # (8, 2, 4096, 28672) with M = 1 and 2 active experts is 226.58 us, with M = 512 and 8 active 908.99 us;
    # (40, 8, 1024, 1536) with M = 512 and 40 active is 61.36 us. All 45 cells agree to 0.01 us.
    _, topk, k, n = shape
    weight_s = active * 3 * n * k / read_rate
    arithmetic_s = 2 * M * topk * 3 * n * k / fp8_rate
    activation_s = 2 * M * k * activation_bytes / read_rate
    return 1e6 * (max(weight_s, arithmetic_s) + activation_s)
