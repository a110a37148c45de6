# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of a call: how much, and what lies where, for a layer of which only the sizes exist."""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_moe import launches
from cupy_moe.buffers import Buffers
from cupy_moe.gemms import BACKENDS, CublasltGemms, MmaGemms, Sm90Gemms
from cupy_moe.launches import RowScale

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
BASE = 1 << 40
FIXED = 5 * MIB


KINDS = {"cublaslt": CublasltGemms, "sm90": Sm90Gemms, "sm90 static": Sm90Gemms, "mma": MmaGemms}
"""What GEMM 1 leaves depends on: the backend and, for our own kernels, whether the scale of its codes is given."""


def make_layer(kind, experts, hidden, intermediate, *, gated=True, per_token=False, invariant=False, routed_to=0):
    """What `Buffers` takes of a layer; the sizes are multiples of 16."""
    address = SimpleNamespace(data=SimpleNamespace(ptr=0))
    return SimpleNamespace(
        hidden=hidden, intermediate=intermediate, product=intermediate * (2 if gated else 1),
        spec=SimpleNamespace(
            num_experts=experts, experts_routed_to=routed_to or experts, per_act_token=per_token,
            batch_invariant=invariant,
        ),
        expert_offsets=address, expert_counts=address, spans=address,
        a2_scale=RowScale(value=0.5) if kind.endswith("static") else None,
        gemms=SimpleNamespace(inner=partial(KINDS[kind].inner, KINDS[kind])),
    )


def up(nbytes):
    return -(-nbytes // 256) * 256


def route_blocks(rows):
    per_block = max(512, 32 * math.ceil(math.ceil(rows / 128) / 32))
    return 1 if rows <= 512 else math.ceil(rows / per_block)


def formula(kind, experts, hidden, intermediate, rows, *, gated=True):
    """Bytes as docs/performance.md gives them."""
    product = (2 if gated else 1) * intermediate
    library = product * (4 if rows * product <= 1 << 20 else 2)
    inner = {"cublaslt": library, "sm90 static": 0}.get(kind, intermediate * 4)
    if kind == "sm90" and rows >= 32 * experts:
        left = (rows // 16 + experts + 1) * 16 * intermediate * 3
    else:
        left = rows * inner
    first = up(rows * max(hidden, intermediate)) + up(left)
    second = up(rows * intermediate) + up(rows * hidden * 2)
    if kind == "sm90 static":
        second += up(rows * hidden)
    return max(first, second) + 5 * up(rows * 4) + up(route_blocks(rows) * experts * 4)


def random_case(seed):
    """(experts, hidden, intermediate, rows, gated), from smallest to huge."""
    rng = np.random.default_rng(seed)
    hidden, intermediate = (16 * round(2 ** rng.uniform(0, 11)) for _ in range(2))
    return round(2 ** rng.uniform(0, 10)), hidden, intermediate, round(2 ** rng.uniform(0, 24)), bool(rng.integers(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(200))
def test_bytes(kind, seed):
    *sizes, rows, gated = random_case(seed)
    _, hidden, intermediate = sizes
    nbytes = Buffers(make_layer(kind, *sizes, gated=gated), rows).nbytes
    assert nbytes == formula(kind, *sizes, rows, gated=gated)
    # Four matrices side by side, as if all layers were gated.
    assert nbytes <= rows * (hidden + 2 * intermediate * 2 + intermediate + hidden * 2) + FIXED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(200))
def test_what_is_needed_at_the_same_time_lies_apart(kind, seed):
    experts, hidden, intermediate, rows, gated = random_case(seed)
    buffers = Buffers(make_layer(kind, experts, hidden, intermediate, gated=gated), rows, BASE)

    def range_of(matrix):
        held = launches.packed_rows(rows, experts) if matrix.dtype == launches.PACKED else rows
        return matrix.pointer, matrix.pointer + held * matrix.pitch * matrix.itemsize

    blocks = route_blocks(rows)
    maps = buffers.maps
    scales_and_maps = buffers.x_scales, buffers.a_scales, maps.dst2src, maps.src2dst, maps.row_experts
    always = [(start, start + rows * 4) for start in scales_and_maps]
    always.append((buffers.scratch, buffers.scratch + blocks * experts * 4))
    steps = [(buffers.x, buffers.inner), (buffers.inner, buffers.a), (buffers.a, buffers.y)]
    if kind == "sm90 static":
        assert buffers.inner.pitch == 0
        steps = [(buffers.x, buffers.a), (buffers.a, buffers.y)]  # GEMM 1 reads the one and writes the other
    for step in steps:
        ranges = sorted([*map(range_of, step), *always])
        assert ranges[0][0] >= BASE
        assert all(ranges[i][1] <= ranges[i + 1][0] for i in range(len(ranges) - 1))
        assert ranges[-1][1] <= BASE + buffers.nbytes
        assert all(start % 256 == 0 for start, _ in ranges)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "dtype"),
    [
        (256, 16, {}, "packed"),
        (255, 1 << 20, {}, "float32"),
        (1536, 2048, {"per_token": True}, "packed"),
        (1535, 2048, {"per_token": True}, "float32"),
        (8192, 2064, {"per_token": True}, "float32"),
        (8192, 1024, {"per_token": True, "invariant": True}, "float32"),
        (1000, 2048, {"routed_to": 32}, "float32"),  # only 250 of them have an expert here, as far as one can expect
        (8192, 2048, {"routed_to": 32}, "packed"),
    ],
)
def test_what_is_packed(rows, columns, options, dtype):
    layer = make_layer("sm90", 8, 1024, columns, **options)
    assert Buffers(layer, rows).inner.dtype == dtype
    room = launches.packed_rows(rows, 8) if dtype == "packed" else rows
    assert layer.gemms.inner(layer, rows, False) == (room, columns, dtype), "for all rows, whoever gets them"
    assert Buffers(layer, rows, comparable=True).inner.dtype == "float32"
    assert Buffers(make_layer("mma", 8, 1024, columns, **options), rows).inner.dtype == "float32"


def test_every_backend_is_here():
    assert set(KINDS.values()) == set(BACKENDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    assert Buffers(make_layer(kind, 8, 128, 256), 0).nbytes == up(8 * 4)


def test_tables_in_the_documentation():
    """Every figure of the tables of bytes in docs/performance.md: one for each backend, with dynamic scales."""
    text = (ROOT / "docs" / "performance.md").read_text()
    section = text[text.index("## Memory") :].split("\n## ")[0]
    tables = re.findall(r"^(`.*`):\n\n((?:\|.*\|\n)+)", section, re.M)
    tables = [(backend, table) for names, table in tables for backend in re.findall(r"`(\w+)`", names)]
    assert [backend for backend, _ in tables] == list(BACKENDS)
    for backend, table in tables:
        header, _, *lines = re.findall(r"^\|(.*)\|$", table, re.M)
        tokens = [int(cell.split("=")[1]) for cell in header.split("|")[1:]]
        assert len(lines) == 5
        for line in lines:
            shape, *cells = line.split("|")
            experts, topk, hidden, intermediate = map(int, shape.split(","))
            layer = make_layer(backend, experts, hidden, intermediate)
            wanted = [Buffers(layer, each * topk).nbytes / MIB for each in tokens]
            assert [cell.strip() for cell in cells] == [f"{nbytes:.2f}" for nbytes in wanted]
