# SPDX-License-Identifier: Apache-2.0
"""Each example as a user runs it: a program of its own, which asserts its result; warnings are errors."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_moe

ROOT = Path(__file__).resolve().parents[1]
ANYWHERE = ("numpy_reference.py", "quickstart.py")
TORCH = "torch_layer.py"
GPU = "cuda_graph.py"


def run(name):
    """Run an example; its exit status, standard output and standard error."""
    # Beside what is installed, the checkout: the tests also run where the package is not installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def run_well(name):
    status, out, err = run(name)
    assert (status, err) == (0, ""), out + err
    return out


def has_fast_backend():
    return any(status == "available" for name, status in cupy_moe.backends().items() if name != "reference")


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*ANYWHERE, TORCH, GPU}


@pytest.mark.parametrize("name", ANYWHERE)
def test_anywhere(name):
    run_well(name)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_torch():
    run_well(TORCH)


def test_cuda_graph():
    if not has_fast_backend():
        pytest.skip("needs a GPU with a fast backend")
    assert run_well(GPU).count("the same bits") == 5


def test_cuda_graph_says_what_is_missing():
    if has_fast_backend():
        pytest.skip("needs a machine without a fast backend")
    status, out, err = run(GPU)
    assert (status, out) == (2, "")
    assert err.startswith("this example needs a GPU with a fast backend:\n  sm90: ")
    assert "\n  cublaslt: " in err
    assert "Traceback" not in err
