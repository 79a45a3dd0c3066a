"""Shared by the naive RoI operators: boxes, sampling positions, and the rules align and psroi along one axis.

The formulas are those of docs/semantics.md, sections 0.1 (edges, NaN), a.2 (rules), c and d (boxes). Everything that
decides which pixels are touched (corners, sizes, positions) is computed in the dtype of the boxes, in the order in
which the formulas are written, so that it is what the library must choose; weights and sums are float64. A rule is
applied to each axis separately: a sample is active if it is on both, and its weights are products of one factor per
axis.
"""

import bisect
import math
from typing import NamedTuple

import numpy as np

LIMIT = 2.0**30  # scaled corners are clipped to +-LIMIT


class Tap(NamedTuple):
    """One of the two taps of the active samples along an axis; every field has one entry per active sample."""

    at: np.ndarray
    weight: np.ndarray
    slope: np.ndarray  # derivative of weight with respect to the position


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def clipped(corner):
    return np.clip(corner, type(corner)(-LIMIT), type(corner)(LIMIT))


def reach(gamma, length):
    """The shift by an offset of 1: finite, so that an offset of 0 shifts nothing."""
    most = np.finfo(gamma.dtype).max
    return np.clip(gamma * length, -most, most)


def rounded(value):
    """The nearest integer, halves away from zero, in the dtype of value."""
    whole = np.trunc(value)
    return whole + np.sign(value) * (np.abs(value - whole) >= 0.5).astype(value.dtype)


def align_box(roi, scale, aligned):
    """(image, (Y1, X1), (h, w)) of section c.2, without the minimum size."""
    T = roi.dtype.type
    shift = T(0.5 if aligned else 0)
    x1, y1, x2, y2 = (clipped(corner * T(scale)) - shift for corner in roi[1:])
    return int(roi[0]), (y1, x1), (y2 - y1, x2 - x1)


def align_positions(start, length, bins, index, ratio, size):
    """(positions of the samples of bin `index` that can be inside an image of `size` pixels, total number of samples).

    With ratio <= 0 the number follows from the box and may be billions; then positions increase with the sample's
    index, so the ones inside are found by bisection.
    """
    T = type(start)
    step = length / T(bins)
    count = ratio if ratio > 0 else max(math.ceil(step), 0)

    def position(u):
        return start + T(index) * step + (T(u) + T(0.5)) * step / T(count)

    samples = range(count)
    if ratio <= 0:
        first = bisect.bisect_left(samples, T(-1), key=position)
        last = bisect.bisect_right(samples, T(size), key=position)
        samples = samples[first:last]
    return np.array([position(u) for u in samples], T), count


def align(p, size, lower=-1.0):
    """The two taps of those positions that are active under rule align. `lower` is the sign of a lower tap's slope."""
    p = p[(p >= -1) & (p <= size)]
    low = np.maximum(p, 0).astype(np.int64)  # truncated
    clamped = low >= size - 1
    low = np.where(clamped, size - 1, low)
    f = np.where(clamped, 0.0, np.maximum(p, 0).astype(np.float64) - low)
    moves = np.where(clamped | (p < 0), 0.0, 1.0)
    return Tap(low, 1 - f, lower * moves), Tap(np.minimum(low + 1, size - 1), f, moves)


def psroi(p, size, lower=-1.0):
    """Like `align`, for rule psroi with the right derivative at integers."""
    p = p[(p >= -0.5) & (p <= p.dtype.type(size) - p.dtype.type(0.5))]
    inside = np.clip(p, 0, size - 1)
    low = np.floor(inside).astype(np.int64)
    f = inside.astype(np.float64) - low
    moves = np.where((p < 0) | (p >= size - 1), 0.0, 1.0)
    return Tap(low, 1 - f, lower * moves), Tap(np.minimum(low + 1, size - 1), f, moves)


def total(planes, rows, cols, row_factor="weight", col_factor="weight"):
    """(channels): for each of `planes` the sum over all samples of factors times pixels.

    Contiguous numbers are summed pairwise, so that thousands of equal ones do not accumulate rounding errors.
    """
    result = np.zeros(len(planes))
    for row in rows:
        for col in cols:
            pixels = np.ascontiguousarray(planes[:, row.at[:, None], col.at])
            factors = np.outer(getattr(row, row_factor), getattr(col, col_factor))
            result += (factors * pixels).reshape(len(planes), -1).sum(axis=1)
    return result


def scatter(planes, values, rows, cols):
    """planes[c] += values[c] * weight at every tap of every sample."""
    for row in rows:
        for col in cols:
            weights = np.outer(row.weight, col.weight)
            for plane, value in zip(planes, values, strict=True):
                np.add.at(plane, (row.at[:, None], col.at), value * weights)
