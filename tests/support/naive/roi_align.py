"""RoI align, written from docs/semantics.md, section c.2: plain NumPy, slow, and independent of numdcn."""

from typing import NamedTuple

import numpy as np

from . import roi as _roi


class Gradients(NamedTuple):
    x: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(x, rois, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    pooled = _roi.pair(output_size)
    y = np.zeros((len(rois), x.shape[1], *pooled))
    for r, i, j, n, rows, cols, count in _bins(x, rois, pooled, spatial_scale, sampling_ratio, aligned):
        y[r, :, i, j] = _roi.total(x[n].astype(np.float64), rows, cols) / count
    return y


@np.errstate(invalid="ignore", over="ignore")
def backward(grad_y, x, rois, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    pooled = _roi.pair(output_size)
    g_x = np.zeros(x.shape)
    for r, i, j, n, rows, cols, count in _bins(x, rois, pooled, spatial_scale, sampling_ratio, aligned):
        _roi.scatter(g_x[n], grad_y[r, :, i, j].astype(np.float64) / count, rows, cols)
    return Gradients(g_x)


def _bins(x, rois, pooled, scale, ratio, aligned):
    """For every bin: RoI, i, j, image, taps of the active samples along each axis, divisor."""
    for r, box in enumerate(rois):
        n, start, length = _roi.align_box(box, scale, aligned)
        if not aligned:
            length = [max(side, box.dtype.type(1)) for side in length]
        axes = []
        for a in (0, 1):
            axes.append([])
            for index in range(pooled[a]):
                size = x.shape[2 + a]
                positions, count = _roi.align_positions(start[a], length[a], pooled[a], index, ratio, size)
                axes[a].append((_roi.align(positions, size), count))
        for i, (rows, row_count) in enumerate(axes[0]):
            for j, (cols, col_count) in enumerate(axes[1]):
                yield r, i, j, n, rows, cols, float(max(row_count * col_count, 1))
