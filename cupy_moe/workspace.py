# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of the pipeline."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from cupy_moe import driver

ALIGNMENT = 256


class Workspace:
    """Device memory for the intermediates of a call; grows when a call needs more, never shrinks.

    Layers that run one after another on one stream can share one (``Experts(..., workspace=w)``). Calls on two streams
    that may overlap need a workspace each. It is of the device of the first call: a layer of another one raises
    ValueError. The lock keeps the launches of one call together when threads share one.

    Attributes
    ----------
    nbytes : int
        Bytes held now.
    generation : int
        Goes up each time the memory moves.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.generation = 0
        self.lock = threading.RLock()
        self._device: int | None = None
        self._memory: Any = None
        self._captured = False
        self._kept: list[Any] = []  # outgrown, but a CUDA graph may still use it

    def __reduce__(self) -> Any:
        raise TypeError("Workspace can be neither copied nor pickled, since it holds addresses: make another one")

    def note_capture(self) -> None:
        """Keep the memory of now for good: a CUDA graph has recorded its address."""
        self._captured = True

    def reserve(self, nbytes: int, device: int) -> int:
        """Address of at least ``nbytes`` bytes on ``device``, the current device; contents are lost on growth."""
        import cupy

        if self._device not in (None, device):
            raise ValueError(f"workspace: holds memory of cuda:{self._device}; got a layer on cuda:{device}")
        if nbytes > self.nbytes:
            if self._captured:
                self._kept.append(self._memory)
                self._captured = False
            self.generation += 1  # what is prepared for the old memory has none, even if there is no new one
            # Not from CuPy's pool: giving this memory back has to wait for kernels on any stream, as cudaFree does.
            with driver.relaxed_capture():
                self._memory, self.nbytes = None, 0
                self._memory = cupy.cuda.Memory(nbytes)
            self._device = device
            self.nbytes = nbytes
        return int(self._memory.ptr) if self._memory is not None else 0


def dedicated(shape: tuple[int, ...], dtype: Any) -> Any:
    """A CuPy array of zeros with memory of its own on the current device.

    For what calls on any stream use: giving this memory back waits for all of them, as `Workspace` does, while CuPy's
    pool would hand it to the next array of the stream on which it was made.
    """
    import cupy

    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    with driver.relaxed_capture():
        memory = cupy.cuda.Memory(max(nbytes, 1))
    array = cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))
    array.data.memset_async(0, nbytes)
    return array


class Carver:
    """Hands out consecutive aligned pieces of a range of addresses; from 0 on it only counts."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.used = 0

    def take(self, nbytes: int) -> int:
        """Address of the next ``nbytes`` bytes."""
        address = self.base + self.used
        self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return address
