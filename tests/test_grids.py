# SPDX-License-Identifier: Apache-2.0
"""How rows are divided among blocks and threads."""

import pytest

from cupy_moe import grids


@pytest.mark.parametrize("most", [grids.MAX_ROW_THREADS, grids.MORE_ROW_THREADS])
@pytest.mark.parametrize("several", [False, True])
def test_blocks_of_whole_rows(several, most):
    """They have every column, in at most as many threads as a block can have."""
    for cols in (*range(1, grids.MOST_COLUMNS_HELD, 7), grids.MOST_COLUMNS_HELD):
        grid = grids.whole_rows(cols, most, several=several)
        assert grid.stretches == 1
        assert grid.threads % 32 == 0
        assert grid.stretches * grid.threads * grid.per_thread * grids.VECTOR >= cols
        few = grid.per_thread <= grids.FEW_VECTORS
        assert grid.threads <= (most if few else grids.MAX_ROW_THREADS), f"{cols} columns"
        shared = grids.in_shared(grid)
        assert 0 <= shared < grid.per_thread
        assert shared * grid.threads * grids.VECTOR * 4 <= 99 << 10, f"{cols} columns"  # what every device has


def test_rows_too_wide():
    with pytest.raises(ValueError, match=r"^rows of at most 131072 columns can have a scale each; got 131073$"):
        grids.whole_rows(131073, several=False)
    widest = grids.MAX_GRID_Y * grids.STRETCH_THREADS * grids.VECTOR
    assert grids.stretches(widest).stretches == grids.MAX_GRID_Y
    with pytest.raises(ValueError, match=rf"^rows of at most {widest} columns; got {widest + 1}$"):
        grids.stretches(widest + 1)


@pytest.mark.parametrize("rows", [1, 300, 2**31 - 1])
def test_blocks_of_words(rows):
    """They have every word of every row; rows of one word fill the blocks."""
    for words in (*range(1, 3000), 2**31 - 1):
        (x, y), threads, stripes = grids.words(rows, rows, words)
        assert x % stripes == 0
        of_block = grids.STRETCH_THREADS // threads
        assert threads * of_block == grids.STRETCH_THREADS
        assert x * of_block >= rows > (x - 1) * of_block
        assert y * threads * grids.WORDS_IN_FLIGHT >= words or y == grids.MAX_GRID_Y
        assert words > 4 or threads == y == 1


@pytest.mark.parametrize(("slots", "want"), [(1, 2), (2, 8), (4, 32), (6, 64), (8, 64)])
def test_stripes(slots, want):
    """About as many as models have experts, where blocks are many."""
    (blocks, _), _, stripes = grids.words(5003, 5003 * slots, 1024)
    assert stripes == want
    assert blocks % stripes == 0
    assert blocks - stripes < 5003 * slots <= blocks
    assert grids.words(500, 500, 1024)[2] == 1
    assert grids.words(0, 5003, 1024)[2] == 64
