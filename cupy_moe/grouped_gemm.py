# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM of a layer's weights through cuBLASLt: algorithm per number of rows, tables and workspace."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupy_moe import tuning
from cupy_moe.cublaslt import Algorithm, Context, CublasError, GroupedMatmul
from cupy_moe.driver import Step
from cupy_moe.tiles import expected_rows
from cupy_moe.tuning import Record
from cupy_moe.workspace import dedicated


class Choice(NamedTuple):
    """An algorithm: what to ask the heuristic, and which proposal to take."""

    average: int  # rows per expert that the heuristic is told
    tile: int  # cublasLtMatmulTile_t
    option: int  # custom option of the algorithm

    @property
    def configuration(self) -> tuple[int, int]:
        """What tells the algorithm from the others, as `GroupedMatmul.configuration` has it."""
        return self.tile, self.option

    @classmethod
    def of(cls, record: Record | None) -> Choice | None:
        """The choice that a record of `tuning` stands for; None for one that is not of this kind."""
        values = [record.get(name) for name in cls._fields] if record else [None]
        whole = [value for value in values if isinstance(value, int) and value >= 0]
        return cls(*whole) if len(whole) == len(values) else None


# For fewer rows per expert, on average over all experts, than the number in front. The heuristic's own first proposal
# is often not its fastest. These lost least over the layers of benchmarks/cases.py on an H100 with cuBLAS 13.10
# (benchmarks/algorithms.py, results/algorithms_h100.json). Where the heuristic does not propose them (another library
# or device), its first proposal runs. What tuning has found comes before all of them.
PREFERRED = (
    (12, Choice(8, 312, 1)),  # 64 x 16
    (24, Choice(32, 13, 1)),  # 64 x 32
    (46, Choice(64, 18, 1)),  # 128 x 64
    (182, Choice(128, 21, 6)),  # 256 x 64
    (float("inf"), Choice(128, 20, 5)),  # 128 x 128
)
TUNING_AVERAGES = (8, 16, 32, 64, 128, 256)
"""The heuristic proposes all of its algorithms when asked with each of these."""


class GroupedGemm:
    """``(counts[e], k) x (n, k).T -> (counts[e], n)`` for each expert: e4m3 to float16 or float32 in units of ``unit``.

    Parameters
    ----------
    context
        The cuBLASLt handle; its device has to be the current one.
    weights
        Address of the weights (experts, n, k), e4m3 codes, 16-byte aligned.
    experts, n, k
        Sizes, n and k multiples of 16.
    counts
        Address of the E row counts (int32), read when the matmul runs.
    routed_to
        How many experts the rows are spread over, if others are held elsewhere.
    """

    def __init__(
        self, context: Context, weights: int, experts: int, n: int, k: int, counts: int, routed_to: int = 0
    ) -> None:
        self._matmuls = {
            result: GroupedMatmul(context, experts, n, k, counts, result) for result in ("float16", "float32")
        }
        self.unit = self._matmuls["float16"].unit  # the same for both
        self.weight_pointers = dedicated((experts,), np.int64)
        self.weight_pointers.set(weights + np.arange(experts, dtype=np.int64) * (n * k))
        self._routed_to = routed_to or experts
        self._key = f"cublaslt {context.version}", tuning.device_name(context.device), f"{experts} x {n} x {k}"
        self._algorithms: dict[tuple[str, tuple[Choice, ...]], list[Algorithm]] = {}
        # One workspace per GEMM: two in one CUDA graph that share one have been seen to fault on replay (<= 13.7).
        self._workspaces: list[Any] = []

    def key(self, rows: int, result: str) -> str:
        """Under which tuning finds the choice for ``rows`` rows in all."""
        return tuning.key(*self._key, result, rows=self._expected(rows))

    def algorithms(self, rows: int, result: str = "float16") -> list[Algorithm]:
        """The heuristic's proposals for ``rows`` rows in all, the one that tuning or else `PREFERRED` wants first."""
        tuned = Choice.of(tuning.CACHE.find(self.key(rows, result)))
        default = self._default(rows)
        return self._proposals(result, *((tuned, default) if tuned else (default,)))

    def _expected(self, rows: int) -> int:
        return expected_rows(rows, len(self.weight_pointers), self._routed_to)

    def _default(self, rows: int) -> Choice:
        average = self._expected(rows) / len(self.weight_pointers)
        return next(choice for below, choice in PREFERRED if average < below)

    def _proposals(self, result: str, *wanted: Choice) -> list[Algorithm]:
        """The proposals among which one is wanted, the earlier the better, that one first."""
        if (result, wanted) not in self._algorithms:
            matmul = self._matmuls[result]
            found: list[Algorithm] = []
            for choice in wanted:
                proposed = matmul.algorithms(choice.average)
                found = sorted(proposed, key=lambda one: matmul.configuration(one) != choice.configuration) or found
                if proposed and matmul.configuration(found[0]) == choice.configuration:
                    break
            if not found:
                raise CublasError(f"cuBLASLt proposes no algorithm for a grouped product of {self._key[-1]} codes")
            self._algorithms[result, wanted] = found
        return self._algorithms[result, wanted]

    def tune(self, rows: int, row_pointers: int, result_pointers: int, result: Any) -> dict[str, Record]:
        """Time every algorithm on what the tables name now; the fastest one's record under its key.

        ``result`` is the CuPy array that ``result_pointers`` lead to; the rest as for `prepare`.
        """
        matmul, default = self._matmuls[result.dtype.name], self._default(rows)
        proposed = [(default.average, self._proposals(result.dtype.name, default)[0])]
        proposed += [(average, one) for average in TUNING_AVERAGES for one in matmul.algorithms(average)]
        found: dict[tuple[int, int], tuple[Choice, Algorithm]] = {}
        for average, one in proposed:
            configuration = matmul.configuration(one)
            found.setdefault(configuration, (Choice(average, *configuration), one))
        candidates: list[tuple[Record, Step]] = []
        scratch = []  # each its own, kept until all have been timed
        for choice, one in found.values():
            scratch.append(dedicated((one.workspace_bytes,), np.uint8))
            operands = self.weight_pointers.data.ptr, row_pointers, result_pointers, scratch[-1].data.ptr
            candidates.append((dict(choice._asdict()), matmul.launch(one, *operands)))
        return {self.key(rows, result.dtype.name): tuning.fastest(candidates, result)}

    def prepare(
        self, rows: int, row_pointers: int, result_pointers: int, result: str = "float16", choice: int = 0
    ) -> Step:
        """The launch for ``rows`` rows in all, with number ``choice`` of `algorithms`.

        ``row_pointers`` and ``result_pointers`` are addresses of tables with the address of each expert's rows.
        """
        algorithm = self.algorithms(rows, result)[choice]
        return self._matmuls[result].launch(
            algorithm, self.weight_pointers.data.ptr, row_pointers, result_pointers,
            self._workspace(algorithm.workspace_bytes),
        )

    def _workspace(self, nbytes: int) -> int:
        if nbytes and (not self._workspaces or self._workspaces[-1].nbytes < nbytes):
            # Outgrown ones stay: a CUDA graph may use them, and there are few sizes.
            self._workspaces.append(dedicated((nbytes,), np.uint8))
        return int(self._workspaces[-1].data.ptr) if nbytes else 0
