# SPDX-License-Identifier: Apache-2.0
"""How long the first call of a process takes, with nothing compiled and with the kernels on disk.

``python -m benchmarks.first_call --out FILE.json`` starts two processes that share a fresh cache folder and records,
in seconds: ``import`` (CuPy and cupy_moe), ``device`` (CUDA's own start), ``library`` (opening cuBLASLt and its
self-test), ``experts`` (making an `Experts`) and ``call`` (the first call, compiling included).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

CHILD = "--child"


def measure() -> dict[str, float]:
    """The parts of a first call in this process."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = round(time.perf_counter() - began, 4)
        began = time.perf_counter()

    import cupy
    import numpy as np

    import cupy_moe

    lap("import")
    experts, topk, hidden, inner, tokens = 32, 8, 1024, 1024, 16
    random = np.random.default_rng(0)
    w1 = cupy.asarray(random.integers(0, 120, (experts, 2 * inner, hidden), np.uint8))
    w2 = cupy.asarray(random.integers(0, 120, (experts, hidden, inner), np.uint8))
    scale = cupy.asarray(np.full(experts, 1e-3, np.float32))
    x = cupy.asarray(random.standard_normal((tokens, hidden)).astype(np.float16))
    ids = cupy.asarray(np.argsort(random.random((tokens, experts)), axis=1)[:, :topk].astype(np.int32))
    weights = cupy.asarray(random.random((tokens, topk)).astype(np.float32))
    lap("device")
    fast = [name for name, status in cupy_moe.backends().items() if status == "available" and name != "reference"]
    assert fast, cupy_moe.backends()
    lap("library")
    layer = cupy_moe.Experts(w1, w2, w1_scale=scale, w2_scale=scale)
    lap("experts")
    layer(x, weights, ids)
    cupy.cuda.get_current_stream().synchronize()
    lap("call")
    return seconds


def main() -> int:
    """Run both processes."""
    if CHILD in sys.argv:
        print(json.dumps(measure()))
        return 0
    from benchmarks.records import make_header, make_parser, save

    options = make_parser("benchmarks.first_call", __doc__).parse_args()
    header = make_header("benchmarks.first_call", sys.argv[1:], out=options.out, commit=options.commit)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "warm"):
            command = [sys.executable, "-m", "benchmarks.first_call", CHILD]
            environment = {**os.environ, "CUPY_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
            seconds = json.loads(done.stdout.strip().splitlines()[-1])
            records.append({"device": header["device"], "cache": state, "seconds": seconds})
            print(f"cache {state}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    save(options.out, header, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
