# SPDX-License-Identifier: Apache-2.0
"""The seven activations: names, whether they are gated, and float32 definitions over numpy or cupy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_moe.e4m3 import Array, array_namespace


class Activation(NamedTuple):
    """One activation: ``function(gate, up, xp)`` if gated, else ``function(x, xp)``; float32 in and out."""

    gated: bool
    function: Callable[..., Array]


def activate(name: str, x: Array) -> Array:
    """Apply an activation to float32 (rows, 2N), gate then up, or (rows, N) if not gated -> (rows, N)."""
    xp = array_namespace(x)
    gated, function = ACTIVATIONS[name]
    if not gated:
        return function(x, xp)
    half = x.shape[1] // 2
    return function(x[:, :half], x[:, half:], xp)


def silu(x: Array, xp: Any) -> Array:
    """Return x * sigmoid(x)."""
    return x / (1 + xp.exp(-x))


def gelu(x: Array, xp: Any) -> Array:
    """Return x times its normal distribution function; in float64, since 1 + erf cancels for negative x."""
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + erf(wide * 0.5**0.5, xp))).astype(np.float32)


def gelu_tanh(x: Array, xp: Any) -> Array:
    """Return the tanh approximation of gelu."""
    return 0.5 * x * (1 + xp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def relu2(x: Array, xp: Any) -> Array:
    """Return max(x, 0) squared."""
    positive = xp.maximum(x, 0)
    return positive * positive


def swigluoai(gate: Array, up: Array, xp: Any) -> Array:
    """Return g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = clip(up, -7, 7)."""
    g = xp.minimum(gate, 7)  # minimum and maximum keep a NaN
    u = xp.maximum(xp.minimum(up, 7), -7)
    return g / (1 + xp.exp(-1.702 * g)) * (u + 1)


ACTIVATIONS = {
    "silu": Activation(True, lambda gate, up, xp: silu(gate, xp) * up),
    "gelu": Activation(True, lambda gate, up, xp: gelu(gate, xp) * up),
    "gelu_tanh": Activation(True, lambda gate, up, xp: gelu_tanh(gate, xp) * up),
    "swigluoai": Activation(True, swigluoai),
    "silu_no_mul": Activation(False, silu),
    "gelu_no_mul": Activation(False, gelu),
    "relu2_no_mul": Activation(False, relu2),
}


def erf(x: Array, xp: Any) -> Array:
    """Return the error function of float64 to within 1e-15. NumPy has none.

    W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969): three
    rational functions for |x| up to 0.46875, up to 4, and beyond; coefficients as in CALERF (netlib specfun).
    """
    y = xp.abs(x)
    inner = xp.minimum(y, 0.46875)
    near_zero = inner * _ratio(inner * inner, _INNER_P, _INNER_Q)
    middle = xp.minimum(xp.maximum(y, 0.46875), 4.0)
    erfc_middle = xp.exp(-middle * middle) * _ratio(middle, _MIDDLE_P, _MIDDLE_Q)
    outer = xp.minimum(xp.maximum(y, 4.0), 6.0)  # erf rounds to 1 in float64 from 5.93 on
    z = 1 / (outer * outer)
    erfc_outer = xp.exp(-outer * outer) / outer * (np.pi**-0.5 - z * _ratio(z, _OUTER_P, _OUTER_Q))
    erfc = xp.where(y <= 4.0, erfc_middle, erfc_outer)
    return xp.copysign(xp.where(y <= 0.46875, near_zero, 1 - erfc), x)


def _ratio(x: Array, numerator: tuple[float, ...], denominator: tuple[float, ...]) -> Array:
    """Divide two polynomials of the same degree, coefficients from the highest power down."""
    p, q = numerator[0] * x, denominator[0] * x
    for a, b in zip(numerator[1:-1], denominator[1:-1], strict=True):
        p, q = (p + a) * x, (q + b) * x
    return (p + numerator[-1]) / (q + denominator[-1])


_INNER_P = (
    1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
    3.20937758913846947e3,
)
_INNER_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_MIDDLE_P = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3,
)
_MIDDLE_Q = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)
_OUTER_P = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
    1.60837851487422766e-2, 6.58749161529837803e-4,
)
_OUTER_Q = (
    1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
    2.33520497626869185e-3,
)
