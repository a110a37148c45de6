# SPDX-License-Identifier: Apache-2.0
"""The three kinds of array: NumPy, CuPy and torch, behind one small interface.

Nothing here imports CuPy or torch: an array of theirs can only arrive after its library has been imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from cupy_moe import driver

CPU = -1
"""The device number of arrays in host memory."""

NUMBERS = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
    "float64", "float8_e4m3fn",
)
"""Names of the dtypes of torch that NumPy has too, but complex ones, whose conjugates may look like themselves."""
_ML_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


class Array(NamedTuple):
    """What the host needs to know of an array: nothing in it is copied or synchronised."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # "float16", "bfloat16", "float8_e4m3fn", ...
    device: int  # CUDA device, or CPU

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


class Library(Protocol):
    """What each kind of array can do."""

    name: str

    def describe(self, x: Any) -> Array: ...
    def pointer(self, x: Any) -> int: ...
    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any: ...
    def zeros(self, shape: tuple[int, ...], dtype: str, device: int) -> Any: ...
    def stream(self, device: int) -> int:
        """The caller's current stream, a ``cudaStream_t``."""

    def to_numeric(self, x: Any) -> Any:
        """The same memory as a NumPy array (CPU) or a CuPy array (GPU); fp8 becomes uint8 in CuPy."""

    def from_numeric(self, x: Any) -> Any:
        """The way back; codes (uint8) become the library's fp8 dtype only through `as_fp8`."""

    def as_fp8(self, codes: Any) -> Any:
        """uint8 codes as the library's own e4m3 dtype where it has one, the same memory."""


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called ``name``, bfloat16 and float8_e4m3fn included."""
    dtype: np.dtype[Any] = np.dtype(_ML_DTYPES.get(name, name))
    return dtype


@cache
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy builds it anew, in Python, each time it is asked


class _NumpyLibrary:
    name = "numpy"

    def describe(self, x: Any) -> Array:
        strides = tuple(s // x.itemsize for s in x.strides)
        return Array(x.ctypes.data, x.shape, strides, _name_of(x.dtype), CPU)

    def pointer(self, x: Any) -> int:
        return int(x.ctypes.data)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return np.zeros(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        raise TypeError("NumPy arrays have no stream")

    def to_numeric(self, x: Any) -> Any:
        return x

    def from_numeric(self, x: Any) -> Any:
        return x

    def as_fp8(self, codes: Any) -> Any:
        return codes.view(ml_dtypes.float8_e4m3fn)


class _CupyLibrary:
    name = "cupy"

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]

    def describe(self, x: Any) -> Array:
        itemsize = x.itemsize
        strides = tuple(s // itemsize for s in x.strides)
        return Array(x.data.ptr, x.shape, strides, _name_of(x.dtype), x.data.device_id)

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        with on_device(device):
            return self._cupy.empty(shape, numpy_dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        with on_device(device):
            return self._cupy.zeros(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        return int(self._cupy.cuda.get_current_stream(device).ptr)

    def to_numeric(self, x: Any) -> Any:
        return x

    def from_numeric(self, x: Any) -> Any:
        return x

    def as_fp8(self, codes: Any) -> Any:
        return codes


class _TorchLibrary:
    name = "torch"

    def __init__(self) -> None:
        self._torch = torch = sys.modules["torch"]
        self._dtypes = {name: getattr(torch, name) for name in NUMBERS if hasattr(torch, name)}
        self._names = {dtype: name for name, dtype in self._dtypes.items()}
        # The same handle without the Stream object around it, which costs more than a kernel launch.
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def describe(self, x: Any) -> Array:
        device = x.device
        dtype = self._names.get(x.dtype) or str(x.dtype).removeprefix("torch.")
        if device.type not in ("cpu", "cuda"):
            raise TypeError(f"torch tensors on 'cpu' or 'cuda' are allowed; got one on {str(device)!r}")
        pointer = x.data_ptr()
        if not pointer and x.numel():  # for the kernels, address 0 is an argument that was not given
            kind = type(x).__name__
            raise TypeError(
                f"a {kind} without memory of its own (.to_local() of a DTensor, .wait() of an AsyncCollectiveTensor; "
                "inside torch.compile, a custom operator as in examples/torch_layer.py)"
            )
        return Array(pointer, tuple(x.shape), x.stride(), dtype, device.index if x.is_cuda else CPU)

    def pointer(self, x: Any) -> int:
        return int(x.data_ptr())

    def _device(self, device: int) -> Any:
        return "cpu" if device == CPU else self._torch.device("cuda", device)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._torch.empty(shape, dtype=self._dtypes[dtype], device=self._device(device))

    def zeros(self, shape: tuple[int, ...], dtype: str, device: int) -> Any:
        return self._torch.zeros(shape, dtype=self._dtypes[dtype], device=self._device(device))

    def stream(self, device: int) -> int:
        if self._raw_stream is not None:
            return int(self._raw_stream(device))
        return int(self._torch.cuda.current_stream(device).cuda_stream)

    def to_numeric(self, x: Any) -> Any:
        x = x.detach()
        if x.is_cuda:
            import cupy

            codes = x.dtype == self._dtypes["float8_e4m3fn"]
            return cupy.from_dlpack(x.view(self._torch.uint8) if codes else x)
        name = self._names.get(x.dtype)
        if name in _ML_DTYPES:  # NumPy's own dtypes end at float64: take the bits across
            bits = self._torch.uint8 if name == "float8_e4m3fn" else self._torch.int16
            return x.view(bits).numpy().view(_ML_DTYPES[name])
        return x.numpy()

    def from_numeric(self, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return self._torch.from_dlpack(x)
        if x.dtype.name in _ML_DTYPES:
            bits = np.uint8 if x.itemsize == 1 else np.int16
            return self._torch.from_numpy(x.view(bits)).view(self._dtypes[x.dtype.name])
        return self._torch.from_numpy(x)

    def as_fp8(self, codes: Any) -> Any:
        return codes.view(self._torch.float8_e4m3fn)


@cache
def _library(name: str) -> Library:
    makers: dict[str, type[Library]] = {"numpy": _NumpyLibrary, "cupy": _CupyLibrary, "torch": _TorchLibrary}
    return makers[name]()


_library_by_type: dict[type, Library | None] = {}
_finding = threading.Lock()  # one `Library` of a kind, however many threads ask for it


def library_of(x: Any) -> Library | None:
    """The library that ``x`` is an array of, or None if it is no array of NumPy, CuPy or torch."""
    kind = type(x)
    if kind not in _library_by_type:
        with _finding:
            _library_by_type[kind] = _find_library(kind)
    return _library_by_type[kind]


def _find_library(kind: type) -> Library | None:
    for name, array in (("numpy", "ndarray"), ("cupy", "ndarray"), ("torch", "Tensor")):
        module = sys.modules.get(name)
        if module is not None and issubclass(kind, getattr(module, array, ())):
            return _library(name)
    return None


def dtype_name(dtype: Any) -> str:
    """The name of a dtype given as a string, a NumPy dtype or scalar type, or a torch dtype.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    return numpy_dtype(dtype).name if isinstance(dtype, str) else np.dtype(dtype).name


_thread = threading.local()


def on_device(device: int) -> Any:
    """A context in which ``device`` is the current CUDA device; next to free of cost where it is already."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"arrays on a GPU need CuPy, which cannot be imported ({error}): see the README") from error

    runtime = cupy.cuda.runtime
    if not hasattr(_thread, "has_context"):  # a new thread has a current device, but no context of it yet
        runtime.setDevice(runtime.getDevice())
        _thread.has_context = True
    return nullcontext() if runtime.getDevice() == device else cupy.cuda.Device(device)


def is_capturing(library: Library, device: int) -> bool:
    """Whether the caller's current stream is being captured into a CUDA graph."""
    with on_device(device):
        return driver.is_capturing(library.stream(device))


@contextmanager
def numeric_scope(library: Library, device: int) -> Iterator[None]:
    """A context in which CuPy works on ``device`` and on the current stream of ``library``; nothing for the CPU."""
    if device == CPU:
        yield
        return
    with on_device(device), nullcontext() if library.name == "cupy" else cupy_stream(library.stream(device)):
        yield


class _ForeignStream(NamedTuple):
    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle  # version of the protocol, stream


def cupy_stream(handle: int) -> Any:
    """A ``cudaStream_t`` as a CuPy stream, which can be entered."""
    import cupy

    stream = cupy.cuda.Stream
    return stream.from_external(_ForeignStream(handle)) if handle else stream.null
