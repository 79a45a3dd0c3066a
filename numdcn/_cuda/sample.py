"""Samples under the border rule `zeros` on the GPU: where they are, what they read, what they add. Formulas:
`bilinear`."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._cuda.jit import cuda, device, scalar_type
from numdcn._cuda.memory import add_vector, load_pair, load_vector, load_words, put
from numdcn._cuda.scatter import SKIPPED
from numdcn._formulas import bilinear

I32 = np.int32


@device
def cell_of(y, x, height, width, S):
    """The pixel of a zero-padded image at which a sample's cell starts, and its two fractions (NaN for a NaN position);
    outside the image, `outside(height, width)`."""
    row, column, fraction_y, fraction_x = bilinear.cell(S(y), S(x), S(height), S(width))
    return I32(row) * I32(width + 1) + I32(column), S(fraction_y), S(fraction_x)


@device
def outside(height, width):
    """The pixel where the cell of zeros starts, used by all samples outside the image."""
    return I32(height + 1) * I32(width + 1)


@device
def gather(images, start, pitch, row_step, corners, U, V):
    """Read U channels, in vectors of V, of the four corners of a cell: corners[0 : U] for the first, and so on. `pitch`
    and `row_step` are the distances to the next pixel and row."""
    for i in range(0, U, V):
        load_vector(images, start + i, corners, i)
        load_vector(images, start + pitch + i, corners, U + i)
        load_vector(images, start + row_step + i, corners, 2 * U + i)
        load_vector(images, start + row_step + pitch + i, corners, 3 * U + i)


@device
def gather_words(images, start, pitch, row_step, words, first):
    """Read 16 bytes of channels of the four corners of a cell, unconverted: words[first : first + 4] for the first,
    and so on."""
    load_words(images, start, words, first)
    load_words(images, start + pitch, words, first + 4)
    load_words(images, start + row_step, words, first + 8)
    load_words(images, start + row_step + pitch, words, first + 12)


@device
def gather_pairs(images, start, pitch, row_step, words, first):
    """Read 8 bytes of channels of the four corners of a cell: words[first : first + 2] for the first, then
    words[first + 4 : first + 6], and so on."""
    load_pair(images, start, words, first)
    load_pair(images, start + pitch, words, first + 4)
    load_pair(images, start + row_step, words, first + 8)
    load_pair(images, start + row_step + pitch, words, first + 12)


def corner_adder(T: Any, U: int, VECTORS: bool, SAMPLED: bool) -> Any:
    """Make `add_corners(images, start, pitch, row_step, y, x, values, products)`; U: channels, VECTORS: add 16 bytes
    at once."""
    S = scalar_type(T)

    @device
    def add_corner(images, start, weight, values, products):
        for i in range(U):
            products[i] = weight * values[i]
        if VECTORS:
            for i in range(0, U, 4):
                add_vector(images, start + i, products, i)
        else:
            for i in range(U):
                cuda.atomic.add(images, start + i, products[i])

    @device
    def add_corners(images, start, pitch, row_step, y, x, values, products):
        """Add the gradients of the samples of U channels to the corners they were read from, atomically. `products` has
        room for U numbers."""
        if SAMPLED:
            w00, w01, w10, w11 = bilinear.corner_weights(y, x)
            add_corner(images, start, S(w00), values, products)
            add_corner(images, start + pitch, S(w01), values, products)
            add_corner(images, start + row_step, S(w10), values, products)
            add_corner(images, start + row_step + pitch, S(w11), values, products)
        else:
            add_corner(images, start, S(1), values, products)

    return add_corners


@device
def write_plan(places, weights, task, spot, count, place, nowhere, y, x, S):
    """Write, for `scatter`, where a sample's cell starts, and the weights of its corners, `count` numbers apart starting at
    `spot`."""
    put(places, task, place if place < nowhere else I32(SKIPPED))
    w00, w01, w10, w11 = bilinear.corner_weights(y, x)
    put(weights, spot, S(w00))
    put(weights, spot + count, S(w01))
    put(weights, spot + 2 * count, S(w10))
    put(weights, spot + 3 * count, S(w11))
