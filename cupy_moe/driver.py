# SPDX-License-Identifier: Apache-2.0
"""Kernel launches with prepared arguments, through the CUDA driver.

CuPy compiles and loads the kernels; launching goes straight to ``cuLaunchKernelEx``. Every argument of a launch is
stored once, and a call only overwrites the pointers that changed: a few microseconds of host time. Programmatic
dependent launch is a launch attribute that CuPy's own launch does not offer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_TENSOR_MAP_UINT8, _TENSOR_MAP_SWIZZLE_128B, _TENSOR_MAP_L2_PROMOTION_128B = 0, 3, 2
CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode
_PER_THREAD_STREAM = 2  # the handle cudaStreamPerThread
_DEFAULT_SHARED_BYTES = 48 * 1024


Step = Callable[[int], None]
"""Something prepared: called with the stream."""


class CudaError(RuntimeError):
    """A CUDA driver call failed; the message names the call, the error and what it means."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def library() -> ctypes.CDLL:
    """The CUDA driver."""
    return ctypes.CDLL("libcuda.so.1")


def check(result: int, what: str) -> None:
    """Raise `CudaError` unless ``result``, the ``CUresult`` of the call named ``what``, is success."""
    if result:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        library().cuGetErrorName(result, ctypes.byref(name))
        library().cuGetErrorString(result, ctypes.byref(text))
        label = (name.value or b"unknown error").decode()
        raise CudaError(f"{what} failed: {label} ({result}): {(text.value or b'').decode()}")


class Kernel:
    """A loaded kernel: its handle and the types of its parameters, by name, in order.

    Parameters
    ----------
    function
        CuPy's raw kernel; it keeps the module alive.
    parameters
        Name to ctypes type, as `cupy_moe.compiler.signature` reads them from the source.
    can_overlap
        Whether the device knows programmatic dependent launch (compute capability 9.0 and later).
    """

    def __init__(self, function: Any, parameters: dict[str, Any], *, can_overlap: bool) -> None:
        self.name: str = function.name
        self.handle: int = function.kernel.ptr
        self.parameters = parameters
        self.can_overlap = can_overlap
        self._owner = function
        self._shared_bytes = _DEFAULT_SHARED_BYTES - function.shared_size_bytes  # of dynamic shared memory per block
        self._raising = threading.Lock()

    def allow_shared_bytes(self, nbytes: int) -> None:
        """Raise the limit of dynamic shared memory per block to ``nbytes`` where it is below that."""
        with self._raising:
            if nbytes > self._shared_bytes:
                result = library().cuFuncSetAttribute(
                    ctypes.c_void_p(self.handle), _MAX_DYNAMIC_SHARED_SIZE_BYTES, ctypes.c_int(nbytes)
                )
                check(result, f"{nbytes} bytes of dynamic shared memory for {self.name}")
                self._shared_bytes = nbytes  # never lowered: launches that need more may be prepared


class Launch:
    """One launch, prepared: ``launch(stream)`` enqueues it.

    Parameters
    ----------
    kernel
        What to launch.
    grid, block
        Blocks (x, y) and threads per block.
    shared_bytes
        Dynamic shared memory per block.
    **arguments
        One value per kernel parameter, under its name in the CUDA source: addresses (0 or None for null), integers or
        floats; for a struct, a dict of its fields.

    Raises
    ------
    TypeError
        If the names are not exactly those of the kernel's parameters.
    ValueError
        If an integer is too large for its parameter.
    """

    __slots__ = ("_args", "_attribute", "_config", "_config_ref", "_function", "_keep", "_launch", "kernel")

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int], block: int, *, shared_bytes: int = 0, **arguments: Any
    ) -> None:
        if arguments.keys() != kernel.parameters.keys():
            wrong = sorted(arguments.keys() ^ kernel.parameters.keys())
            raise TypeError(f"{kernel.name} takes {list(kernel.parameters)}; missing or unknown: {wrong}")
        kernel.allow_shared_bytes(shared_bytes)
        self.kernel = kernel
        self._args = {name: _stored(name, kind, arguments[name]) for name, kind in kernel.parameters.items()}
        self._keep = (ctypes.c_void_p * len(self._args))(*(ctypes.addressof(a) for a in self._args.values()))
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            grid=(grid[0], grid[1], 1),
            block=(block, 1, 1),
            shared_bytes=shared_bytes,
            attributes=ctypes.pointer(self._attribute),
        )
        self._config_ref = ctypes.byref(self._config)
        self._function = ctypes.c_void_p(kernel.handle)
        self._launch = library().cuLaunchKernelEx

    def overlapping(self) -> Launch:
        """Let this launch start while the kernel in front still runs, where the device can; returns itself.

        Only for a launch whose kernel in front is known: what it reads before it waits is not the caller's newest.
        """
        self._config.attribute_count = int(self.kernel.can_overlap)
        return self

    def argument(self, name: str) -> Any:
        """The stored argument called ``name``: setting its ``value`` changes the calls that follow."""
        return self._args[name]

    def node_parameters(self) -> tuple[Any, ...]:
        """Function, grid, block, shared bytes and arguments, as a kernel node of a CUDA graph takes them."""
        config = self._config
        return self._function, config.grid, config.block, config.shared_bytes, ctypes.addressof(self._keep)

    def __call__(self, stream: int) -> None:
        """Enqueue on ``stream`` (a ``cudaStream_t`` as an integer) of the current device."""
        self._config.stream = stream
        result = self._launch(self._config_ref, self._function, self._keep, None)
        if result:
            check(result, f"launch of {self.kernel.name}")


def _stored(name: str, kind: Any, value: Any) -> Any:
    """An argument as the kernel takes it. ctypes would cut off what does not fit."""
    if issubclass(kind, ctypes.Structure):
        return kind(**{field: _stored(field, of, value[field]) for field, of in kind._fields_})
    stored = kind(*value) if issubclass(kind, ctypes.Array) else kind(value)
    if issubclass(kind, ctypes.c_int32) and stored.value != value:
        raise ValueError(f"{name}: expected a number of 32 bits; got {value}")
    return stored


def tensor_map(
    pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[int, ...]:
    """A ``CUtensorMap`` of bytes as 16 words: boxes of an array, in shared memory in the 128-byte swizzle.

    ``sizes`` and ``box`` count elements, innermost dimension first; ``strides`` are the bytes from one to the next in
    each other dimension. The address and the strides are multiples of 16. What lies outside reads as zero.
    """
    rank = len(sizes)
    words = (ctypes.c_uint64 * 24)()  # room to start at a multiple of 64 bytes
    start = ctypes.addressof(words) + -ctypes.addressof(words) % 64
    result = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), _TENSOR_MAP_UINT8, ctypes.c_uint(rank), ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint * rank)(*box),
        (ctypes.c_uint * rank)(*[1] * rank), 0, _TENSOR_MAP_SWIZZLE_128B, _TENSOR_MAP_L2_PROMOTION_128B, 0,
    )
    check(result, f"tensor map of {sizes} at {pointer:#x}")
    return tuple((ctypes.c_int64 * 16).from_address(start))


def stream_identity(stream: int) -> tuple[int, int]:
    """What tells a stream from others: one handle stands for another stream in each thread."""
    return stream, threading.get_ident() if stream == _PER_THREAD_STREAM else 0


def is_capturing(stream: int) -> bool:
    """Whether ``stream`` is being captured into a CUDA graph."""
    status = ctypes.c_int()
    check(library().cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status)), "cuStreamIsCapturing")
    return status.value != 0


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread allocate device memory and load modules while a stream is being captured."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    exchange = library().cuThreadExchangeStreamCaptureMode
    check(exchange(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        check(exchange(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
