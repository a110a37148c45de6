# SPDX-License-Identifier: Apache-2.0
"""What the tests of tuning know of each backend: what it chooses for a layer, under which keys, and what else it could.

A choice is one GEMM's; each list has that of GEMM 1, then that of GEMM 2.
"""

import cupy_moe
from cupy_moe import mma, sm90, tuning
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
                for gemm, result in self.gemms]

    def others(self):
        """Records of other choices than those of now, one for each GEMM."""
        proposed = [[gemm._matmuls[result].configuration(one) for one in gemm._matmuls[result].algorithms(64)]
                    for gemm, result in self.gemms]
        wanted = [[one for one in of if one != now][-1] for of, now in zip(proposed, self.chosen(), strict=True)]
        return [{"average": 64, "tile": tile, "option": option} for tile, option in wanted]

    @staticmethod
    def choice(record):
        return record["tile"], record["option"]


class Own:
    """A choice is a tile of a kernel of our own."""

    def __init__(self, layer, rows, kernel, name):
        self.rows, self.weights, self.kernel = rows, (layer.gemms._w1, layer.gemms._w2), kernel
        self.fields, self.library = kernel.Tile._fields, f"{name} {cupy_moe.__version__}"

    def tuning_keys(self):
        return [self.kernel.key(0, weights, self.rows) for weights in self.weights]

    def chosen(self):
        return [tuple(self.kernel.tile_for(0, weights, self.rows)) for weights in self.weights]

    def others(self):
        return [next(tile for tile in self.kernel.TILES if tile != now)._asdict() for now in self.chosen()]

    def choice(self, record):
        return tuple(record[name] for name in self.fields)


def choices(experts, rows):
    """What the backend of a layer chooses for ``rows`` rows, and under which keys."""
    if experts.backend == "cublaslt":
        return Cublaslt(experts._layer, rows)
    return Own(experts._layer, rows, {"sm90": sm90, "mma": mma}[experts.backend], experts.backend)


def chosen(experts, rows):
    """What a plan for ``rows`` rows takes, of both GEMMs."""
    return choices(experts, rows).chosen()


def store_other_choices(experts, rows):
    """Records that name others than are chosen now; returns what they choose."""
    of = choices(experts, rows)
    records = of.others()
    tuning.CACHE.store(dict(zip(of.tuning_keys(), records, strict=True)))
    return [of.choice(record) for record in records]
