# SPDX-License-Identifier: Apache-2.0
"""What the README and docs/performance.md say of speed is what the files of results say."""

import json
import re
import shutil
import sys

import pytest

from benchmarks import history, report, summary, traffic
from benchmarks.models import MODELS
from cupy_moe import backend

ROOT, RESULTS = summary.ROOT, summary.RESULTS
TEXTS = {"README.md": report.section, "docs/performance.md": report.details}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_that_of_the_results(name):
    text = (ROOT / name).read_text()
    inside = text[text.index(report.BEGIN) + len(report.BEGIN) : text.index(report.END)]
    assert inside.strip() == TEXTS[name](), "run: python -m benchmarks.report"


@pytest.mark.parametrize("name", TEXTS)
def test_pictures_are_there_and_small(name):
    paths = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / name).read_text())
    assert paths
    for path in paths:
        assert 0 < ((ROOT / name).parent / path).stat().st_size < 150_000, path


SOURCES = {
    "speedup.png": (summary.TABLE, summary.PREFILL), "floor.png": (summary.TABLE, summary.PREFILL, summary.SWEEP),
    "parts.png": (summary.TIMELINE,),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pictures_are_those_of_the_results(name):
    picture = (ROOT / "docs" / "images" / name).read_bytes()
    assert summary.digests(SOURCES[name]).encode() in picture, "with matplotlib, run: python -m benchmarks.report"


def test_report_without_matplotlib(monkeypatch, tmp_path, capsys):
    for name in TEXTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main() == 0
    assert "matplotlib cannot be imported" in capsys.readouterr().out
    for name in TEXTS:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


@pytest.fixture
def more_results(monkeypatch, tmp_path):
    """Results of every kind, made up from the real table: skewed routing, a second backend, prefill, a sweep, steps."""
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    content = json.loads((RESULTS / summary.TABLE).read_text())
    uniform = [record for record in content["records"] if record["routing"] == "uniform"]
    plain = [record for record in uniform if (record["mode"], record["l2"]) == ("graph", "warm")]

    def save(name, records, **rates):
        header = {**content["header"], "rates": {**content["header"]["rates"], **rates}}
        (tmp_path / name).write_text(json.dumps({"header": header, "records": records, "failures": []}))

    skewed = [{**record, "routing": "skewed", **{us: 2 * record[us] for us in ("us", "us_min")}} for record in plain]
    other = [{**record, "backend": "other"} for record in plain if record["impl"] == "cupy_moe"]
    save(summary.TABLE, uniform + other)
    save(summary.SKEWED, skewed)
    save(summary.BACKENDS, [
        {**record, "us": us, "backend": name}
        for record in plain[:3] if record["impl"] == "cupy_moe" for name, us in (("sm90", 10), ("mma", 15))
    ])
    large = [{**record, "M": 32 * record["M"]} for record in plain if record["M"] >= 32]
    save(summary.PREFILL, [*large, *({**record, "impl": "torch", "backend": "gemms"} for record in large)])
    save(summary.SWEEP, [{**record, "M": 3 * record["M"]} for record in plain if record["shape"][0] == 64])
    sizes = (("warm", 64, "route"), ("cold", 1024, "route_count"), ("cold", 1024, "route_place"))
    steps = [{**record, "step": "route", "kernel": kernel, "bytes_s": 1e12, "of_copy": 0.4, "l2": l2, "M": M,
              "scheme": "none", "overlap": True, "us": 2.0}
             for record in plain[:1] for l2, M, kernel in sizes]
    steps[-1]["copy_bytes_s"] = 2e12
    save(summary.STEPS, steps, copy_bytes_s=2.5e12, write_bytes_s=3e12)
    busy = {"sm_mhz": 1400.0, "watts": 650.0, "power_capped": 0.5}
    content["header"] |= {"power_limit_watts": 700.0, "seconds": 2, "dense": {"before": {"fp8_flop_s": 1.3e15, **busy}}}
    save(summary.SUSTAINED, [{**record, **busy} for record in plain if record["M"] == 64])
    ours = [record for record in plain if (record["impl"], record["scheme"]) == ("cupy_moe", "token")]
    save(summary.INVARIANCE, [
        {**record, "batch_invariant": option, "same_bits": True, "us": (1 + option / 100) * record["us"]}
        for record in ours for option in (False, True)
    ])
    save(summary.EARLY, [
        {**record, "early_weights": option, "same_bits": True, "us": (1 - option / 50) * record["us"]}
        for record in plain if record["impl"] == "cupy_moe" and record["M"] <= 64 for option in (False, True)
    ])
    monkeypatch.setattr(summary, "RESULTS", tmp_path)


@pytest.mark.parametrize("impl", ["vllm", "cupy_moe"])
def test_a_disturbed_timing_is_left_out_by_name(impl, monkeypatch, tmp_path):
    content = json.loads((RESULTS / summary.TABLE).read_text())
    kind = {"impl": impl, "scheme": "token", "l2": "cold", "M": 64}
    record = next(one for one in content["records"] if all(one[key] == value for key, value in kind.items()))
    before = summary.speedups(summary.cells(summary.TABLE, scheme="token", l2="cold"))
    record["us"] = 3 * record["us_min"]
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / summary.TABLE).write_text(json.dumps(content))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    of = summary.cells(summary.TABLE, scheme="token", l2="cold")
    (gone,) = before.keys() - summary.speedups(of).keys()
    assert gone == (*record["shape"], 64)
    assert (gone in summary.over_floor(of)) == (impl == "vllm")
    assert f"scales per token, where something disturbed {impl} (" in report.section()
    assert report.details()


def test_every_device_by_its_own_results():
    """The tables put results of one device together; what only another one has says so."""
    names = (summary.TABLE, summary.PREFILL, summary.SWEEP, summary.SKEWED)
    assert {name.removesuffix(".json").rpartition("_")[2] for name in names} == {summary.DEVICE}
    text, here = report.section(), summary.device_of(summary.TABLE)
    for device in summary.DEVICES:
        of = summary.device_of(summary.on(device, summary.TABLE))
        warm = summary.cells(summary.on(device, summary.TABLE))
        ratio, over = (summary.mean(made(warm).values()) for made in (summary.speedups, summary.over_floor))
        part = text if of == here else text.split(f"On an {of}, at commit `", 1)[1]
        line = next(line for line in part.splitlines() if line.startswith("| 45 cells | uniform | warm | tensor |"))
        assert line.startswith(f"| 45 cells | uniform | warm | tensor | {ratio:.2f} |")
        assert line.endswith(f" | {over:.2f} |")
    elsewhere = {summary.device_of(name) for name in (summary.EAGER, summary.SUSTAINED)} - {here}
    assert all(f" on an {of}" in text for of in elsewhere)


def test_report_of_everything(more_results):
    text, more = report.section(), report.details()
    assert "| M = 512 | M = 4096 |" in text
    assert "| prefill, M from 1024 to 16384 | uniform | warm | tensor |" in text
    line, *before = (line for line in text.splitlines() if line.startswith("| 45 cells | skewed | warm | token |"))
    others = [summary.on(device, summary.TABLE) for device in summary.DEVICES if device != summary.DEVICE]
    assert len(before) == sum((RESULTS / name).exists() for name in others)
    over = summary.mean(summary.over_floor(summary.cells(summary.TABLE, scheme="token")).values())
    assert line.endswith(f" | {2 * over:.2f} |")
    assert " us | other us | vLLM / cupy_moe | cold L2 | skewed routing | scales per token | floor us |" in more
    assert "torch (the two GEMMs alone) us" in more
    assert "## One layer with 1 to 16384 tokens" in more
    assert "| route | route | none | 2.0 us, 1000 GB/s | - |" in more
    assert "| route | route_count | none | - | 2.0 us, 1000 GB/s, 40 % |" in more
    assert "| route | route_place | none | - | 2.0 us, 1000 GB/s, 40 % (50 %) |" in more
    assert "In brackets, where these are more than 16 MB, in percent of the rate of a copy of as many bytes" in more
    assert "starts while the one in front of it still runs, which is" in more
    assert "a call takes 1.010 times as long as without it (geometric mean of 45 cells, from 1.010 to 1.010)" in more
    assert "a call takes 0.980 times as long as without it (geometric mean of " in more
    assert "| 32, 8, 1024, 1024 | 2.0% | 2.0% |" in more
    assert "In 45 of 45 cells both have the same bits." in more
    assert re.search(r"operators take [\d.]+ times the energy for one \(geometric mean of 5 cells, from ", text)
    assert "replayed for 2 s." in more
    assert "found a power limit in force, which is 700 W." in more
    assert "kept busy 1300 TFLOP/s before all calls (1400 MHz, 650 W)." in more
    assert re.search(r"\| 8, 2, 4096, 28672 \| 64 \| [\d.]+ \| ([\d.]+) \| \1 \| \d+ \| 1400 \| 650 \| 50% \|", more)
    assert re.search(r"\| `sm90` \| \d \| 1.00 \| 1.00 \|\n\| `mma` \| 0 \| 1.50 \| 1.50 \|", more)


def test_plots(more_results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    assert {name: sources for name, (_, sources) in plots.PLOTS.items()} == SOURCES
    plots.draw_all(tmp_path / "images")
    for name in SOURCES:
        picture = (tmp_path / "images" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 150_000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_say_where_they_come_from(path):
    content = json.loads(path.read_text())
    header = content["header"]
    assert {"device", "versions", "commit", "command", "rates"} <= header.keys()
    assert len(header["commit"]) == 40
    assert header["command"].startswith("python -m benchmarks.")
    assert content["records"]


COUNTS = {
    summary.on(device, name): count
    for device in summary.DEVICES
    for name, count in (
        (summary.TABLE, 45), (summary.PREFILL, 25), (summary.SWEEP, 30), (summary.BACKENDS, 70), (summary.MODELS, 42),
    )
} | {"sweep_h100.json": 15}  # powers of two alone


def test_layers_of_models():
    """Each with its model's name, all of its tokens, and what they are in the README's means."""
    lines = report.details().splitlines()
    of = summary.cells(summary.MODELS)
    for name, shape in MODELS.items():
        begin = f"| {name}: {', '.join(map(str, shape))} | "
        shown = [int(line.removeprefix(begin).split(" | ")[0]) for line in lines if line.startswith(begin)]
        assert shown == [key[4] for key in of if key[:4] == shape]
    ratio = summary.mean(summary.speedups(of).values())
    assert f"| layers of models, M from 1 to 4096 | uniform | warm | tensor | {ratio:.2f} | " in report.section()


def test_history():
    """Of each step that has them the means of all cells; of the present tables what they say."""
    records = summary.load(summary.HISTORY)["records"]
    assert [record["commit"][:10] for record in records] == [*history.STEPS]
    assert all(record[l2]["cells"] == 45 for record in records for l2 in ("warm", "cold"))
    assert all(record["prefill"]["cells"] == 25 for record in records if "prefill" in record)
    kinds = {"warm": (summary.TABLE, "warm"), "cold": (summary.TABLE, "cold"), "prefill": (summary.PREFILL, "warm")}
    for kind, (name, l2) in kinds.items():
        content = summary.load(name)
        want = [record.get(kind) for record in records if record["commit"] == content["header"]["commit"]]
        assert want == [history.means(content, l2)], "name the step in benchmarks/history.py and run it"


def test_history_comes_from_the_commits(monkeypatch, tmp_path):
    asked = []

    def git(*arguments):
        asked.append(arguments)
        return "one\ntwo\n" if arguments[0] == "log" else (RESULTS / arguments[1].split("/")[-1]).read_text()

    commit = summary.load(summary.TABLE)["header"]["commit"]
    monkeypatch.setattr(history, "_git", git)
    monkeypatch.setattr(history, "STEPS", {commit[:10]: "a step"})
    assert history.main(["--out", str(tmp_path / "history.json")]) == 0
    content = json.loads((tmp_path / "history.json").read_text())
    assert [(record["commit"], record["step"]) for record in content["records"]] == [(commit, "a step")]
    assert {("show", f"{one}:benchmarks/results/{summary.TABLE}") for one in ("one", "two")} <= {*asked}


def test_the_order_of_the_backends():
    """A call without a name takes the first that is available: in no cell is it 5% slower than the best."""
    ratios = summary.over_fastest(summary.cells(summary.BACKENDS))
    assert [*ratios] == [name for name in backend.NAMES if name != "reference"]
    assert max(ratios[backend.NAMES[0]]) <= 1.05
    assert summary.mean(ratios["cublaslt"]) < summary.mean(ratios["mma"])


@pytest.mark.parametrize("name", [name for name in COUNTS if (RESULTS / name).exists()])
def test_records_of_the_cells(name):
    content = json.loads((RESULTS / name).read_text())
    keys = {"device", "impl", "backend", "shape", "M", "scheme", "routing", "mode", "l2", "us", "us_min", "us_max",
            "floor_us", "err"}
    assert all(keys <= record.keys() for record in content["records"])
    assert not content["failures"]
    cells = {(*record["shape"], record["M"]) for record in content["records"] if record["impl"] == "cupy_moe"}
    assert len(cells) == COUNTS[name]


def test_the_first_file_counts(monkeypatch):
    """Of cells in several."""
    record = summary.PLAIN | {"shape": [8, 2, 64, 32], "M": 1, "impl": "cupy_moe", "backend": "sm90"}
    monkeypatch.setattr(summary, "load", lambda name: {"records": [record | {"us": name}]})
    assert summary.cells("first", "second")[8, 2, 64, 32, 1]["cupy_moe"]["us"] == "first"


def test_traffic_of_a_call():
    """Each kernel in its column: the codes in front of GEMM 1 and those behind it are made by kernels of one name."""
    names = ("route", "amax_tokens", "quantize_shuffle", "grouped_gemm", "quantize_shuffle", "grouped_gemm", "combine")
    kernels = [{"kernel": name, "read_bytes": i * 1e6, "written_bytes": i * 1e8} for i, name in enumerate(names)]
    assert traffic.by_column(kernels) == {
        name: (i * 1e6, i * 1e8) for i, name in enumerate(traffic.COLUMNS, start=1)
    }
    record = {"shape": [8, 2, 4096, 64], "M": 1000, "traffic": kernels[1:]}
    assert traffic.traffic_table([record])[-1].startswith("| 8, 2, 4096, 64 | 1000 | 8.2 | 1.0 / 100 | 2.0 / 200 |")
