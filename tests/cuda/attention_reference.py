"""Weighted samples of channels-last images as loops in float64, for test_attention.py."""

import math
from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """What a call should return, or for each element the sum of the magnitudes of its terms."""

    y: np.ndarray
    value: np.ndarray
    points: np.ndarray
    weights: np.ndarray


def tent(position, pixel):
    """Weight of a pixel at a position along an axis, and its right derivative."""
    inside = math.floor(position)
    if pixel == inside:
        return 1 - (position - inside), -1.0
    return position - inside, 1.0


def corners(position, size):
    """(row, column, weight, derivative along y, along x) of every pixel that a sample reads."""
    if any(math.isnan(p) or not -1 <= p < n for p, n in zip(position, size, strict=True)):
        return
    for row in (math.floor(position[0]), math.floor(position[0]) + 1):
        for column in (math.floor(position[1]), math.floor(position[1]) + 1):
            if 0 <= row < size[0] and 0 <= column < size[1]:
                (w_y, d_y), (w_x, d_x) = tent(position[0], row), tent(position[1], column)
                yield row, column, w_y * w_x, d_y * w_x, w_y * d_x


def sampled(value, level, position):
    """(sample, slope along y, along x) of all channels, and the same for magnitudes."""
    exact, sizes = np.zeros((3, value.shape[-1])), np.zeros((3, value.shape[-1]))
    if any(map(math.isnan, position)):
        exact[:] = np.nan
    for row, column, *factors in corners(position, (level.height, level.width)):
        pixel = value[level.start + row * level.width + column]
        exact += np.array(factors)[:, None] * pixel
        sizes += np.abs(factors)[:, None] * np.abs(pixel)
    return exact, sizes


def results(p, value, points, weights, grad_y):
    """(results, magnitudes), from arrays of float64."""
    arrays = (np.zeros(grad_y.shape), np.zeros(value.shape), np.zeros(points.shape), np.zeros(weights.shape))
    exact, sizes = Result(*arrays), Result(*(array.copy() for array in arrays))
    levels = [level for level in p.levels for _ in range(level.points)]
    for place in np.ndindex(weights.shape):
        b, q, m, t = place
        level, grad, weight = levels[t], grad_y[b, q, m], weights[place]
        base = [
            n * stride + origin
            for n, stride, origin in zip(divmod(q, p.grid.columns), p.grid.stride, p.grid.origin, strict=True)
        ]
        scale, moved = p.grid.scales[t], np.add(p.grid.taps[t], points[place][::-1])
        position = [float(start + step * by) for start, step, by in zip(base, scale, moved, strict=True)]
        (sample, *slopes), (size, *steepness) = sampled(value[b, :, m], level, position)
        exact.y[b, q, m] += weight * sample
        sizes.y[b, q, m] += abs(weight) * size
        exact.weights[place] = (grad * sample).sum()
        sizes.weights[place] = (abs(grad) * size).sum()
        for axis in range(2):  # y, then x
            exact.points[place][1 - axis] = scale[axis] * (weight * (grad * slopes[axis]).sum())
            sizes.points[place][1 - axis] = abs(scale[axis] * weight) * (abs(grad) * steepness[axis]).sum()
        for row, column, factor, *_ in corners(position, (level.height, level.width)):
            pixel = level.start + row * level.width + column
            exact.value[b, pixel, m] += grad * weight * factor
            sizes.value[b, pixel, m] += abs(grad * weight * factor)
    return exact, sizes
