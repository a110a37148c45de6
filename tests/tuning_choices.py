# SPDX-License-Identifier: Apache-2.0
"""What the tests of tuning know of each backend: what it chooses for a layer, under which keys, and what else it could.

A choice is one GEMM's; each list has that of GEMM 1, then that of GEMM 2.
"""

import cupy_moe
from cupy_moe import sm90, tuning
from cupy_moe.buffers import Buffers
from cupy_moe.grouped_gemm import Choice


class Cublaslt:
    """A choice is an algorithm, as (tile, option)."""

    fields = Choice._fields

    def __init__(self, layer, rows):
        self.rows, buffers = rows, Buffers(layer, rows)
        self.gemms = (layer.gemms._gemm1, buffers.inner.dtype), (layer.gemms._gemm2, buffers.y.dtype)
        self.library = f"cublaslt {layer.gemms._gemm1._matmuls['float16'].context.version}"

    def tuning_keys(self):
        return [gemm.key(self.rows, result) for gemm, result in self.gemms]

    def chosen(self):
        return [gemm._matmuls[result].configuration(gemm.algorithms(self.rows, result)[0])
                for gemm, result in self.gemms]  # fmt: skip

    def others(self):
        """Records of other choices than those of now, one for each GEMM."""
        proposed = [[gemm._matmuls[result].configuration(one) for one in gemm._matmuls[result].algorithms(64)]
                    for gemm, result in self.gemms]  # fmt: skip
        wanted = [[one for one in of if one != now][-1] for of, now in zip(proposed, self.chosen(), strict=True)]
        return [{"average": 64, "tile": tile, "option": option} for tile, option in wanted]

    @staticmethod
    def choice(record):
        return record["tile"], record["option"]


class Sm90:
    """A choice is a tile."""

    fields = sm90.Tile._fields
    library = f"sm90 {cupy_moe.__version__}"

    def __init__(self, layer, rows):
        self.rows, self.weights = rows, (layer.gemms._w1, layer.gemms._w2)

    def tuning_keys(self):
        return [sm90.key(0, weights, self.rows) for weights in self.weights]

    def chosen(self):
        return [tuple(sm90.tile_for(0, weights, self.rows)) for weights in self.weights]

    def others(self):
        return [next(tile for tile in sm90.TILES if tile != now)._asdict() for now in self.chosen()]

    @staticmethod
    def choice(record):
        return tuple(record[name] for name in sm90.Tile._fields)


def choices(experts, rows):
    """What the backend of a layer chooses for ``rows`` rows, and under which keys."""
    return {"cublaslt": Cublaslt, "sm90": Sm90}[experts.backend](experts._layer, rows)


def chosen(experts, rows):
    """What a plan for ``rows`` rows takes, of both GEMMs."""
    return choices(experts, rows).chosen()


def store_other_choices(experts, rows):
    """Records that name others than are chosen now; returns what they choose."""
    of = choices(experts, rows)
    records = of.others()
    tuning.CACHE.store(dict(zip(of.tuning_keys(), records, strict=True)))
    return [of.choice(record) for record in records]
