"""Bilinear interpolation: cells, corner weights, values and slopes under the border rule `zeros`, and the taps along
one axis under the RoI operators' rules `align` and `psroi` (docs/semantics.md, a.2).

The formulas of `zeros` take scalars and `vectors.Vec` alike. They rely on an image with a border of zero pixels: every
active sample (-1 <= p < size on both axes) then has four corners to read, and all others use a cell of four zeros.
"""

from __future__ import annotations

from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import floor, fma, like, select, to_index

ALIGN, PSROI = 0, 1  # border modes


@helper
def cell(y, x, height, width):
    """The cell of a sample at (y, x): row and column of its corner (0, 0), the top left one, counted from the padding
    (row 0 is the row of zeros), and its two fractions.

    A sample outside the image, even infinitely far, uses the cell of zeros below the image; so does NaN, with NaN
    fractions.
    """
    minus_one = like(-1.0, y)
    inside = (y >= minus_one) & (y < height) & (x >= minus_one) & (x < width)
    safe_y = select(inside, y, height)
    safe_x = select(inside, x, minus_one)
    floor_y, floor_x = floor(safe_y), floor(safe_x)
    unknown, either = (y != y) | (x != x), y + x
    fraction_y = select(unknown, either, safe_y - floor_y)
    fraction_x = select(unknown, either, safe_x - floor_x)
    row, column = to_index(floor_y), to_index(floor_x)
    return row + like(1, row), column + like(1, column), fraction_y, fraction_x


@helper
def corner_weights(fraction_y, fraction_x):
    """Weights of the corners (0, 0), (0, 1), (1, 0), (1, 1) of a cell."""
    one = like(1.0, fraction_y)
    rest_y, rest_x = one - fraction_y, one - fraction_x
    return rest_y * rest_x, rest_y * fraction_x, fraction_y * rest_x, fraction_y * fraction_x


@helper
def value(weights, corners):
    """The sample: the weighted sum of the corners."""
    w00, w01, w10, w11 = weights
    x00, x01, x10, x11 = corners
    return fma(w11, x11, fma(w10, x10, fma(w01, x01, w00 * x00)))


@helper
def slopes(fractions, corners):
    """Right derivatives of the sample along y and x. `fractions` are those of y and x, then one minus each."""
    fraction_y, fraction_x, rest_y, rest_x = fractions
    x00, x01, x10, x11 = corners
    along_y = fma(fraction_x, x11 - x01, rest_x * (x10 - x00))
    along_x = fma(fraction_y, x11 - x10, rest_y * (x01 - x00))
    return along_y, along_x


@helper
def taps_align(p, size):
    """Border rule `align` (RoI align) along one axis: whether a sample at p is active, its lower and upper pixel, the
    weight of the upper one, and whether it has a slope.

    Active for -1 <= p <= size, constant beyond the centres of the outermost pixels, without slope there.
    """
    zero, one = like(0.0, p), like(1.0, p)
    if not (p >= zero - one and p <= like(size, p)):
        return False, 0, 0, zero, False
    inside = max(p, zero)
    low = int(inside)
    if low >= size - 1:
        return True, size - 1, size - 1, zero, False
    return True, low, low + 1, inside - like(low, p), p >= zero


@helper
def taps_psroi(p, size):
    """Border rule `psroi` (deformable position-sensitive RoI pooling) along one axis; results as in `taps_align`.

    Active for -0.5 <= p <= size - 0.5, constant in the outer halves of the outermost pixels.
    """
    zero, half, last = like(0.0, p), like(0.5, p), like(size - 1, p)
    if not (p >= zero - half and p <= last + half):
        return False, 0, 0, zero, False
    inside = min(max(p, zero), last)
    low = min(int(inside), size - 1)
    high = min(low + 1, size - 1)
    return True, low, high, inside - like(low, p), p >= zero and low < high
