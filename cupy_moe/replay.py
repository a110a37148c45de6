# SPDX-License-Identifier: Apache-2.0
"""A plan's launches as one CUDA graph whose arguments can be changed: one enqueue per call instead of ten.

The launches are captured once on a stream of their own. Between replays, the kernel nodes whose addresses changed get
their new arguments; everything else is as it was captured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from cupy_moe import driver
from cupy_moe.driver import CAPTURE_MODE_RELAXED, Launch, Step


class _NodeParams(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class Replay:
    """An executable graph of ``steps``.

    Parameters
    ----------
    steps
        The launches, in order; each is called with the stream.
    changing
        Those of them whose arguments change.
    """

    def __init__(self, steps: Sequence[Step], changing: Sequence[Launch]) -> None:
        import cupy

        cuda, graph = driver.library(), ctypes.c_void_p()
        self._exec, self._graph = ctypes.c_void_p(), graph  # whose nodes name those of the executable one
        stream = cupy.cuda.Stream(non_blocking=True)
        handle = ctypes.c_void_p(stream.ptr)
        self._nodes: dict[Launch, tuple[ctypes.c_void_p, _NodeParams]] = {}
        driver.check(cuda.cuStreamBeginCapture_v2(handle, CAPTURE_MODE_RELAXED), "cuStreamBeginCapture")
        try:
            for step in steps:
                step(stream.ptr)
                if isinstance(step, Launch) and step in changing:
                    self._nodes[step] = _newest_node(handle), _NodeParams(*step.node_parameters())
        finally:
            ended = cuda.cuStreamEndCapture(handle, ctypes.byref(graph))
        driver.check(ended, "cuStreamEndCapture")
        instantiate = cuda.cuGraphInstantiateWithFlags
        driver.check(instantiate(ctypes.byref(self._exec), graph, ctypes.c_uint64(0)), "cuGraphInstantiate")
        self._update = cuda.cuGraphExecKernelNodeSetParams_v2
        self._launch = cuda.cuGraphLaunch

    def update(self) -> None:
        """Take over the present arguments of the launches that change."""
        for node, parameters in self._nodes.values():
            result = self._update(self._exec, node, ctypes.byref(parameters))
            if result:
                driver.check(result, "cuGraphExecKernelNodeSetParams")

    def __call__(self, stream: int) -> None:
        """Enqueue the graph on ``stream``."""
        result = self._launch(self._exec, ctypes.c_void_p(stream))
        if result:
            driver.check(result, "cuGraphLaunch")

    def __del__(self) -> None:
        cuda = driver.library()
        with driver.relaxed_capture():  # and giving back: the plan may be replaced during a capture
            if self._exec:
                cuda.cuGraphExecDestroy(self._exec)
            if self._graph:
                cuda.cuGraphDestroy(self._graph)


def available() -> bool:
    """Whether the driver can tell which node a launch became (CUDA 12.3 and later)."""
    return hasattr(driver.library(), "cuStreamGetCaptureInfo_v3")


def _newest_node(stream: ctypes.c_void_p) -> ctypes.c_void_p:
    """The node that the last operation on a capturing stream became."""
    status, count = ctypes.c_int(), ctypes.c_size_t()
    nodes, edges = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_void_p()
    result = driver.library().cuStreamGetCaptureInfo_v3(
        stream, ctypes.byref(status), None, None, ctypes.byref(nodes), ctypes.byref(edges), ctypes.byref(count)
    )
    driver.check(result, "cuStreamGetCaptureInfo")
    assert count.value == 1, "one stream was captured: its newest node stands alone"
    return ctypes.c_void_p(nodes[0])
