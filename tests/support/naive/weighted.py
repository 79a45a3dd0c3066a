"""Weighted sums of samples of an image, what ms_deform_attn, dcnv3 and dcnv4 share: plain NumPy, slow, independent of
numdcn.

Sections a.1 (interpolation), a.2 (rule zeros) and 0.1 (edges, NaN) of docs/semantics.md. An image is (h, w, d), channels
last; p_y, p_x and weights are (q, t): of output q the points t. The cell is found in the dtype of the coordinates, all
else is float64.
"""

import numpy as np


def position(base, scale, tap, point):
    """base + scale*(tap + point), in the dtype of `point`: the inner sum is rounded, then the rest once."""
    kind = point.dtype.type
    inner = kind(tap) + point
    if kind is np.float64:
        return base + scale * inner
    return (np.float64(base) + np.float64(kind(scale)) * inner.astype(np.float64)).astype(kind)


def forward(image, p_y, p_x, weights):
    """(q, d): the sum over t of weight * sample."""
    return (np.asarray(weights, np.float64)[..., None] * _sums(image, p_y, p_x)[0]).sum(axis=1)


def backward(grad, image, p_y, p_x, weights, lower):
    """The gradients of the image, of p_y, of p_x and of the weights, given that of the result, (q, d).

    `lower` is the sign of a lower tap's slope; +1, with absolute values of the arrays, makes them sums of magnitudes.
    """
    weights, g_image = np.asarray(weights, np.float64), np.zeros(image.shape)
    sample, slope_y, slope_x = _sums(image, p_y, p_x, lower)
    for rows, cols, at, weight, _, _ in _taps(p_y, p_x, image.shape, lower):
        queries, points = np.nonzero(at)
        values = grad[queries] * (weights[queries, points] * weight)[:, None]
        np.add.at(g_image, (rows, cols), values)
    along = [(grad[:, None] * part).sum(axis=2) for part in (sample, slope_y, slope_x)]
    return g_image, weights * along[1], weights * along[2], along[0]


def _sums(image, p_y, p_x, lower=-1.0):
    """The samples and their slopes along y and x, each (q, t, d)."""
    totals = np.zeros((3, *p_y.shape, image.shape[2]))
    for rows, cols, at, *factors in _taps(p_y, p_x, image.shape, lower):
        for total, factor in zip(totals, factors, strict=True):
            total[at] += factor[:, None] * image[rows, cols]
    totals[:, np.isnan(p_y) | np.isnan(p_x)] = np.nan
    return totals


def _taps(p_y, p_x, shape, lower):
    """The four taps: (rows, columns, where points have this tap, weights, their derivatives along y and x).

    Only taps that are pixels are included.
    """
    height, width = shape[:2]
    active = (p_y >= -1) & (p_y < height) & (p_x >= -1) & (p_x < width)
    p_y, p_x = np.where(active, p_y, 0), np.where(active, p_x, 0)
    cell_y, cell_x = np.floor(p_y).astype(np.int64), np.floor(p_x).astype(np.int64)
    f_y, f_x = p_y.astype(np.float64) - cell_y, p_x.astype(np.float64) - cell_x
    for b_y, w_y, s_y in ((0, 1 - f_y, lower), (1, f_y, 1.0)):
        for b_x, w_x, s_x in ((0, 1 - f_x, lower), (1, f_x, 1.0)):
            rows, cols = cell_y + b_y, cell_x + b_x
            at = active & (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
            factors = w_y * w_x, s_y * w_x, w_y * s_x
            yield rows[at], cols[at], at, *(np.broadcast_to(factor, at.shape)[at] for factor in factors)
