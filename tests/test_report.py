# SPDX-License-Identifier: Apache-2.0
"""What the README and docs/performance.md say of speed is what the files of results say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def report():
    loaded = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "part"), [("README.md", "section"), ("docs/performance.md", "details")])
def test_text_is_that_of_the_results(report, name, part):
    text = (ROOT / name).read_text()
    inside = text[text.index(report.BEGIN) + len(report.BEGIN) : text.index(report.END)]
    assert inside.strip() == getattr(report, part)(), "run: python -m benchmarks.report"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_say_where_they_come_from(path):
    content = json.loads(path.read_text())
    header = content["header"]
    assert {"device", "versions", "commit", "command", "rates"} <= header.keys()
    assert len(header["commit"]) == 40
    assert header["command"].startswith("python -m benchmarks.")
    assert content["records"]


def test_records_of_the_table():
    content = json.loads((RESULTS / "table_h100.json").read_text())
    keys = {"device", "impl", "backend", "shape", "M", "scheme", "routing", "mode", "l2", "us", "us_min", "us_max",
            "floor_us", "err"}  # fmt: skip
    assert all(keys <= record.keys() for record in content["records"])
    assert not content["failures"]
    cells = {(*record["shape"], record["M"]) for record in content["records"] if record["impl"] == "cupy_moe"}
    assert len(cells) == 45
