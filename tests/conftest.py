# SPDX-License-Identifier: Apache-2.0
"""What tests need of the machine, how they get random numbers, and how they let go of device memory.

Tests marked ``gpu`` are skipped where there is no CUDA device, those marked ``gemm`` also where no fast backend is
available; the reason says why. They run with the default, or the one that CUPY_MOE_BACKEND names. Where that cannot be
used, or a library that CUPY_MOE_CUBLASLT names, they fail instead.
"""

from __future__ import annotations

import os
import sys
import zlib
from functools import cache

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "gemm: needs a CUDA device and a fast backend")


@cache
def gpu_problem():
    """Why no CUDA device can be used, or None."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"
    return None if count else "CuPy finds no CUDA device"


@cache
def gemm_problem():
    """Why no fast backend can be used, or None; fails if one that was asked for cannot."""
    import cupy_moe

    status = cupy_moe.backends()
    asked_for = [os.environ.get("CUPY_MOE_BACKEND")] + ["cublaslt"] * bool(os.environ.get("CUPY_MOE_CUBLASLT"))
    for name in filter(None, asked_for):
        if status[name] != "available":
            pytest.fail(f"CUPY_MOE_BACKEND or CUPY_MOE_CUBLASLT asks for {name}, but: {status[name]}")
    fast = {name: reason for name, reason in status.items() if name != "reference"}
    return None if "available" in fast.values() else "; ".join(f"{name}: {why}" for name, why in fast.items())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    needs_gemm = item.get_closest_marker("gemm") is not None
    if not needs_gemm and item.get_closest_marker("gpu") is None:
        return
    if gpu_problem():
        pytest.skip(f"needs a GPU: {gpu_problem()}")
    if needs_gemm and gemm_problem():
        pytest.skip(f"needs a fast backend: {gemm_problem()}")


@pytest.fixture
def seed(request):
    """The seed of a test's random case; it depends on the test's name alone and is shown when the test fails."""
    value = zlib.crc32(request.node.name.encode())
    print(f"seed {value}")
    return value


@pytest.fixture(scope="session")
def torch():
    """PyTorch with a GPU."""
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("needs a torch that finds a GPU")
    return module


@pytest.fixture(scope="session", autouse=True)
def _own_tuning_cache(tmp_path_factory):
    """What the user has tuned on this machine is neither used nor changed, in programs that tests start either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_MOE_CACHE_DIR", str(tmp_path_factory.mktemp("tuning")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _free_device_memory():
    yield
    cases = sys.modules.get("gpu_cases")
    if cases is not None and gpu_problem() is None:
        cases.free_device_memory()
