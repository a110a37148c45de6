# SPDX-License-Identifier: Apache-2.0
"""Which backends run the grouped GEMMs here, and why the others do not."""

from __future__ import annotations

import os
import sys
from functools import cache
from itertools import pairwise

import numpy as np

from cupy_moe import arrays, checks, cublaslt, e4m3

ENVIRONMENT = "CUPY_MOE_BACKEND"
"""The environment variable with the backend to take where none is named."""
NAMES = ("sm90", "cublaslt", "mma", "reference")
"""Backends, the fastest first: the times of all cells are in ``benchmarks/results/backends_*.json``."""
VARIES = {
    "cublaslt": "batch_invariant=True rules it out: its algorithms and the dtype of its product depend on the number "
    "of rows, and cuBLASLt promises no order along K",
}
"""Backends in which a row's product may depend on the other rows, and why; the others qualify for batch_invariant."""

WITH_EXTRA = "install this package with its extra cu13, as the README says"
NVRTC_NEEDED = {"sm90": (12, 9), "mma": (12, 4)}
"""For sm_90a through CuPy, and for mma.sync with e4m3."""


def backends(device: int | None = None) -> dict[str, str]:
    """Name of each backend to ``"available"`` or the reason why it is not.

    Parameters
    ----------
    device
        CUDA device number; None is CuPy's current one.

    Returns
    -------
    dict of str to str

    Raises
    ------
    TypeError, ValueError
        If ``device`` is no such number.
    """
    if device is not None:
        device = checks.count("device", device, 0)
    return {name: _status(name, device) for name in NAMES}


def _status(name: str, device: int | None, batch_invariant: bool = False) -> str:
    """"available", or why the backend ``name`` is not or does not qualify."""
    problem = None
    if name == "cublaslt":
        problem = _cublaslt_problem(device)
    elif name != "reference":
        problem = _own_problem(name, device)
    return problem or (VARIES.get(name) if batch_invariant else None) or "available"


def choose(device: int, backend: str | None, *, batch_invariant: bool = False) -> str:
    """The backend for arrays on ``device``: ``backend`` if it is available, the first available of `NAMES` for None.

    Raises
    ------
    ValueError
        For an unknown name, or one that does not qualify for ``batch_invariant``.
    RuntimeError
        If the backend asked for, or for None every fast one, is not available; the message has the reasons.
    """
    through = "backend"
    if backend is None and device != arrays.CPU and os.environ.get(ENVIRONMENT):
        backend, through = os.environ[ENVIRONMENT], ENVIRONMENT
    if backend is not None:
        checks.option(through, backend, NAMES)
        if batch_invariant and backend in VARIES:
            allowed = ", ".join(repr(name) for name in NAMES if name not in VARIES)
            raise ValueError(f"{through}: expected None or one of {allowed}; got {backend!r}, but {VARIES[backend]}")
    if device == arrays.CPU:
        if backend not in (None, "reference"):
            raise RuntimeError(f"backend: expected 'reference' or None with arrays on the CPU; got {backend!r}")
        return "reference"
    # One after another: to try cuBLASLt means to load it.
    status: dict[str, str] = {}
    for name in NAMES if backend is None else (backend,):
        status[name] = _status(name, device, batch_invariant)
        if status[name] == "available" and (name == backend or name != "reference"):
            return name
    if backend is not None:
        raise RuntimeError(f"{through}: {backend!r} is not available on cuda:{device}: {status[backend]}")
    names: dict[str, list[str]] = {}  # by reason, which may be one for all
    for name in NAMES[:-1]:
        names.setdefault(status[name], []).append(name)
    reasons = " ".join(f"{', '.join(of)}: {reason}." for reason, of in names.items())
    raise RuntimeError(f"no fast backend is available on cuda:{device}. {reasons} "
                       "backend='reference' runs the slow NumPy definition on the GPU through CuPy.")


def explain(device: int, chosen: str, *, batch_invariant: bool = False) -> str:
    """One sentence per backend: which runs and why, and why the others do not."""
    if device == arrays.CPU:
        return "reference runs: the arrays are on the CPU."
    lines, every = [], {name: _status(name, device, batch_invariant) for name in NAMES}
    first = next(name for name, status in every.items() if status == "available")
    for name, status in every.items():
        if name == chosen:
            why = ": of those available the first in the order of their speed" if name == first else ""
            lines.append(f"{name} runs on cuda:{device}{why}.")
        elif status == "available":
            lines.append(f"{name} is available: backend={name!r} takes it.")
        else:
            lines.append(f"{name} does not run: {status}.")
    return "\n".join(lines)


def _device_problem(device: int | None) -> tuple[int, str | None]:
    """The device, the current one for None, and why it cannot be used."""
    try:
        import cupy
    except ImportError as error:
        # Beside torch without the extra: it has another cuBLAS than the one that torch pins.
        how = "pip install cupy-cuda13x" if "torch" in sys.modules else WITH_EXTRA
        return -1, f"CuPy cannot be imported ({error}); {how}"
    try:
        device = cupy.cuda.runtime.getDevice() if device is None else device
        capability_of(device)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return -1, f"no CUDA device ({error})"
    return device, None


def _own_problem(name: str, device: int | None) -> str | None:
    """Why the backend ``name``, a kernel of our own, cannot run."""
    device, problem = _device_problem(device)
    if problem:
        return problem
    import cupy

    capability, version, needed = capability_of(device), cupy.cuda.nvrtc.getVersion(), NVRTC_NEEDED[name]
    runs, where = (capability == (9, 0), "9.0") if name == "sm90" else (capability >= (8, 0), "8.0 and later")
    if not runs:
        return f"its kernels are for compute capability {where}; cuda:{device} has {capability[0]}.{capability[1]}"
    if version < needed:
        least, came = (".".join(map(str, v)) for v in (needed, version))
        return f"its kernels need NVRTC {least} or later; CuPy uses {came}; {WITH_EXTRA}"
    return None


def _cublaslt_problem(device: int | None) -> str | None:
    device, problem = _device_problem(device)
    if problem:
        return problem
    found, reason = cublaslt.search(capability_of(device))
    if found is None:
        return reason
    return _self_test(device)


def capability_of(device: int) -> tuple[int, int]:
    """Compute capability of a CUDA device as (major, minor)."""
    import cupy

    digits: str = cupy.cuda.Device(device).compute_capability
    return int(digits[:-1]), int(digits[-1])


@cache
def cublaslt_context(device: int) -> cublaslt.Context:
    """The cuBLASLt handle of ``device``; only where `backends` calls it available."""
    import cupy

    found, reason = cublaslt.search(capability_of(device))
    if found is None:
        raise RuntimeError(reason)
    with cupy.cuda.Device(device):
        return cublaslt.Context(found, device)


@cache
def _self_test(device: int) -> str | None:
    """Why the library cannot be trusted on ``device``: a small product with an empty group, against exact integers."""
    import cupy

    from cupy_moe.grouped_gemm import GroupedGemm

    counts, n, k = np.array([5, 0, 17], np.int32), 32, 64
    first = np.concatenate([[0], np.cumsum(counts)])
    random = np.random.default_rng(0)
    # 0, 1 and -1: every sum of products is an exact small integer
    a = random.integers(-1, 2, (first[-1], k)).astype(np.float32)
    w = random.integers(-1, 2, (len(counts), n, k)).astype(np.float32)
    with cupy.cuda.Device(device):
        left, right = cupy.asarray(e4m3.encode(a)), cupy.asarray(e4m3.encode(w))
        result = cupy.asarray(np.full((first[-1], n), np.nan, np.float16))
        rows = cupy.asarray(left.data.ptr + first[:-1] * k)
        results = cupy.asarray(result.data.ptr + first[:-1] * n * result.itemsize)
        sizes = cupy.asarray(counts)
        try:
            context = cublaslt_context(device)
            gemm = GroupedGemm(context, right.data.ptr, len(counts), n, k, sizes.data.ptr)
            gemm.prepare(len(a), rows.data.ptr, results.data.ptr)(cupy.cuda.get_current_stream().ptr)
            got = result.get().astype(np.float32) * gemm.unit
        except (cublaslt.CublasError, cupy.cuda.runtime.CUDARuntimeError) as error:
            return f"the self-test of the library failed: {error}"
    want = np.concatenate([a[i:j] @ w[e].T for e, (i, j) in enumerate(pairwise(first))])
    return None if np.array_equal(got, want) else f"the self-test of {context.found.path} gave wrong products"
