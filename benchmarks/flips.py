# SPDX-License-Identifier: Apache-2.0
"""What the rounding of GEMM 1's product does to the layer: the reference with as much noise as a GPU leaves there.

GEMM 1's product is quantised to fp8 again. Where a value lies at the border between two codes, any deviation, however
small, flips its code: a step of up to an eighth of the value. With few tokens such a step of one large value may be all
that the relative error of a result consists of. Runs over NumPy or CuPy; precision.py puts the GPU's layer beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cupy_moe import e4m3, reference

NOISE = 1.3e-4
"""Size of the noise in GEMM 1's product relative to the root mean square of its row."""
LIMIT = 1e-2
"""The relative error of the layer that the tests allow."""
CODE_STD = 130.0
"""Standard deviation of random codes: they use their range and hardly saturate."""


@dataclass(frozen=True)
class Cell:
    """A layer and its calls. ``shape`` is (E, topk, K, N); ``M`` tokens.

    Attributes
    ----------
    scheme
        "tensor" or "token": of dynamic scales of activations; weights have a scale per expert, or per channel.
    routing
        "one": all slots to the last expert; "uniform".
    a1_scale
        "dynamic": float16 hidden states. "static" and "(M, 1)": fp8 hidden states with one scale or one per token.
    """

    shape: tuple[int, int, int, int]
    M: int
    scheme: str
    routing: str = "one"
    a1_scale: str = "dynamic"


class Draw(NamedTuple):
    """One call: (M, K), two of (M, topk), and the scale of fp8 hidden states or None."""

    hidden_states: Any
    topk_weights: Any
    topk_ids: Any
    a1_scale: Any


class Outcome(NamedTuple):
    """The codes and scale in front of GEMM 2, and the layer's result in float32."""

    codes: Any
    scale: Any
    result: Any


CELLS = (
    *(
        Cell(shape, tokens, scheme)
        for shape in ((64, 6, 2048, 1408), (32, 8, 1024, 1024), (40, 8, 1024, 1536))
        for scheme in ("tensor", "token")
        for tokens in (1, 2, 3)
    ),
    *(Cell((6, 3, 128, 256), 65, scheme, "uniform", "static") for scheme in ("tensor", "token")),
    *(Cell((6, 3, 1024, 256), 65, scheme, "uniform", "(M, 1)") for scheme in ("tensor", "token")),
)


# ---- random layers and calls ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _weight_codes(shape: tuple[int, int, int, int], routing: str, xp: Any) -> tuple[Any, Any]:
    """``w1 (E, 2N, K)`` and ``w2 (E, K, N)``; where all rows go to one expert, all have its weights."""
    experts, _, hidden, inner = shape
    drawn = 1 if routing == "one" else experts
    rng = np.random.default_rng(0)
    made = []
    for size in ((drawn, 2 * inner, hidden), (drawn, hidden, inner)):
        values = rng.standard_normal(size, np.float32) * np.float32(CODE_STD)
        made.append(xp.repeat(e4m3.encode(xp.asarray(values)), experts // drawn, axis=0))
    return made[0], made[1]


def make_layer(cell: Cell, xp: Any) -> dict[str, Any]:
    """The keyword arguments of `cupy_moe.Experts`, and of the reference, as arrays of ``xp``."""
    experts, _, hidden, inner = cell.shape
    w1, w2 = _weight_codes(cell.shape, cell.routing, xp)
    rng = np.random.default_rng(1)
    scales = []
    for channels, fan_in in ((2 * inner, hidden), (hidden, inner)):
        size = (experts, channels) if cell.scheme == "token" else (experts,)
        # Products of standard normal rows get a size of about 1.
        scales.append(xp.asarray((rng.uniform(0.8, 1.2, size) / (CODE_STD * fan_in**0.5)).astype(np.float32)))
    return {
        "w1": w1, "w2": w2, "w1_scale": scales[0], "w2_scale": scales[1], "per_act_token": cell.scheme == "token",
    }


def make_draw(cell: Cell, seed: int, xp: Any) -> Draw:
    """Draw number ``seed`` of a cell."""
    experts, topk, hidden, _ = cell.shape
    rng = np.random.default_rng([seed, cell.M])
    states = rng.standard_normal((cell.M, hidden), np.float32)
    a1_scale = None
    if cell.a1_scale == "dynamic":
        states = states.astype(np.float16)
    else:
        states = e4m3.encode(states * np.float32(CODE_STD))
        size = (1,) if cell.a1_scale == "static" else (cell.M, 1)
        a1_scale = xp.asarray(rng.uniform(0.005, 0.02, size).astype(np.float32))
    ids = rng.random((cell.M, experts)).argsort(axis=1)[:, :topk]
    if cell.routing == "one":
        ids = np.full((cell.M, topk), experts - 1)
    weights = rng.uniform(0.3, 1, (cell.M, topk)).astype(np.float32)
    return Draw(xp.asarray(states), xp.asarray(weights), xp.asarray(ids.astype(np.int32)), a1_scale)


# ---- the reference, with and without noise -------------------------------------------------------------------------


class Steps:
    """The reference's steps on one draw, up to GEMM 1's product; `finish` goes on from there.

    Attributes
    ----------
    product
        GEMM 1's product of codes, (rows, 2N) float32.
    """

    def __init__(self, layer: dict[str, Any], draw: Draw) -> None:
        self.layer, self.draw = layer, draw
        self.routing = reference.route(draw.topk_ids, len(layer["w1"]))
        q1, self.q1_scale = reference._quantize_shuffle(
            draw.hidden_states, self.routing, None, draw.a1_scale, layer["per_act_token"]
        )
        offsets = self.routing.expert_offsets
        self.product = reference.grouped_gemm_fp8(q1, layer["w1"], offsets, out_dtype=np.float32)

    def finish(self, product: Any) -> Outcome:
        """The rest of the layer from a product of GEMM 1."""
        layer, experts = self.layer, self.routing.row_experts
        codes, scale = reference.activation_quantize(
            product, per_token=layer["per_act_token"], x_scale=self.q1_scale, w_scale=layer["w1_scale"],
            row_experts=experts,
        )
        second = reference.grouped_gemm_fp8(codes, layer["w2"], self.routing.expert_offsets, out_dtype=np.float32)
        result = reference.combine(
            second, self.routing.src2dst_map, topk_weights=self.draw.topk_weights, x_scale=scale,
            w_scale=layer["w2_scale"], row_experts=experts, out_dtype=np.float32,
        )
        return Outcome(e4m3.as_codes(codes), scale, result)

    def distinct_rows(self) -> tuple[Any, Any]:
        """Row numbers without the copies (one token more than once at one expert), and for each row its place there."""
        experts, tokens = (np.asarray(_host(x), np.int64) for x in (self.routing.row_experts, self.routing.dst2src_map))
        _, first, place = np.unique(experts * len(self.draw.topk_ids) + tokens, return_index=True, return_inverse=True)
        return first, place.reshape(-1)

    def noisy(self, noise: float, seed: int) -> Any:
        """The product with Gaussian noise; equal rows get equal noise, as equal sums in equal order round equally."""
        xp = e4m3.array_namespace(self.product)
        first, place = self.distinct_rows()
        normal = np.random.default_rng(seed).standard_normal((len(first), self.product.shape[1]), np.float32)
        rms = xp.sqrt(xp.mean(self.product * self.product, axis=1, keepdims=True))
        return self.product + rms * np.float32(noise) * xp.asarray(normal[place])

    def flips(self, exact: Outcome, other: Outcome) -> tuple[int, float]:
        """Flipped codes, and the share of the largest of them in the squared deviation of what GEMM 2 multiplies.

        Over the rows without copies.
        """
        first = e4m3.array_namespace(exact.codes).asarray(self.distinct_rows()[0])
        flipped = int((exact.codes[first] != other.codes[first]).sum())
        values = []
        for outcome in (exact, other):
            scale = outcome.scale if outcome.scale.size == 1 else outcome.scale[first]
            values.append(e4m3.decode(outcome.codes[first]) * scale)
        squares = (values[1] - values[0]).astype(np.float64) ** 2
        total = float(squares.sum())
        return flipped, float(squares.max()) / total if total else 0.0


def distance(got: Any, want: Any) -> tuple[float, float]:
    """Frobenius norms of the difference and of ``want``."""
    want = want.astype(np.float64)
    return float(((got - want) ** 2).sum()) ** 0.5, float((want**2).sum()) ** 0.5


def statistics(distances: list[tuple[float, float]], limit: float = LIMIT) -> dict[str, float]:
    """Median, 90th percentile and maximum of the relative errors, the share above ``limit``, the error over all draws.

    Parameters
    ----------
    distances
        What `distance` gives, of each draw.
    limit
        What counts as above.
    """
    difference, norm = np.array(distances, np.float64).T
    errors = difference / norm
    return {
        "median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)), "max": float(errors.max()),
        "above": float((errors > limit).mean()), "pooled": float(((difference**2).sum() / (norm**2).sum()) ** 0.5),
    }


def flip_statistics(flips: list[tuple[int, float]], distances: list[tuple[float, float]]) -> dict[str, Any]:
    """Mean number of flipped codes per draw, and the share of the largest one in each draw above LIMIT."""
    shares = [share for (_, share), (off, norm) in zip(flips, distances, strict=True) if off > LIMIT * norm]
    return {"flips": float(np.mean([count for count, _ in flips])), "shares_above": shares}


def simulate(cell: Cell, draws: int, xp: Any, noise: float = NOISE) -> Iterator[tuple[Draw, Steps, Outcome, Outcome]]:
    """Each draw of a cell: the draw, its steps, the exact outcome and the one with noise."""
    layer = make_layer(cell, xp)
    for seed in range(draws):
        draw = make_draw(cell, seed, xp)
        steps = Steps(layer, draw)
        yield draw, steps, steps.finish(steps.product), steps.finish(steps.noisy(noise, seed))


def _host(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.get()
