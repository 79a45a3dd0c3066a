"""Tile products on the GPU without tensor cores, and writing a product that is y.

Both operands are in a block's shared memory, CHUNK rows of each at a time, in two halves: while slower threads are
still multiplying one half, the others fill the other. First come both halves of the left operand, with rows `pitch`
numbers apart, then, from `right` on, both of the right one, with rows of `columns` numbers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.jit import F64, SIMULATED, THREADS, cuda, device, scalar_type
from numdcn._cuda.memory import at, load_four, narrow, put, vector_length, widen

I32 = np.int32
CHUNK = 8 if SIMULATED else 16  # columns or pixels multiplied at a time


class Tile(NamedTuple):
    """A block's part of a product: rows x columns, by `down` x `across` threads, each with some groups of four of both,
    so rows and columns are multiples of 4*down and 4*across. The forward has further requirements, see `_checked`."""

    rows: int
    columns: int
    down: int
    across: int

    @property
    def pitch(self) -> int:
        """Numbers from row to row of the left operand in shared memory."""
        return self.rows + 4

    @property
    def right(self) -> int:
        """Where the right operand starts in shared memory."""
        return 2 * CHUNK * self.pitch

    @property
    def room(self) -> int:
        """Numbers of shared memory for both operands."""
        return self.right + 2 * CHUNK * self.columns


@functools.cache
def tiles(dtype: object) -> tuple[Tile, ...]:
    """The tiles of pixels and outputs, fewest outputs first."""
    if SIMULATED:
        return _checked(dtype, Tile(8, 8, 2, 2))
    if dtype == F64:
        return _checked(dtype, Tile(64, 64, 16, 16))
    return _checked(dtype, Tile(128, 64, 16, 16), Tile(128, 128, 16, 16), Tile(64, 256, 8, 32))


def _checked(dtype: Any, *choices: Tile) -> tuple[Tile, ...]:
    """The tiles, after asserting what the forward assumes of them."""
    itemsize = np.dtype(scalar_type(dtype)).itemsize
    for tile in choices:
        assert tile.down * tile.across == THREADS, "all threads of a block multiply"
        assert tile.rows in (4 * tile.down, 8 * tile.down), (
            "`write_rows` writes four rows of each thread, once or twice"
        )
        assert tile.columns % (4 * tile.across) == 0, "a thread reads its columns by fours"
        assert 4 * tile.down * tile.columns <= tile.room, "`write_rows` uses the memory of the operands"
        assert itemsize * tile.room < 48 * 1024, (
            "what a block may have of shared memory; the plans of the pixels lie there too"
        )
    assert list(choices) == sorted(choices, key=lambda tile: tile.columns), "the first that holds all outputs is taken"
    assert CHUNK % vector_length(dtype) == 0, "channels are read in whole vectors"
    return choices


class Thread(NamedTuple):
    """A thread of a block. Its rows of the product are the groups of four at 4*row, 4*row + 4*down, ...; likewise
    its columns."""

    rank: Any  # in the block
    row: Any
    column: Any


class Product(NamedTuple):
    """A thread's part of a product."""

    sums: Any  # (its rows, its columns)
    left: Any  # (its rows,), of one step
    right: Any  # (its columns,), of one step


class Task(NamedTuple):
    """A block's part of y: a tile, or a split of one."""

    split: Any  # of the depth of the product
    group: Any
    size: Any  # number of its pixels
    first_out: Any  # output within the group


def multiplier(T: Any, tile: Tile, step: int = 8) -> tuple[Any, ...]:
    """Make `thread_of()`, `new_product()`, `clear(sums)` and `multiply(buffer, half, thread, product)`. A thread has
    MINE_R rows and MINE_C columns of the tile. step: 8 or 4 rows of the operands to an iteration; 8 need more registers."""
    S, MINE_R, MINE_C = scalar_type(T), tile.rows // tile.down, tile.columns // tile.across
    DOWN, ACROSS, PITCH, RIGHT, RIGHT_PITCH = tile.down, tile.across, tile.pitch, tile.right, tile.columns
    STEP = step

    @device
    def thread_of():
        thread = I32(cuda.threadIdx.x)
        return Thread(thread, thread // I32(ACROSS), thread % I32(ACROSS))

    @device
    def new_product():
        return Product(cuda.local.array((MINE_R, MINE_C), S), cuda.local.array(MINE_R, S), cuda.local.array(MINE_C, S))

    @device
    def clear(sums):
        for i in range(MINE_R):
            for j in range(MINE_C):
                sums[i, j] = S(0)

    @device
    def multiply_row(buffer, upper, lower, product):
        """The same for one row of both operands; a thread's numbers start at `upper` and `lower`."""
        left, right, sums = product.left, product.right, product.sums
        for i in range(0, MINE_R, 4):
            load_four(buffer, upper + i * DOWN, left, i)
        for j in range(0, MINE_C, 4):
            load_four(buffer, lower + j * ACROSS, right, j)
        for i in range(MINE_R):
            for j in range(MINE_C):
                sums[i, j] += left[i] * right[j]

    @device
    def multiply_rows(buffer, upper, lower, product):
        """The same for four rows, at constant distances."""
        multiply_row(buffer, upper, lower, product)
        multiply_row(buffer, upper + PITCH, lower + RIGHT_PITCH, product)
        multiply_row(buffer, upper + 2 * PITCH, lower + 2 * RIGHT_PITCH, product)
        multiply_row(buffer, upper + 3 * PITCH, lower + 3 * RIGHT_PITCH, product)

    @device
    def multiply(buffer, half, thread, product):
        """product.sums += left^T right, for a thread's rows and columns, over the CHUNK rows of a half."""
        upper = half * CHUNK * PITCH + 4 * thread.row
        lower = RIGHT + half * CHUNK * RIGHT_PITCH + 4 * thread.column
        for k in range(0, CHUNK, STEP):
            multiply_rows(buffer, upper + k * PITCH, lower + k * RIGHT_PITCH, product)
            if STEP == 8:
                multiply_rows(buffer, upper + (k + 4) * PITCH, lower + (k + 4) * RIGHT_PITCH, product)

    return thread_of, new_product, clear, multiply


@device
def unit_of(rank, turn, WIDTH, THREADS):
    """Row and column, WIDTH to a row, of the place that a thread takes in a turn, when all take one after another. WIDTH
    divides THREADS, or is a multiple. (So each turn adds constants.)"""
    row, column = I32(rank // I32(WIDTH)), I32(rank % I32(WIDTH))
    return I32(row + turn * THREADS // WIDTH), I32(column + turn * THREADS % WIDTH)


@device
def put_result(c, a, split, n, pixel, out, result, T):
    """Write the result of output channel `out` at a pixel of image n, or a split of it; the bias is added to the first
    split."""
    p = c.p
    count = p.out_size[0] * p.out_size[1]
    spot = (n * p.out_channels + out) * count + pixel
    if c.bias and split == 0:
        result += widen(at(a.bias, out))
    if c.split_k > 1:
        put(a.partials, split * p.batch * p.out_channels * count + spot, result)
    else:
        put(a.y, spot, narrow(result, T))
