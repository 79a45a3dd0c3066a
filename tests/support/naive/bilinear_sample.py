"""Bilinear sampling at points, written from its formulas: plain NumPy, slow, and independent of numdcn.

Sections a.1 (interpolation), a.2 (rule zeros) and 0.1 (edges, NaN) of docs/semantics.md. Shapes: x (n, c, h, w), points
(n, ..., 2) with (y, x) in pixels, y (n, c, ...). The cell is found in the dtype of the points, all else is float64.
"""

import math
from typing import NamedTuple

import numpy as np


class Gradients(NamedTuple):
    x: np.ndarray
    points: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(x, points):
    x, count = np.asarray(x, np.float64), math.prod(points.shape[1:-1])
    y = np.zeros((*x.shape[:2], count))
    for n, flat in enumerate(points.reshape(len(points), count, 2)):
        for rows, cols, at, weight, _, _ in _taps(flat, x.shape[2:]):
            y[n][:, at] += weight * x[n][:, rows, cols]
        y[n][:, np.isnan(flat).any(axis=1)] = np.nan
    return y.reshape(*x.shape[:2], *points.shape[1:-1])


@np.errstate(invalid="ignore", over="ignore")
def backward(grad_y, x, points, *, lower=-1.0):
    """Gradients of sum(grad_y * forward(x, points)).

    `lower` is the sign of a lower tap in a slope. With lower=+1 and absolute values of x and grad_y the results are the
    sums of the magnitudes of all terms, from which tests derive error bounds.
    """
    x, count = np.asarray(x, np.float64), math.prod(points.shape[1:-1])
    grad_y = np.asarray(grad_y, np.float64).reshape(*x.shape[:2], count)
    g_x, g_points = np.zeros(x.shape), np.zeros((len(x), count, 2))
    for n, flat in enumerate(points.reshape(len(points), count, 2)):
        for rows, cols, at, weight, slope_y, slope_x in _taps(flat, x.shape[2:], lower):
            products = grad_y[n][:, at] * x[n][:, rows, cols]
            g_points[n, at, 0] += (slope_y * products).sum(axis=0)
            g_points[n, at, 1] += (slope_x * products).sum(axis=0)
            for c, plane in enumerate(g_x[n]):
                np.add.at(plane, (rows, cols), grad_y[n, c, at] * weight)
        outside = ~_active(flat, x.shape[2:])
        g_points[n, outside] = (0 * grad_y[n][:, outside]).sum(axis=0)[:, None]  # 0, unless NaN or infinite
        g_points[n, np.isnan(flat).any(axis=1)] = np.nan
    return Gradients(g_x, g_points.reshape(points.shape))


def _active(points, size):
    """Where -1 <= p < N on both axes; false for NaN."""
    return ((points >= -1) & (points < np.asarray(size, points.dtype))).all(axis=1)


def _taps(points, size, lower=-1.0):
    """The four taps: (rows, columns, indices of the points that have this tap, weights, their derivatives).

    Only taps that are pixels are included.
    """
    active = _active(points, size)
    numbers = np.flatnonzero(active)
    cells = np.floor(points[active])
    f_y, f_x = (points[active].astype(np.float64) - cells).T
    cell_y, cell_x = cells.astype(np.int64).T
    for b_y, w_y, s_y in ((0, 1 - f_y, lower), (1, f_y, 1.0)):
        for b_x, w_x, s_x in ((0, 1 - f_x, lower), (1, f_x, 1.0)):
            rows, cols = cell_y + b_y, cell_x + b_x
            pixel = (rows >= 0) & (rows < size[0]) & (cols >= 0) & (cols < size[1])
            parts = (rows, cols, numbers, w_y * w_x, s_y * w_x, w_y * s_x)
            yield tuple(part[pixel] for part in parts)
