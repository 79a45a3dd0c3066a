"""Samples under rule Z on the GPU: where they are, what they read, what they add. The formulas are those of `bilinear`."""

from __future__ import annotations

import numpy as np

from numdcn._kernels import bilinear
from numdcn._kernels.jit_cuda import cuda, device
from numdcn._kernels.memory_cuda import add_vector, load_vector

I32 = np.int32


@device
def cell_of(y, x, height, width, S):  # type: ignore[no-untyped-def]
    """The pixel of a rimmed image at which the cell of a sample begins, and its two fractions (NaN for a NaN position). Outside
    the image it is `outside(height, width)`."""
    row, column, fraction_y, fraction_x = bilinear.cell(S(y), S(x), S(height), S(width))
    return I32(row) * I32(width + 1) + I32(column), S(fraction_y), S(fraction_x)


@device
def outside(height, width):  # type: ignore[no-untyped-def]
    """The pixel where the cell of zeros begins, to which all samples outside the image are sent."""
    return I32(height + 1) * I32(width + 1)


@device
def gather(images, start, pitch, below, corners, V):  # type: ignore[no-untyped-def]
    """Read V channels of the four corners of a cell: corners[0 : V] the first, and so on."""
    load_vector(images, start, corners, 0)
    load_vector(images, start + pitch, corners, V)
    load_vector(images, start + below, corners, 2 * V)
    load_vector(images, start + below + pitch, corners, 3 * V)


@device
def gather_wide(images, start, pitch, below, corners, U, V):  # type: ignore[no-untyped-def]
    """Read U channels, some vectors of V, of the four corners of a cell: corners[0 : U] the first, and so on."""
    for part in range(0, U, V):
        load_vector(images, start + part, corners, part)
        load_vector(images, start + pitch + part, corners, U + part)
        load_vector(images, start + below + part, corners, 2 * U + part)
        load_vector(images, start + below + pitch + part, corners, 3 * U + part)


@device
def add_corner(images, start, weight, values, products, V, VECTORS):  # type: ignore[no-untyped-def]
    """Add weight * values to V channels of a pixel, atomically. `products`: V numbers of room."""
    for i in range(V):
        products[i] = weight * values[i]
    if VECTORS:
        for i in range(0, V, 4):
            add_vector(images, start + i, products, i)
    else:
        for i in range(V):
            cuda.atomic.add(images, start + i, products[i])
