# SPDX-License-Identifier: Apache-2.0
"""The simulation of rounding in front of the requantisation, and its statistics, on NumPy arrays."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from cupy_moe import reference

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    loaded = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(loaded)
    sys.modules[loaded.name] = module  # dataclasses look their module up
    loaded.loader.exec_module(module)
    return module


flips, accuracy = load("flips"), load("accuracy")
CELLS = [
    flips.Cell((4, 3, 64, 128), 2, "tensor"),
    flips.Cell((4, 3, 64, 128), 5, "token", "uniform"),
    flips.Cell((4, 3, 64, 128), 5, "tensor", "uniform", "static"),
    flips.Cell((4, 3, 64, 128), 5, "token", "uniform", "(M, 1)"),
]


def run(cell, draws, noise):
    """Records of a cell as precision.py makes them, the simulation in place of the GPU."""
    distances, flipped = [], []
    for _, steps, exact, noisy in flips.simulate(cell, draws, np, noise):
        distances.append(flips.distance(noisy.result, exact.result))
        flipped.append(steps.flips(exact, noisy))
    return distances, flipped


def test_statistics():
    got = flips.statistics([(0.0, 1.0), (0.03, 1.0), (0.04, 2.0), (0.01, 4.0), (0.1, 10.0)])  # 0, 0.03, 0.02, ...
    assert got["median"] == pytest.approx(0.01)
    assert got["p90"] == pytest.approx(0.026)
    assert got["max"] == pytest.approx(0.03)
    assert got["above"] == pytest.approx(0.4)
    assert got["pooled"] == pytest.approx((0.0009 + 0.0016 + 0.0001 + 0.01) ** 0.5 / (1 + 1 + 4 + 16 + 100) ** 0.5)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_steps_are_the_reference(cell):
    """Without noise, the steps give the reference's result to the bit."""
    layer = flips.make_layer(cell, np)
    for draw, _, exact, noisy in flips.simulate(cell, 3, np, noise=0.0):
        want = reference.fused_experts(**draw._asdict(), **layer, out_dtype="float32")
        np.testing.assert_array_equal(exact.result, want)
        np.testing.assert_array_equal(noisy.result, want)


def test_noise_has_its_size_and_is_equal_in_equal_rows():
    cell = flips.Cell((4, 3, 64, 512), 2, "tensor")
    _, steps, *_ = next(flips.simulate(cell, 1, np))
    deviation = (steps.noisy(0.01, 5) - steps.product) / np.sqrt((steps.product**2).mean(axis=1, keepdims=True))
    assert deviation.std() == pytest.approx(0.01, rel=0.05)
    first, place = steps.distinct_rows()
    assert len(first) == 2  # tokens; three slots each, all at one expert
    np.testing.assert_allclose(deviation, deviation[first][place], atol=1e-6)
    assert np.abs(deviation[first[0]] - deviation[first[1]]).max() > 0.01


def test_errors_above_the_limit_come_from_few_flipped_codes():
    """A deviation of 1e-4 in the product, and in some draws a hundred times as much in the result."""
    distances, flipped = run(flips.Cell((4, 3, 64, 128), 1, "tensor"), 64, flips.NOISE)
    errors = np.array([off / norm for off, norm in distances])
    assert (errors > flips.LIMIT).any()
    assert np.median(errors) < 0.5 * flips.LIMIT
    shares = flips.flip_statistics(flipped, distances)["shares_above"]
    assert len(shares) == (errors > flips.LIMIT).sum()
    assert np.median(shares) > 0.5
    unflipped = [error for error, (count, _) in zip(errors, flipped, strict=True) if count == 0]
    assert unflipped
    assert max(unflipped) < 10 * flips.NOISE


def test_tables():
    distances, flipped = run(CELLS[0], 4, 1e-3)
    common = {**vars(CELLS[0]), "draws": 4, "limit": flips.LIMIT, **flips.statistics(distances)}
    of_codes = {"noise": 1e-3, "codes": 256, **flips.flip_statistics(flipped, distances)}
    records = [{"kind": "layer", **common}, {"kind": "simulated", **common, **of_codes}]
    lines = accuracy.layer_accuracy(records)
    assert lines[-1].startswith("| 4, 3, 64, 128 | 2 | tensor | one | dynamic | ")
    assert len({line.count("|") for line in lines[2:]}) == 1
    records += [
        {"kind": "gemm", "K": 128, "result": result, "fast_accumulation": fast, "err": None if fast else 1.24e-4}
        for result in ("float16", "float32") for fast in (False, True)
    ]
    assert accuracy.gemm_accuracy(records)[-1] == "| 128 | 1.2e-04 | 1.2e-04 | not offered | not offered |"
