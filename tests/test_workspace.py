# SPDX-License-Identifier: Apache-2.0
"""Scratch memory and prepared arguments, without a GPU."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
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
    assert workspace.reserve(40, 0) == workspace.reserve(50, 0) == first
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


@pytest.fixture
def cuda(monkeypatch):
    """A driver that notes what it is asked for."""
    asked = []

    def exchange(mode):
        asked.append(mode._obj.value)
        mode._obj.value = asked[-2] if len(asked) > 1 else 0  # the mode before

    def get(text, result, to):
        to._obj.value = text

    monkeypatch.setattr(driver, "library", lambda: SimpleNamespace(
        cuFuncSetAttribute=lambda function, attribute, value: asked.append(value.value),
        cuThreadExchangeStreamCaptureMode=exchange, cuLaunchKernelEx=None,
        cuGetErrorName=partial(get, b"CUDA_ERROR"), cuGetErrorString=partial(get, b"what it means"),
    ))
    return asked


def make_kernel(*, can_overlap=True):
    function = SimpleNamespace(name="f", kernel=SimpleNamespace(ptr=1), shared_size_bytes=1024)
    return driver.Kernel(function, {}, can_overlap=can_overlap)


def test_limit_of_shared_memory(cuda):
    """Raised where a kernel's own and the dynamic shared memory exceed 48 KiB together, and never lowered."""
    kernel = make_kernel()
    for nbytes in (0, 47 << 10, (47 << 10) + 1, 60000, 50000):
        kernel.allow_shared_bytes(nbytes)
    assert cuda == [(47 << 10) + 1, 60000]


def test_launches_overlap_where_the_device_can(cuda):
    for can_overlap in (True, False):
        launch = driver.Launch(make_kernel(can_overlap=can_overlap), (1, 1), 32)
        assert launch._config.attribute_count == 0
        assert launch.overlapping()._config.attribute_count == can_overlap


def test_capture_mode_is_given_back(cuda):
    with pytest.raises(MemoryError), driver.relaxed_capture():
        raise MemoryError
    assert cuda == [driver.CAPTURE_MODE_RELAXED, 0]


def test_streams_are_told_apart():
    """By their handle, but for the one that stands for another stream in each thread."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(driver.stream_identity, 5).result() == driver.stream_identity(5) == (5, 0)
        assert threads.submit(driver.stream_identity, 2).result() != driver.stream_identity(2)


def test_error_of_the_driver(cuda):
    with pytest.raises(driver.CudaError, match=r"^a call failed: CUDA_ERROR \(700\): what it means$"):
        driver.check(700, "a call")
