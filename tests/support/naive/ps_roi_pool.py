"""Position-sensitive RoI average pooling, from docs/semantics.md, section c.3: plain NumPy, slow, independent.

Channel (c*P_h + i)*P_w + j of x serves bin (i, j) of channel c of y. Bin sizes are computed in integers.
Bins are clipped to the whole image, including its last row and column, unlike in torchvision's forward.
"""

from typing import NamedTuple

import numpy as np

from . import roi as _roi


class Gradients(NamedTuple):
    x: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(x, rois, output_size, spatial_scale=1.0):
    pooled = _roi.pair(output_size)
    maps = x.reshape(len(x), x.shape[1] // (pooled[0] * pooled[1]), *pooled, *x.shape[2:])
    y = np.zeros((len(rois), maps.shape[1], *pooled))
    for r, i, j, n, rows, cols in _bins(x, rois, pooled, spatial_scale):
        pixels = maps[n, :, i, j, rows, cols].astype(np.float64)
        if pixels[0].size:
            y[r, :, i, j] = pixels.sum(axis=(1, 2)) / pixels[0].size
    return y


@np.errstate(invalid="ignore", over="ignore")
def backward(grad_y, x, rois, output_size, spatial_scale=1.0):
    pooled = _roi.pair(output_size)
    g_maps = np.zeros((len(x), grad_y.shape[1], *pooled, *x.shape[2:]))
    for r, i, j, n, rows, cols in _bins(x, rois, pooled, spatial_scale):
        pixels = g_maps[n, :, i, j, rows, cols]
        if pixels[0].size:
            pixels += grad_y[r, :, i, j, None, None].astype(np.float64) / pixels[0].size
    return Gradients(g_maps.reshape(x.shape))


def _bins(x, rois, pooled, scale):
    """For every bin: RoI, i, j, image, its rows and its columns as slices."""
    for r, box in enumerate(rois):
        x1, y1, x2, y2 = (int(_roi.rounded(_roi.clipped(corner * box.dtype.type(scale)))) for corner in box[1:])
        axes = []
        for a, (low, high) in enumerate(((y1, y2), (x1, x2))):
            length, bins, size = max(high - low, 1), pooled[a], x.shape[2 + a]
            edges = [(low + i * length // bins, low - (-(i + 1) * length) // bins) for i in range(bins)]
            axes.append([slice(min(max(first, 0), size), min(max(last, 0), size)) for first, last in edges])
        for i, rows in enumerate(axes[0]):
            for j, cols in enumerate(axes[1]):
                yield r, i, j, int(box[0]), rows, cols
