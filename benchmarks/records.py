# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their common options, where a measurement comes from, and writing it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--commit", help="of this code, where there is no git folder")
    return parser


def save(out: str | None, header: dict[str, Any], records: list[dict[str, Any]], **more: Any) -> None:
    """Write the JSON file of --out, if any; each record is a line."""
    if out:
        texts = {name: json.dumps(value, indent=1) for name, value in {"header": header, **more}.items()}
        texts["records"] = "[\n" + ",\n".join(map(json.dumps, records)) + "\n]"
        Path(out).write_text("{\n" + ",\n".join(f'"{name}": {text}' for name, text in texts.items()) + "\n}\n")


def make_header(
    module: str, arguments: list[str], *, out: str | None = None, commit: str | None = None,
    vllm_ops: str | None = None, vllm_version: str | None = None,
) -> dict[str, Any]:
    """Device, versions, commit, command, clocks as found, and the device's rates measured now."""
    import torch  # here, since what only writes a file does without

    from benchmarks import timing

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy", "vllm"):
        try:
            versions.setdefault(name.split("-")[0], importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    command = " ".join([f"python -m {module}", *arguments])
    for path, name in ((vllm_ops, "DIR"), (out, "FILE.json")):
        command = command.replace(path, name) if path else command
    if vllm_ops and vllm_version:
        versions["vllm"] = vllm_version
    found = timing.clocks()
    versions["driver"] = found.pop("driver_version")
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": commit or timing.query("git", "rev-parse", "HEAD"),
        "command": command,
        "clocks": found,
        "rates": {**timing.measure_memory_rates(), "fp8_flop_s": timing.measure_fp8_rate()},
        "skipped": {},
    }
