# SPDX-License-Identifier: Apache-2.0
"""Scratch memory and prepared arguments, without a GPU."""

import ctypes
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cupy_moe import Workspace, driver


@pytest.fixture
def room(monkeypatch):
    """A device with so many bytes; `room.nbytes` is to be changed by the test."""
    device = SimpleNamespace(nbytes=100, addresses=iter(range(1 << 20, 1 << 30, 1 << 10)))

    def memory(nbytes):
        if nbytes > device.nbytes:
            raise MemoryError(f"{nbytes} bytes")
        return SimpleNamespace(ptr=next(device.addresses))

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Memory=memory)))
    monkeypatch.setattr(driver, "relaxed_capture", nullcontext)
    return device


def test_workspace_grows(room):
    workspace = Workspace()
    first = workspace.reserve(50, 0)
    assert workspace.reserve(40, 0) == first
    assert (workspace.nbytes, workspace.generation) == (50, 1)
    assert workspace.reserve(60, 0) != first
    assert (workspace.nbytes, workspace.generation) == (60, 2)
    with pytest.raises(ValueError, match=r"^workspace: holds memory of cuda:0; got a layer on cuda:1$"):
        workspace.reserve(1, 1)


def test_workspace_that_finds_no_memory(room):
    """What was there is gone, and whoever has prepared launches for it can tell."""
    workspace = Workspace()
    first = workspace.reserve(50, 0)
    with pytest.raises(MemoryError, match="101 bytes"):
        workspace.reserve(101, 0)
    assert (workspace.nbytes, workspace.generation) == (0, 2)
    assert workspace.reserve(50, 0) not in (0, first)
    assert (workspace.nbytes, workspace.generation) == (50, 3)


def test_workspace_keeps_what_a_graph_has_recorded(room):
    workspace = Workspace()
    workspace.reserve(50, 0)
    workspace.note_capture()
    workspace.reserve(60, 0)
    workspace.reserve(70, 0)
    assert len(workspace._kept) == 1


class Fields(ctypes.Structure):
    _fields_ = (("n", ctypes.c_int32), ("table", ctypes.c_int64 * 2))


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), True])
def test_arguments_that_fit(value):
    assert driver._stored("n", ctypes.c_int32, value).value == value
    made = driver._stored("fields", Fields, {"n": value, "table": (1, 2**40)})
    assert (made.n, *made.table) == (value, 1, 2**40)
    assert driver._stored("x", ctypes.c_void_p, 0).value is None
    assert driver._stored("scale", ctypes.c_float, 0.5).value == 0.5


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_arguments_that_would_be_cut_off(value):
    with pytest.raises(ValueError, match=rf"^n: expected a number of 32 bits; got {value}$"):
        driver._stored("n", ctypes.c_int32, value)
    with pytest.raises(ValueError, match=r"^n: expected a number of 32 bits"):
        driver._stored("fields", Fields, {"n": value, "table": (1, 2)})
