# SPDX-License-Identifier: Apache-2.0
"""Which copy of cuBLASLt is taken and the reason given where none is, with libraries that have little but a version."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cupy_moe import cublaslt
from cupy_moe.cublaslt import ENVIRONMENT

H100, B200, B300, THOR = (9, 0), (10, 0), (10, 3), (11, 0)
HOW = "pip install --target DIR --no-deps 'nvidia-cublas>=13.5' and set CUPY_MOE_CUBLASLT=DIR/"


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Each test searches anew, and leaves nothing behind that it found."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    cublaslt.search.cache_clear()
    yield
    cublaslt.search.cache_clear()


@pytest.fixture
def system(monkeypatch):
    """Replace what can be opened: path to version (None: no grouped matmul) or OSError; returns the paths opened."""

    def install(libraries, on_path=None):
        opened = []

        def load(path, mode):
            opened.append((path, mode))
            content = libraries.get(path, OSError(f"{path}: cannot open shared object file"))
            if isinstance(content, OSError):
                raise content
            library = FakeLibrary()
            library.cublasLtGetVersion = Function(content.version)
            if content.grouped:
                library.cublasLtGroupedMatrixLayoutCreate = Function(0)
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        if on_path is not None:
            monkeypatch.setattr(cublaslt, "_candidates", lambda: iter(on_path))
        return opened

    return install


class FakeLibrary:
    """A loaded library: its functions are attributes."""


class Function:
    """A function of a library: returns a number once its result type has been set."""

    def __init__(self, result):
        self.result = result
        self.restype = None

    def __call__(self):
        return self.result


class Content:
    def __init__(self, version, *, grouped=True):
        self.version, self.grouped = version, grouped


WHEEL = ("/site/nvidia/cu13/lib/libcublasLt.so.13", "the installed nvidia-cublas wheel")
SYSTEM = ("libcublasLt.so.13", "the system")


@pytest.mark.parametrize(("capability", "oldest"), [(H100, 130500), (B200, 130300), (B300, 130300), (THOR, 130300)])
def test_oldest_version(system, capability, oldest):
    system({SYSTEM[0]: Content(oldest)}, [SYSTEM])
    found, reason = cublaslt.search(capability)
    assert reason == ""
    assert (found.path, found.through, found.problem) == (*SYSTEM, None)
    assert found.version == (oldest // 10000, oldest // 100 % 100, 0)
    cublaslt.search.cache_clear()

    system({SYSTEM[0]: Content(oldest - 1)}, [SYSTEM])
    found, reason = cublaslt.search(capability)
    assert found is None
    major, minor = capability
    assert f"cuBLAS >= 13.{oldest // 100 % 100} is needed on compute capability {major}.{minor}; " in reason


@pytest.mark.parametrize(("number", "version"), [(130401, "13.4.1"), (120905, "12.9.5")])
def test_too_old(system, number, version):
    """The reason names the version, where it came from, what is needed, and the command that gets it."""
    system({SYSTEM[0]: Content(number)}, [SYSTEM])
    found, reason = cublaslt.search(H100)
    assert found is None
    assert reason.startswith(
        "cuBLAS >= 13.5 is needed on compute capability 9.0; "
        f"cuBLAS {version} at libcublasLt.so.13 (through the system) is too old. To get it: {HOW}"
    )


def test_first_usable_copy_is_taken(system):
    later = ("/later/libcublasLt.so.13", "the installed nvidia-cublas wheel")
    libraries = {WHEEL[0]: Content(130400), later[0]: Content(131002), SYSTEM[0]: Content(131100)}
    opened = system(libraries, [WHEEL, later, SYSTEM])
    found, reason = cublaslt.search(H100)
    assert (found.path, found.version, reason) == (later[0], (13, 10, 2), "")
    assert [path for path, _ in opened] == [WHEEL[0], later[0]]


def test_every_copy_is_in_the_reason(system):
    system({WHEEL[0]: Content(130400), "/other": Content(130500, grouped=False)}, [WHEEL, ("/other", "a test"), SYSTEM])
    found, reason = cublaslt.search(H100)
    assert found is None
    assert f"cuBLAS 13.4.0 at {WHEEL[0]} (through the installed nvidia-cublas wheel) is too old; " in reason
    assert "cuBLAS 13.5.0 at /other (through a test) has no grouped matmul; " in reason
    missing = "cuBLAS at libcublasLt.so.13 (through the system) cannot be opened: libcublasLt.so.13: cannot open shared"
    assert missing in reason
    assert HOW in reason


def test_refused_version(system):
    system({SYSTEM[0]: Content(130702)}, [SYSTEM])
    found, reason = cublaslt.search(B300)
    assert found is None
    assert "13.7.2 at libcublasLt.so.13" in reason
    assert "silent corruption on compute capability 10.3" in reason
    for capability in (H100, B200, THOR):
        assert cublaslt.search(capability)[0].version == (13, 7, 2)
    for number in (130699, 130800):
        cublaslt.search.cache_clear()
        system({SYSTEM[0]: Content(number)}, [SYSTEM])
        assert cublaslt.search(B300)[0] is not None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_unsupported_capability(system, capability):
    opened = system({SYSTEM[0]: Content(139900)})
    found, reason = cublaslt.search(capability)
    assert found is None
    assert f"no grouped fp8 matmul for compute capability {capability[0]}.{capability[1]}; " in reason
    assert reason.endswith("it has for 9.0, 10.0, 10.3, 11.0")
    assert not opened  # nothing that could be installed would help


def test_library_is_opened_apart_from_others(system):
    """With deep binding and local names: another cuBLAS may be loaded in the same process."""
    opened = system({SYSTEM[0]: Content(131000)}, [SYSTEM])
    cublaslt.search(H100)
    ((_, mode),) = opened
    assert mode & os.RTLD_DEEPBIND
    assert not mode & os.RTLD_GLOBAL


def test_search_is_done_once(system):
    opened = system({SYSTEM[0]: Content(131000)}, [SYSTEM])
    assert cublaslt.search(H100) is cublaslt.search(H100)
    assert len(opened) == 1


class TestCandidates:
    def test_environment_is_the_only_one(self, monkeypatch, tmp_path):
        self.wheel(monkeypatch, tmp_path)
        monkeypatch.setenv(ENVIRONMENT, "/mine/libcublasLt.so.13")
        assert list(cublaslt._candidates()) == [("/mine/libcublasLt.so.13", ENVIRONMENT)]

    def test_empty_environment_is_none(self, monkeypatch):
        monkeypatch.setenv(ENVIRONMENT, "")
        assert list(cublaslt._candidates())[-1] == SYSTEM

    def test_wheels_on_the_path_come_before_the_system(self, monkeypatch, tmp_path):
        wheel = self.wheel(monkeypatch, tmp_path)
        assert list(cublaslt._candidates()) == [(str(wheel), WHEEL[1]), SYSTEM]

    @staticmethod
    def wheel(monkeypatch, folder):
        """Make `folder` the only one on the path, with a wheel's library in it, twice."""
        library = folder.resolve() / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
        library.parent.mkdir(parents=True)
        library.touch()
        monkeypatch.setattr(sys, "path", [str(folder), str(folder), str(folder / "nothing here")])
        return library


def test_environment_is_not_second_guessed(system, monkeypatch, tmp_path):
    """A choice that cannot be used is the reason; a good copy elsewhere is not taken instead."""
    TestCandidates.wheel(monkeypatch, tmp_path)
    good = str(tmp_path.resolve() / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13")
    system({good: Content(131000), "/mine": Content(130100), SYSTEM[0]: Content(131000)})
    assert cublaslt.search(H100)[0].path == good
    for path, problem in (("/mine", "cuBLAS 13.1.0 at /mine (through CUPY_MOE_CUBLASLT) is too old"),
                          ("/none", "cuBLAS at /none (through CUPY_MOE_CUBLASLT) cannot be opened: ")):
        cublaslt.search.cache_clear()
        monkeypatch.setenv(ENVIRONMENT, path)
        found, reason = cublaslt.search(H100)
        assert found is None
        assert problem in reason
        assert good not in reason


class TestRealFiles:
    def test_missing_file(self, monkeypatch, tmp_path):
        path = tmp_path / "libcublasLt.so.13"
        monkeypatch.setenv(ENVIRONMENT, str(path))
        found, reason = cublaslt.search(H100)
        assert found is None
        assert f"cuBLAS at {path} (through CUPY_MOE_CUBLASLT) cannot be opened: {path}: cannot open" in reason

    def test_file_that_is_no_library(self, monkeypatch, tmp_path):
        path = tmp_path / "libcublasLt.so.13"
        path.write_text("no library")
        monkeypatch.setenv(ENVIRONMENT, str(path))
        found, reason = cublaslt.search(H100)
        assert found is None
        assert f"at {path} (through CUPY_MOE_CUBLASLT) cannot be opened: " in reason

    @pytest.mark.parametrize(("source", "problem"), [
        ("long cublasLtGetVersion() { return 131002; } void cublasLtGroupedMatrixLayoutCreate() {}", None),
        ("long cublasLtGetVersion() { return 131002; }", "has no grouped matmul"),
        ("long cublasLtGetVersion() { return 130400; } void cublasLtGroupedMatrixLayoutCreate() {}", "is too old"),
        ("void unrelated() {}", "is no cuBLASLt"),
    ], ids=["good", "not grouped", "too old", "another library"])
    def test_compiled_library(self, monkeypatch, tmp_path, source, problem):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        path: Path = tmp_path / "libcublasLt.so.13"
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-o", str(path), "-"]
        subprocess.run(command, input=source, text=True, check=True, timeout=60)
        monkeypatch.setenv(ENVIRONMENT, str(path))
        found, reason = cublaslt.search(H100)
        if problem is None:
            assert (found.path, found.version, reason) == (str(path), (13, 10, 2), "")
        else:
            assert found is None
            assert f"at {path} (through {ENVIRONMENT}) {problem}" in reason
