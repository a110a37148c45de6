# SPDX-License-Identifier: Apache-2.0
"""What the step functions share: checking arguments of one kind, and running on the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cupy_moe import arrays, checks
from cupy_moe.arrays import Array
from cupy_moe.driver import Launch
from cupy_moe.launches import Matrix, RowScale, WeightScale

_ABSENT = Array(0, (), (), "None", arrays.CPU)


class Arguments:
    """The arguments of one step: the first array decides the kind and the device of all.

    Parameters
    ----------
    name, x
        The first array argument.
    """

    def __init__(self, name: str, x: Any) -> None:
        self.library = checks.library_of(name, x)
        self.first = checks.info(name, x, self.library)
        self.device = self.first.device
        self.on_cpu = self.device == arrays.CPU
        self._scratch: list[Any] = []

    @property
    def stream(self) -> int:
        """The caller's current stream."""
        return self.library.stream(self.device)

    def expect(self, name: str, x: Any, dtypes: Iterable[str], *shapes: checks.Shape, rows_only: bool = False) -> Array:
        """A required array, checked."""
        info = checks.describe(name, x, self.library, self.device)
        return checks.expect(name, info, dtypes, *shapes, rows_only=rows_only)

    def optional(self, name: str, x: Any, dtypes: Iterable[str], *shapes: checks.Shape) -> Array:
        """An optional array, checked; address 0 for None."""
        return _ABSENT if x is None else self.expect(name, x, dtypes, *shapes)

    def row_scale(self, name: str, scale: Any, shapes: Iterable[checks.Shape]) -> RowScale:
        """A scale of activations."""
        value = 1.0 if scale is None else checks.number(name, scale)
        if value is not None:
            return RowScale(value=value)
        return RowScale.of(self.expect(name, scale, ("float32",), *shapes))

    def weight_scale(self, name: str, scale: Any, experts: int, channels: int, up_channel: int) -> WeightScale:
        """A scale of weights with ``channels`` rows per expert, the ups from ``up_channel`` on (0: there are none)."""
        if scale is None:
            return WeightScale()
        info = self.expect(name, scale, ("float32",), *checks.weight_scale_shapes(experts, channels, bool(up_channel)))
        return WeightScale.of(info, channels, up_channel)

    def experts(self, row_experts: Any, rows: int, **per_expert: Any) -> tuple[int, int]:
        """How many experts the arguments with one entry per expert speak of, and the address of the rows' experts.

        The number is 1 if there are no such arguments; then ``row_experts`` may be None (address 0).
        """
        experts = 1
        for name, x in per_expert.items():
            if x is None or arrays.library_of(x) is None:
                continue
            shape = checks.describe(name, x, self.library, self.device).shape
            if not shape or (name not in ("w_scale", "bias") and (len(shape) > 1 or shape == (1,))):
                continue
            if name == "bias" and len(shape) != 2:
                continue  # refused with its shape, as soon as the experts are counted
            experts = shape[0]
            if not experts:
                raise ValueError(f"{name}: expected entries for at least one expert; got shape {shape}")
            if row_experts is None and experts > 1:
                raise ValueError(
                    f"row_experts: expected an int32 array of shape ({rows},), since {name} of shape {shape} has an "
                    "entry per expert" + (f" (per row: ({rows}, 1))" if name == "x_scale" else "") + "; got None"
                )
            break
        return experts, self.optional("row_experts", row_experts, ("int32",), (rows,)).pointer

    def result(self, name: str, out: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """``out`` checked, or a new array for None."""
        if out is None:
            return self.empty(shape, dtype)
        self.expect(name, out, (dtype,), shape)
        checks.writable(name, out)
        return out

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array of the caller's kind."""
        return self.library.empty(shape, dtype, self.device)

    def scratch(self, shape: tuple[int, ...], dtype: str) -> int:
        """Address of memory for the launches of the next `run`, which keeps it until then."""
        if self.library.name == "cupy":  # a torch capture has a memory pool of its own
            self.refuse_capture()
        self._scratch.append(self.empty(shape, dtype))
        return self.pointer(self._scratch[-1])

    def refuse_capture(self) -> None:
        """RuntimeError while a CUDA graph is being captured, which would use the step's own memory after its end."""
        if arrays.is_capturing(self.library, self.device):
            raise RuntimeError(
                "this step takes scratch memory of its own, which a CUDA graph cannot keep: capture a call of Experts"
            )

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """A new array of zeros of the caller's kind."""
        return self.library.zeros(shape, dtype, self.device)

    def filled(self, shape: tuple[int, ...], value: float) -> Any:
        """A new float32 array of the caller's kind, ``value`` everywhere."""
        made = self.empty(shape, "float32")
        with arrays.numeric_scope(self.library, self.device):
            self.numeric(made)[...] = value
        return made

    def as_scale(self, scale: Any) -> Any:
        """A scale argument as an array, to be returned: numbers become (1,)."""
        if checks.number("scale", scale) is None:
            return scale.reshape(1) if scale.ndim == 0 else scale
        return self.filled((1,), float(scale))

    def pointer(self, x: Any) -> int:
        """Address of an array."""
        return self.library.pointer(x)

    def matrix(self, info: Array) -> Matrix:
        """A checked matrix as the launches take it."""
        return Matrix.of(info)

    def numeric(self, x: Any) -> Any:
        """The array in CuPy's or NumPy's terms, the same memory."""
        return self.library.to_numeric(x)

    def run(self, *launches: Launch) -> None:
        """Enqueue launches on the caller's current stream."""
        stream = self.stream
        with arrays.on_device(self.device):
            for launch in launches:
                launch(stream)

    def reference(self, function: Callable[..., Any], *positional: Any, out: Any = None, **named: Any) -> Any:
        """Call a function of the reference; its arrays come back in the caller's kind, or go to ``out``."""

        def convert(x: Any) -> Any:
            return self.numeric(x) if arrays.library_of(x) is not None else x

        with arrays.numeric_scope(self.library, self.device):
            made = function(*map(convert, positional), **{name: convert(x) for name, x in named.items()})
            if out is not None:
                convert(out)[...] = made
                return out
            if isinstance(made, tuple):
                return tuple(self.library.from_numeric(x) for x in made)
            return self.library.from_numeric(made)

    def reference_pair(self, function: Callable[..., Any], *positional: Any, **named: Any) -> tuple[Any, Any]:
        """`reference` for a function that returns two arrays."""
        first, second = self.reference(function, *positional, **named)
        return first, second
