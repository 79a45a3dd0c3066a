"""Samples under the border rule `zeros` on the GPU: where they are, what they read, what they add. Formulas:
`bilinear`."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._call.numba_cuda import cgutils, intrinsic, types
from numdcn._call.simulator import CheckedArray
from numdcn._cuda.jit import cuda, device, scalar_type
from numdcn._cuda.memory import add_vector, compiled_as, load_half_vector, load_pair, load_vector, load_words, put
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


@intrinsic
def _moved(typingctx, array, index):
    def codegen(context, builder, sig, args):
        made = cgutils.create_struct_proxy(sig.args[0])(context, builder, value=args[0])
        made.data = builder.gep(made.data, [context.cast(builder, args[1], sig.args[1], types.int64)])
        return made._getvalue()

    return array(array, index), codegen


@compiled_as(_moved)
def moved(array, index):
    """An array of `view`, seen from an element. (Where several elements are read a fixed distance apart, their addresses are
    then sums; the compiler would multiply anew for each.)"""
    return CheckedArray(array.elements, array.origin + int(index))


@device
def gather(images, start, pitch, row_step, corners, U, V):
    """Read U channels, in vectors of V or one half of a vector, of the four corners of a cell: corners[0 : U] for the
    first, and so on. `pitch` and `row_step` are the distances to the next pixel and row."""
    upper = moved(images, start)
    lower = moved(upper, row_step)
    upper_right, lower_right = moved(upper, pitch), moved(lower, pitch)
    if 2 * U == V:
        load_half_vector(upper, 0, corners, 0)
        load_half_vector(upper_right, 0, corners, U)
        load_half_vector(lower, 0, corners, 2 * U)
        load_half_vector(lower_right, 0, corners, 3 * U)
        return
    for i in range(0, U, V):
        load_vector(upper, i, corners, i)
        load_vector(upper_right, i, corners, U + i)
        load_vector(lower, i, corners, 2 * U + i)
        load_vector(lower_right, i, corners, 3 * U + i)


@device
def gather_words(images, start, pitch, row_step, words, first):
    """Read 16 bytes of channels of the four corners of a cell, unconverted: words[first : first + 4] for the first,
    and so on."""
    upper = moved(images, start)
    lower = moved(upper, row_step)
    load_words(upper, 0, words, first)
    load_words(moved(upper, pitch), 0, words, first + 4)
    load_words(lower, 0, words, first + 8)
    load_words(moved(lower, pitch), 0, words, first + 12)


@device
def gather_pairs(images, start, pitch, row_step, words, first):
    """Read 8 bytes of channels of the four corners of a cell: words[first : first + 2] for the first, then
    words[first + 4 : first + 6], and so on."""
    upper = moved(images, start)
    lower = moved(upper, row_step)
    load_pair(upper, 0, words, first)
    load_pair(moved(upper, pitch), 0, words, first + 4)
    load_pair(lower, 0, words, first + 8)
    load_pair(moved(lower, pitch), 0, words, first + 12)


def corner_adder(T: Any, U: int, VECTORS: bool, SAMPLED: bool) -> Any:
    """Make `add_corners(images, start, pitch, row_step, y, x, values, products)`; U: channels, VECTORS: add 16 bytes
    at once."""
    S = scalar_type(T)

    @device
    def add_corner(images, weight, values, products):
        for i in range(U):
            products[i] = weight * values[i]
        if VECTORS:
            for i in range(0, U, 4):
                add_vector(images, i, products, i)
        else:
            for i in range(U):
                cuda.atomic.add(images, i, products[i])

    @device
    def add_corners(images, start, pitch, row_step, y, x, values, products):
        """Add the gradients of the samples of U channels to the corners they were read from, atomically. `products` has
        room for U numbers."""
        if SAMPLED:
            w00, w01, w10, w11 = bilinear.corner_weights(y, x)
            upper = moved(images, start)
            lower = moved(upper, row_step)
            add_corner(upper, S(w00), values, products)
            add_corner(moved(upper, pitch), S(w01), values, products)
            add_corner(lower, S(w10), values, products)
            add_corner(moved(lower, pitch), S(w11), values, products)
        else:
            add_corner(moved(images, start), S(1), values, products)

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
