# SPDX-License-Identifier: Apache-2.0
"""How the steps divide rows among blocks and threads."""

from __future__ import annotations

from typing import NamedTuple

VECTOR = 8
"""Columns that one thread handles at a time, ``VECTOR`` of ``common.cuh``."""
MAX_ROW_THREADS, MORE_ROW_THREADS = 512, 896
"""Threads of a block that holds a row, as in ``common.cuh``; and of one that has a multiprocessor for itself and at
most `FEW_VECTORS` to a thread, so that a row is not the work of a few warps."""
FEW_VECTORS = 4
MOST_COLUMNS_HELD = 1 << 17
"""Columns of a row that a block holds; from half of them on, not all in registers."""
FEWEST_IN_REGISTERS, MOST_IN_SHARED = 2, 6
"""Of the vectors of a thread of `activation_quantize` that wait for the scale of their row: with two in registers, two
blocks share a multiprocessor, and six in shared memory are what every device has room for."""
STRETCH_THREADS, NARROW_THREADS = 256, 64
"""Threads per block where a row may be cut into stretches, and where the L1 cache is to hold what its columns have."""
WORDS_IN_FLIGHT, MOST_STRIPES = 4, 64
"""Words that a thread of `shuffle_rows` loads before it stores one, ``IN_FLIGHT`` of ``shuffle.cu``; and parts of the
rows that its blocks go through side by side, at most."""
MANY_ROWS = 1024
"""Rows from which on every multiprocessor has several blocks."""
WORTHWHILE_THREADS = 128
"""A block that holds a row in registers is not made smaller for the sake of more vectors to a thread."""
MAX_GRID_X, MAX_GRID_Y = 2**31 - 1, 65535


class Grid(NamedTuple):
    """Blocks that a row is cut into, threads of each, and vectors of a thread."""

    stretches: int
    threads: int
    per_thread: int


def stretches(cols: int, most_threads: int = STRETCH_THREADS, per_thread: int = 1) -> Grid:
    """Rows of ``cols`` columns, cut where it suits, with ``per_thread`` vectors to a thread."""
    vectors = -(-cols // (VECTOR * per_thread))
    threads = min(most_threads, up(vectors, 32))
    if -(-vectors // threads) > MAX_GRID_Y:
        raise ValueError(f"rows of at most {MAX_GRID_Y * threads * VECTOR * per_thread} columns; got {cols}")
    return Grid(-(-vectors // threads), threads, per_thread)


def whole_rows(cols: int, most_threads: int = MAX_ROW_THREADS, *, several: bool) -> Grid:
    """A block holds a row. ``several``: few threads with several vectors in flight, and as little idle as may be."""
    if cols > MOST_COLUMNS_HELD:
        raise ValueError(f"rows of at most {MOST_COLUMNS_HELD} columns can have a scale each; got {cols}")
    vectors = -(-cols // VECTOR)
    if vectors > FEW_VECTORS * most_threads:
        most_threads = MAX_ROW_THREADS
    at_least = -(-vectors // most_threads)
    per_thread = at_least
    if several:
        first = max(at_least, 2)
        choices = [n for n in range(first, max(at_least, 4) + 1) if n == first or n * WORTHWHILE_THREADS <= vectors]
        per_thread = min(choices, key=lambda n: (up(vectors, 32 * n), -n))
    return Grid(1, up(-(-vectors // per_thread), 32), per_thread)


def bound(threads: int) -> int:
    """The least of the numbers of threads that a kernel is compiled for which is at least ``threads``."""
    return next(n for n in (STRETCH_THREADS, MAX_ROW_THREADS, MORE_ROW_THREADS) if threads <= n)


def in_shared(grid: Grid) -> int:
    """How many vectors of each thread of `activation_quantize` wait for the scale of their row in shared memory."""
    if grid.threads > MAX_ROW_THREADS:
        return 0  # one block to a multiprocessor, whose registers have room for all
    return min(max(grid.per_thread - FEWEST_IN_REGISTERS, 0), MOST_IN_SHARED)


def words(tokens: int, rows: int, words_of_row: int) -> tuple[tuple[int, int], int, int]:
    """Blocks, threads of a row and stripes of a `shuffle_rows` with ``STRETCH_THREADS`` threads per block."""
    needed = -(-words_of_row // WORDS_IN_FLIGHT)
    threads = min(1 << (needed - 1).bit_length(), STRETCH_THREADS)
    blocks = -(-rows // (STRETCH_THREADS // threads))
    stripes = 1
    if blocks >= MANY_ROWS:
        # About one for each expert, as shuffle.cu says. How many there are is a guess by the slots of a token.
        slots = -(-rows // max(tokens, 1))
        stripes = min(2 * slots * slots, MOST_STRIPES)
        blocks = up(blocks, stripes)
        if blocks > MAX_GRID_X:
            blocks, stripes = MAX_GRID_X, 1
    return (blocks, min(-(-needed // threads), MAX_GRID_Y)), threads, stripes


def up(x: int, multiple: int) -> int:
    """``x``, rounded up."""
    return -(-x // multiple) * multiple
