"""RoI max pooling, written from docs/semantics.md, section c.1: plain NumPy, slow, and independent of numdcn.

Bin sizes are computed in integers. NaN is the maximum, at the position of the first NaN in row-major order.
"""

from typing import NamedTuple

import numpy as np

from . import roi as _roi


class Result(NamedTuple):
    y: np.ndarray
    argmax: np.ndarray


class Gradients(NamedTuple):
    x: np.ndarray


@np.errstate(over="ignore")
def forward(x, rois, output_size, spatial_scale=1.0, *, return_argmax=False):
    pooled, (channels, _, width) = _roi.pair(output_size), x.shape[1:]
    y = np.zeros((len(rois), channels, *pooled))
    argmax = np.full(y.shape, -1, np.int32)
    for r, i, j, n, rows, cols in _bins(x, rois, pooled, spatial_scale):
        for c in range(channels):
            best = None
            for row in rows:
                for col in cols:
                    pixel = x[n, c, row, col]
                    if best is None or pixel > best or (np.isnan(pixel) and not np.isnan(best)):
                        best = pixel
                        y[r, c, i, j], argmax[r, c, i, j] = pixel, row * width + col
    return Result(y, argmax) if return_argmax else y


def backward(grad_y, x, rois, output_size, spatial_scale=1.0, *, argmax=None):
    if argmax is None:
        argmax = forward(x, rois, output_size, spatial_scale, return_argmax=True).argmax
    g_x = np.zeros(x.shape)
    for (r, c, i, j), at in np.ndenumerate(argmax):
        if at >= 0:
            g_x[int(rois[r, 0]), c, at // x.shape[3], at % x.shape[3]] += grad_y[r, c, i, j]
    return Gradients(g_x)


def _bins(x, rois, pooled, scale):
    """For every bin: RoI, i, j, image, its rows and its columns."""
    for r, box in enumerate(rois):
        x1, y1, x2, y2 = (int(_roi.rounded(_roi.clipped(corner * box.dtype.type(scale)))) for corner in box[1:])
        axes = []
        for a, (low, high) in enumerate(((y1, y2), (x1, x2))):
            length, bins, size = max(high - low + 1, 1), pooled[a], x.shape[2 + a]
            edges = [(low + i * length // bins, low - (-(i + 1) * length) // bins) for i in range(bins)]
            axes.append([range(min(max(first, 0), size), min(max(last, 0), size)) for first, last in edges])
        for i, rows in enumerate(axes[0]):
            for j, cols in enumerate(axes[1]):
                yield r, i, j, int(box[0]), rows, cols
