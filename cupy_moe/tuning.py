# SPDX-License-Identifier: Apache-2.0
"""Choices found by timing: the records, their file, and the timing itself.

A record says which variant of a computation is the fastest on a device for a range of rows. What is in it is up to the
backend that made it; here it is only found by its key, written and read.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cupy_moe import checks
from cupy_moe.driver import Step
from cupy_moe.replay import Replay

Record = dict[str, int | float | str]

ENVIRONMENT = "CUPY_MOE_CACHE_DIR"
FORMAT = 1
"""Part of the file's name: another version of the package leaves the file alone if it means something else by it."""
TOKENS = tuple(1 << i for i in range(13))
"""Numbers of tokens to tune for where none are given."""
ERROR_LIMIT = 3e-3
"""Relative difference between two right products in float16."""

_SAMPLE = 1 << 18  # elements of a product that are compared
_ROUNDS, _ROUND_US, _HOPELESS = 7, 1000.0, 1.5
_WORTHWHILE = 0.98  # of the default's time; what a single product gains beyond need not be a gain of calls


# ---- records ------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file: in the folder that the environment names, or else in the user's folder of caches."""
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        caches = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is to be ignored, says the XDG specification.
        caches = caches if os.path.isabs(caches) else os.path.expanduser("~/.cache")
        # "~" stays where a user has no home.
        folder = os.path.join(caches, "cupy_moe")
        if not os.path.isabs(folder):
            folder = os.path.join(tempfile.gettempdir(), f"cupy_moe-{os.getuid()}")
    return Path(folder) / f"tuning-{FORMAT}.json"


def key(*parts: object, rows: int) -> str:
    """The key of a computation, described by ``parts``, on ``rows`` rows: one for all up to a power of two."""
    return " | ".join([*map(str, parts), f"{1 << max(rows - 1, 0).bit_length()} rows"])


@cache
def device_name(device: int) -> str:
    """What a CUDA device is called: part of each key."""
    import cupy

    name: str = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    return name


class Cache:
    """The records that this process knows: those of the file when it was loaded, and those stored since.

    Attributes
    ----------
    generation : int
        Goes up each time records are stored: choices made before may be others now.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()
        self._loaded = False

    def load(self) -> None:
        """Read the file; once."""
        with self._lock:
            if not self._loaded:
                self._loaded = True
                self._records = _read(path()) | self._records

    def find(self, key: str) -> Record | None:
        """The record of a key, if there is one; from memory."""
        return self._records.get(key)

    def store(self, records: Mapping[str, Record]) -> None:
        """Remember records here and in the file, beside what other processes have written meanwhile."""
        with self._lock:
            self._records = {**self._records, **records}
            self.generation += 1
            try:
                where = path()
                where.parent.mkdir(parents=True, exist_ok=True)
                with _alone(where):
                    _write(where, {**_read(where), **records})
            except OSError as error:
                warnings.warn(
                    f"{where}: cannot be written ({error}); what tuning found serves this process only",
                    RuntimeWarning, stacklevel=3,
                )


CACHE = Cache()


def _read(where: Path) -> dict[str, Record]:
    """The records in a file; none, with a warning, if it is there but not as it should be."""
    try:
        content = json.loads(where.read_bytes())
        records: dict[str, Record] = content["records"]
        if content["format"] != FORMAT or not all(isinstance(record, dict) for record in records.values()):
            raise ValueError("it holds something else")
        return records
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"{where}: cannot be read and is ignored ({error})", RuntimeWarning, stacklevel=3)
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"{where}: is no tuning cache and is ignored ({problem})", RuntimeWarning, stacklevel=3)
        return {}


def _write(where: Path, records: Mapping[str, Record]) -> None:
    """Replace the file in one step: whoever reads it meanwhile finds the old one or the new one."""
    # Not one of `tempfile`, which nobody else could read: a folder may serve several users.
    temporary = where.with_name(f"{where.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x") as file:
            json.dump({"format": FORMAT, "records": dict(sorted(records.items()))}, file, indent=1)
        os.replace(temporary, where)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _alone(where: Path) -> Iterator[None]:
    """Keep other processes from writing between reading and replacing, where platform and file system have locks."""
    with open(where.with_suffix(".lock"), "a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- what is timed ------------------------------------------------------------------------------------------------


def tokens_of(name: str, value: Any) -> list[int]:
    """The numbers of tokens that the argument ``name`` asks for, the largest first."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if value is None:
        value = TOKENS
    many = isinstance(value, Sequence) and not isinstance(value, str)
    if many and not len(value):
        raise ValueError(f"{name}: expected None, or at least one number of tokens; got {value!r}")
    return sorted({checks.count(name, one, 1) for one in (value if many else [value])}, reverse=True)


def uniform_counts(tokens: int, topk: int, experts: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Rows of each expert where every token goes to ``topk`` different ones, all equally likely."""
    chosen = np.random.default_rng(0).random((tokens, experts)).argsort(axis=1)[:, :topk]
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)


def fill_with_codes(codes: Any) -> None:
    """Fill a CuPy array with random e4m3 codes, all finite: a stretch of them, repeated."""
    import cupy

    random, codes = np.random.default_rng(0), codes.reshape(-1)
    size = min(codes.size, 1 << 22)
    stretch = cupy.asarray(random.integers(0, 127, size, np.uint8) | random.integers(0, 2, size, np.uint8) << 7)
    for i in range(0, codes.size, size):
        codes[i : i + size] = stretch[: codes.size - i]


def fastest(candidates: Sequence[tuple[Record, Step]], result: Any) -> Record:
    """The record of the candidate that takes the least time, with its time and the first one's.

    It is the first one's unless another takes at least 2 % less.

    Parameters
    ----------
    candidates
        A record and a launch, which takes the stream, of each; the default first. One that fails, or whose result is
        not that of the first, is left out.
    result
        The contiguous CuPy array that all of them fill, on the current device.
    """
    import cupy

    stream = cupy.cuda.get_current_stream()
    records, graphs, wanted = [], [], None
    for record, call in candidates:
        result.data.memset_async(0xFF, result.nbytes, stream)  # NaN, so that what is not written shows
        try:
            call(stream.ptr)
            graph = Replay([call], ())
        except RuntimeError:
            if wanted is None:
                raise
            continue
        # An odd step goes through all rows and columns.
        got = result.reshape(-1)[:: result.size // _SAMPLE | 1].get().astype(np.float64)
        wanted = got if wanted is None else wanted
        if _same(got, wanted):
            records.append(record)
            graphs.append(graph)
    times = _times(graphs)
    best = times.index(min(times)) if min(times) <= _WORTHWHILE * times[0] else 0
    return {**records[best], "us": round(times[best], 3), "default_us": round(times[0], 3)}


def _same(got: Any, wanted: Any) -> bool:
    """Whether two products are the same but for rounding, NaN and infinities included: weights may hold any codes."""
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(got)):
        return False
    got, wanted = got[finite], wanted[finite]
    return bool(np.linalg.norm(got - wanted) <= ERROR_LIMIT * np.linalg.norm(wanted))


def _times(calls: Sequence[Step]) -> list[float]:
    """Microseconds of each call: the best round, in turns, so that a change of clocks meets all of them."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def time(call: Step, count: int) -> float:
        start.record(stream)
        for _ in range(count):
            call(stream.ptr)
        stop.record(stream)
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e3 / count

    for call in calls:
        time(call, 1)
    rough = [time(call, 3) for call in calls]
    best = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for i, call in enumerate(calls):
            if i == 0 or rough[i] <= _HOPELESS * min(rough):
                best[i] = min(best[i], time(call, max(1, min(50, int(_ROUND_US / rough[i])))))
    return best
