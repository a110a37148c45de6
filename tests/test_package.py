# SPDX-License-Identifier: Apache-2.0
"""The package as an installation sees it: what importing it needs, what it exports, its version and its files."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cupy_moe
import kernels_cu
from cupy_moe import backend

ROOT = Path(cupy_moe.__file__).parents[1]

WITHOUT_GPU_LIBRARIES = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("cupy", "torch", "cuda"):
                raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

    sys.meta_path.insert(0, Blocked())
"""


def run(*programs):
    """Run the programs, one after another, in a new interpreter; return what they print."""
    text = "\n".join(textwrap.dedent(program) for program in programs)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text], env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_no_gpu_library():
    loaded = run("""
        import sys
        import cupy_moe
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
    """).split()
    assert {"cupy_moe", "kernels_cu", "numpy", "ml_dtypes"} <= set(loaded)
    assert not {"cupy", "cupy_backends", "torch", "cuda", "nvmath"} & set(loaded)


def test_numpy_needs_no_gpu_library():
    printed = run(WITHOUT_GPU_LIBRARIES, """
        import numpy as np
        import cupy_moe
        from cupy_moe import reference

        M, K, N, E, TOPK = 5, 32, 16, 3, 2
        rng = np.random.default_rng(0)
        hidden = rng.normal(0, 1, (M, K)).astype(np.float16)
        w1, w2 = (rng.integers(0, 100, shape, dtype=np.uint8) for shape in ((E, 2 * N, K), (E, K, N)))
        scales = {"w1_scale": np.full(E, 0.01, np.float32), "w2_scale": np.full(E, 0.01, np.float32)}
        weights, ids = cupy_moe.topk_softmax(rng.normal(0, 1, (M, E)).astype(np.float32), TOPK)
        expected = reference.fused_experts(hidden, w1, w2, weights, ids, **scales)
        assert np.isfinite(expected).all() and expected.any()
        experts = cupy_moe.Experts(w1, w2, **scales)
        for result in (cupy_moe.fused_experts(hidden, w1, w2, weights, ids, **scales), experts(hidden, weights, ids)):
            np.testing.assert_array_equal(result, expected)
        padded = experts.batched(np.stack([hidden] * E), np.array([1, 0, M], np.int32))
        assert padded.shape == (E, M, K) and padded[2].any() and not padded[1].any()

        routing = cupy_moe.route(ids, E)
        rows = cupy_moe.shuffle_rows(hidden, routing.dst2src_map)
        codes, scale = cupy_moe.quantize_fp8(rows, per_token=True)
        product = cupy_moe.grouped_gemm_fp8(codes, w1, routing.expert_offsets, out_dtype="float32")
        codes, scale = cupy_moe.activation_quantize(product, x_scale=scale)
        product = cupy_moe.grouped_gemm_fp8(codes, w2, routing.expert_offsets, a_scale=scale)
        assert cupy_moe.combine(product, routing.src2dst_map, topk_weights=weights).shape == (M, K)
        assert cupy_moe.gather_scales(scale, routing.dst2src_map).shape == (M * TOPK, 1)
        print(experts.backend, "; ".join(experts.explain().splitlines()))
        assert not {"cupy", "torch", "cuda"} & set(sys.modules)
    """)
    assert printed == "reference reference runs: the arrays are on the CPU."


def test_backends_without_cupy():
    status = eval(run(WITHOUT_GPU_LIBRARIES, "import cupy_moe; print(cupy_moe.backends())"))
    assert status["reference"] == "available"
    others = {name: reason for name, reason in status.items() if name != "reference"}
    assert others
    for name, reason in others.items():
        assert "CuPy cannot be imported (No module named 'cupy' (blocked))" in reason, name
        assert "its extra cu13" in reason, name


def test_backends_beside_torch_without_cupy(monkeypatch):
    """Without the extra, whose cuBLAS is another one than torch's; and a reason that all have is given once."""
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    code = "import sys, cupy_moe.backend as b; sys.modules['torch'] = sys; "
    status = eval(run(WITHOUT_GPU_LIBRARIES, code + "print(b.backends())"))
    assert status["sm90"].endswith("pip install cupy-cuda13x")
    printed = run(WITHOUT_GPU_LIBRARIES, code + """
try: b.choose(0, None)
except RuntimeError as error: print(error)
""")
    assert printed.startswith("no fast backend is available on cuda:0. sm90, cublaslt, mma: CuPy cannot be imported")
    assert printed.count("pip install") == 1


def test_arrays_on_a_gpu_without_cupy():
    printed = run(WITHOUT_GPU_LIBRARIES, """
from cupy_moe import arrays
try: arrays.on_device(0)
except RuntimeError as error: print(error)
""")
    assert printed.startswith("arrays on a GPU need CuPy, which cannot be imported (No module named 'cupy'")


def test_backends_here_say_why_not():
    assert cupy_moe.backends()["reference"] == "available"
    for name, status in cupy_moe.backends().items():
        assert status == "available" or len(status.split()) > 3, f"{name}: {status!r} is no reason"


PUBLIC = [name for name in cupy_moe.__all__ if name != "__version__"]
TAKE_ARRAYS = [name for name in PUBLIC if name not in ("backends", "Workspace")]


def test_all_is_sorted_and_complete():
    assert cupy_moe.__all__ == sorted(cupy_moe.__all__)
    assert len(set(cupy_moe.__all__)) == len(cupy_moe.__all__)
    steps = {"route", "shuffle_rows", "gather_scales", "quantize_fp8", "activation_quantize", "grouped_gemm_fp8",
             "combine", "topk_softmax"}
    assert steps | {"Experts", "Workspace", "fused_experts", "backends", "Routing"} <= set(cupy_moe.__all__)
    from_package = {
        name for name, x in vars(cupy_moe).items() if not name.startswith("_") and not inspect.ismodule(x)
    }
    assert from_package == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    text = inspect.getdoc(getattr(cupy_moe, name))
    assert text.split("\n\n")[0].endswith("."), "the summary is a sentence"
    if name in TAKE_ARRAYS:
        assert re.search(r"\((M|E|rows|E \+ 1),", text), f"{name} names no shape"


METHODS = ["Experts.__call__", "Experts.batched", "Experts.tune", "Experts.workspace_nbytes"]
PARAMETERS = [*(set(TAKE_ARRAYS) - {"Routing", "fused_experts"}), *METHODS, "backends"]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_every_parameter_is_documented(name):
    function = cupy_moe
    for part in name.split("."):
        function = getattr(function, part)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.keys() - {"self"}:
        assert re.search(rf"^(\w+, )*{parameter}\b", text, re.M), parameter
    assert "Parameters\n" in text
    if name != "Experts":
        assert "Returns\n" in text or name == "backends"


def test_fused_experts_takes_what_experts_and_its_call_take():
    def parameters(function):
        return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}

    fused, layer, call = map(parameters, (cupy_moe.fused_experts, cupy_moe.Experts, cupy_moe.Experts.__call__))
    assert fused.keys() == (layer.keys() | call.keys()) - {"workspace"}
    for name, parameter in fused.items():
        for other in (layer, call):
            if name in other:
                assert parameter.default == other[name].default, name


@pytest.mark.parametrize("name", ["no_such.cu", "common", "__init__.py", "../pyproject.toml", ""])
def test_unknown_kernel_source(name):
    with pytest.raises(FileNotFoundError) as caught:
        kernels_cu.source(name)
    assert str(caught.value) == f"kernels_cu has no {name!r}; it has {', '.join(kernels_cu.names())}"


def test_kernel_sources():
    folder = Path(kernels_cu.__file__).parent
    on_disk = {path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert set(kernels_cu.names()) == on_disk
    assert {"common.cuh", "route.cu"} <= on_disk
    for name in kernels_cu.names():
        text = kernels_cu.source(name)
        assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n"), name
        assert "#include" not in text, f"{name}: NVRTC has no include path"
        assert ("__global__" in text) == name.endswith(".cu"), name


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev|post)\d+)?", cupy_moe.__version__)
    try:
        installed = importlib.metadata.version("cupy-moe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cupy-moe is not installed here, only on the path")
    assert installed == cupy_moe.__version__


def test_typed():
    assert (ROOT / "cupy_moe" / "py.typed").is_file()
