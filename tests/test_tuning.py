# SPDX-License-Identifier: Apache-2.0
"""The records of tuning: their keys, their file and the algorithm they stand for, with a library that only proposes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_moe
from cupy_moe import tuning
from cupy_moe.cublaslt import CublasError
from cupy_moe.grouped_gemm import PREFERRED, Choice, GroupedGemm
from cupy_moe.tuning import Cache

ROOT = Path(cupy_moe.__file__).parents[1]
RECORD = {"average": 32, "tile": 13, "option": 1, "us": 5.5, "default_us": 6.0}
OTHER = {**RECORD, "tile": 20}


@pytest.fixture
def file(monkeypatch, tmp_path):
    """The file of this test, which is not there yet."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "caches"))
    return tuning.path()


def stored(file):
    return json.loads(file.read_text())["records"]


def loaded():
    """What a new process knows."""
    cache = Cache()
    cache.load()
    return cache


# ---- where --------------------------------------------------------------------------------------------------------


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv(tuning.ENVIRONMENT, "/mine")
    assert tuning.path() == Path("/mine/tuning-1.json")
    monkeypatch.setenv(tuning.ENVIRONMENT, "")
    assert tuning.path() == Path("/xdg/cupy_moe/tuning-1.json")
    for nothing in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert tuning.path() == tmp_path / ".cache" / "cupy_moe" / "tuning-1.json"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert tuning.path() == Path(tempfile.gettempdir(), f"cupy_moe-{os.getuid()}", "tuning-1.json")


def test_rows_up_to_a_power_of_two_share_a_key():
    keys = [tuning.key("a", 1, rows=rows) for rows in range(1, 70)]
    assert keys[0] == "a | 1 | 1 rows"
    assert keys[32:64] == ["a | 1 | 64 rows"] * 32  # 33 to 64 rows
    assert keys[64] == "a | 1 | 128 rows"
    assert len(set(keys)) == 8
    assert tuning.key("a", 2, rows=1) != keys[0] != tuning.key("b", 1, rows=1)


# ---- the file -----------------------------------------------------------------------------------------------------


def test_records_are_kept(file):
    cache = loaded()
    assert cache.find("k") is None
    assert not file.exists(), "reading makes no file"
    cache.store({"k": RECORD})
    assert cache.find("k") == RECORD
    assert cache.generation == 1
    assert loaded().find("k") == RECORD
    assert json.loads(file.read_text()) == {"format": 1, "records": {"k": RECORD}}
    assert {path.name for path in file.parent.iterdir()} == {"tuning-1.json", "tuning-1.lock"}


def test_file_is_read_once_and_only_by_load(file):
    Cache().store({"k": RECORD})
    cache = Cache()
    assert cache.find("k") is None
    cache.load()
    Cache().store({"k": OTHER, "later": OTHER})
    cache.load()
    assert cache.find("k") == RECORD
    assert cache.find("later") is None


def test_records_of_other_processes_stay(file):
    first, second = loaded(), loaded()
    first.store({"a": RECORD, "both": RECORD})
    second.store({"b": RECORD, "both": OTHER})
    assert stored(file) == {"a": RECORD, "b": RECORD, "both": OTHER}
    first.store({"c": RECORD})
    assert stored(file) == {"a": RECORD, "b": RECORD, "both": OTHER, "c": RECORD}
    assert first.find("both") == RECORD, "a process goes on with its own"


def test_what_is_stored_before_loading_comes_first(file):
    Cache().store({"a": RECORD, "b": RECORD})
    cache = Cache()
    cache.store({"a": OTHER})
    cache.load()
    assert [cache.find(key) for key in "ab"] == [OTHER, RECORD]


def test_processes_at_the_same_time(file):
    program = (
        "import sys; from cupy_moe.tuning import Cache\n"
        "for i in range(20): Cache().store({f'{sys.argv[1]} {i}': {'tile': i}})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program, name], env=environment) for name in "abc"
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert stored(file) == {f"{name} {i}": {"tile": i} for name in "abc" for i in range(20)}


def test_lock_that_is_something_else(file, tmp_path):
    """Another user's link in a shared folder: what it leads to stays as it is."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    file.parent.mkdir()
    file.with_suffix(".lock").symlink_to(precious)
    Cache().store({"k": RECORD})
    assert precious.read_text() == "kept"


def test_file_for_other_users(file):
    """As readable as the user wants files to be."""
    before = os.umask(0o022)
    try:
        Cache().store({"k": RECORD})
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644


def test_failure_in_the_middle_of_writing(file, monkeypatch):
    Cache().store({"old": RECORD})
    cache = loaded()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.warns(RuntimeWarning, match=r"tuning-1\.json: cannot be written \(the disk is gone\)"):
            cache.store({"new": RECORD})
    assert cache.find("new") == RECORD, "for this process"
    assert stored(file) == {"old": RECORD}
    assert not list(file.parent.glob("*.tmp"))


def test_folder_that_cannot_be_made(file):
    file.parent.parent.mkdir(exist_ok=True)
    file.parent.write_text("a file")
    cache = Cache()
    with pytest.warns(RuntimeWarning, match=r"tuning-1\.json: cannot be read and is ignored \(.*Not a directory"):
        cache.load()
    with pytest.warns(RuntimeWarning, match=r"tuning-1\.json: cannot be written"):
        cache.store({"k": RECORD})
    assert cache.find("k") == RECORD
    assert cache.generation == 1


FOREIGN = {
    "empty": b"",
    "cut off": b'{"format": 1, "records": {"k": {"ti',
    "binary": b"\xff\xfe\x00\x01",
    "list": b"[1, 2]",
    "number": b"3",
    "no format": b'{"records": {}}',
    "other format": b'{"format": 2, "records": {}}',
    "records are a list": b'{"format": 1, "records": [1]}',
    "a record is a number": b'{"format": 1, "records": {"k": 3}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file(file, content):
    """Ignored with a warning that names it, and replaced when there is something to store."""
    file.parent.mkdir()
    file.write_bytes(content)
    cache = Cache()
    with pytest.warns(RuntimeWarning, match="is no tuning cache and is ignored") as caught:
        cache.load()
    assert str(file) in str(caught[0].message)
    assert cache.find("k") is None
    assert file.read_bytes() == content
    with pytest.warns(RuntimeWarning, match="is ignored"):
        cache.store({"k": RECORD})
    assert loaded().find("k") == RECORD


# ---- what a record stands for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [
    None, {}, {"tile": 13}, {**RECORD, "tile": "13"}, {**RECORD, "average": 1.5}, {**RECORD, "option": -1},
    {**RECORD, "option": None},
])
def test_records_of_another_kind(record):
    assert Choice.of(record) is None


def test_choice():
    assert Choice.of(RECORD) == Choice(32, 13, 1)
    assert Choice.of(RECORD).configuration == (13, 1)


class Library:
    """The grouped matmul of a library that proposes configurations by average, and is asked for nothing else."""

    def __init__(self, proposals):
        self.proposals, self.asked = proposals, []

    def algorithms(self, average):
        self.asked.append(average)
        return self.proposals.get(average, [(1, 1)])

    def configuration(self, algorithm):
        return algorithm


def make_gemm(proposals, experts=8):
    gemm = object.__new__(GroupedGemm)
    gemm._matmuls = {name: Library(proposals) for name in ("float16", "float32")}
    gemm._key, gemm._algorithms, gemm.weight_pointers = ("library", "device", "8 x 16 x 16"), {}, np.zeros(experts)
    gemm._routed_to = experts
    return gemm


@pytest.fixture
def cache(monkeypatch, file):
    monkeypatch.setattr(tuning, "CACHE", Cache())
    return tuning.CACHE


def test_choice_of_an_algorithm(cache):
    rows = 8 * 20  # 20 per expert
    preferred = next(choice for below, choice in PREFERRED if below > 20)
    usual = [(1, 1), preferred.configuration, (2, 2)]
    gemm = make_gemm({preferred.average: usual, 64: [(9, 9), (18, 1)]})
    assert gemm.algorithms(rows) == [preferred.configuration, (1, 1), (2, 2)]
    record = {"average": 64, "tile": 18, "option": 1}
    cache.store({gemm.key(rows, "float16"): record})
    assert gemm.algorithms(rows) == [(18, 1), (9, 9)]
    assert gemm.algorithms(rows + 1) == [(18, 1), (9, 9)], "the same power of two"
    assert gemm.algorithms(rows, "float32")[0] == preferred.configuration, "another result"
    assert make_gemm({64: [(9, 9), (18, 1)]}).algorithms(rows)[0] == (18, 1), "another layer of this shape"
    for unknown in ({**record, "tile": 19}, {**record, "average": 7}, {"schedule": "pingpong"}):
        cache.store({gemm.key(rows, "float16"): unknown})
        assert gemm.algorithms(rows)[0] == preferred.configuration, "not proposed: the default"


def test_library_that_proposes_nothing_preferred(cache):
    assert make_gemm({}).algorithms(100) == [(1, 1)]


def test_library_that_proposes_nothing(cache):
    gemm = make_gemm({average: [] for average in range(300)})
    with pytest.raises(CublasError, match=r"^cuBLASLt proposes no algorithm for .* of 8 x 16 x 16 codes"):
        gemm.algorithms(100)
    rows, record = 8 * 20, {"average": 64, "tile": 18, "option": 1}
    preferred = next(choice for below, choice in PREFERRED if below > 20)
    gemm = make_gemm({preferred.average: [], 64: [(9, 9)]})
    cache.store({gemm.key(rows, "float16"): record})
    assert gemm.algorithms(rows) == [(9, 9)], "not what was tuned, but there is nothing else"


def test_rows_of_experts_held_elsewhere(cache):
    """A quarter of the experts: the choice is that for a quarter of the rows."""
    part, whole = make_gemm({}), make_gemm({})
    part._routed_to = 32
    assert part.key(400, "float16") == whole.key(100, "float16") != whole.key(400, "float16")
    assert part._default(400) == whole._default(100) != whole._default(400)


def test_library_is_asked_once(cache):
    gemm = make_gemm({})
    for rows in (100, 101, 128):
        gemm.algorithms(rows)
    assert len(gemm._matmuls["float16"].asked) == 1


# ---- what is timed ------------------------------------------------------------------------------------------------


def test_products_that_are_the_same():
    """Those of weights that hold NaN too, but not one in which something is missing."""
    product = np.linspace(1, 2, 100)
    product[7], product[8] = np.nan, np.inf
    assert tuning._same(product, product)
    assert tuning._same(product * 1.001, product)
    assert not tuning._same(product * 1.01, product)
    assert not tuning._same(np.where(np.arange(100) == 50, np.nan, product), product)
    assert not tuning._same(np.nan_to_num(product), product)


def test_tokens():
    assert tuning.tokens_of("M", None) == [4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert tuning.tokens_of("M", 7) == tuning.tokens_of("M", np.int64(7)) == [7]
    for many in ([1, 8, 3, 8], (3, 8, 1), np.array([8, 1, 3])):
        assert tuning.tokens_of("M", many) == [8, 3, 1]
    assert tuning.tokens_of("M", range(1, 4)) == [3, 2, 1]


@pytest.mark.parametrize(("tokens", "topk", "experts"), [(1, 1, 1), (1, 8, 64), (1000, 2, 8), (50, 5, 5)])
def test_uniform_routing(tokens, topk, experts):
    counts = tuning.uniform_counts(tokens, topk, experts)
    assert counts.dtype == np.int32
    assert counts.shape == (experts,)
    assert counts.sum() == tokens * topk
    assert counts.max() <= tokens, "different experts for a token"


def test_times(monkeypatch):
    """Microseconds of one call; a variant far behind is given up, the first one never."""
    now = 0.0

    class Event:
        def record(self, stream):
            self.at = now

        def synchronize(self):
            pass

    def taking(us):
        def call(stream):
            nonlocal now
            now += us / 1e3

        return call

    cuda = SimpleNamespace(
        Event=Event, Stream=lambda **_: SimpleNamespace(ptr=0), get_elapsed_time=lambda start, stop: stop.at - start.at
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    assert tuning._times([taking(us) for us in (50, 10, 14, 16)]) == pytest.approx([50, 10, 14, float("inf")])
