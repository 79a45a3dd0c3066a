"""Deformable RoI pooling, written from docs/semantics.md, section d.3: plain NumPy, slow, and independent of numdcn.

Offsets (R, 2, P_h, P_w): channel 0 moves a bin along x, 1 along y, in units of gamma times the box. y = pool * mask.
"""

from typing import NamedTuple

import numpy as np

from . import roi as _roi


class Gradients(NamedTuple):
    x: np.ndarray
    offsets: np.ndarray | None
    mask: np.ndarray | None


class Bin(NamedTuple):
    r: int
    i: int
    j: int
    image: int
    rows: tuple  # taps of the active samples
    cols: tuple
    count: float  # divisor
    nan: bool  # there are samples, and an offset is NaN
    height: float  # of the box
    width: float


@np.errstate(invalid="ignore", over="ignore")
def forward(x, rois, offsets=None, mask=None, *, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1):
    pooled = _roi.pair(output_size)
    y = np.zeros((len(rois), x.shape[1], *pooled))
    for b in _bins(x, rois, offsets, pooled, spatial_scale, sampling_ratio, gamma):
        m = 1.0 if mask is None else float(mask[b.r, 0, b.i, b.j])
        y[b.r, :, b.i, b.j] = _pool(x, b) * m
    return y


@np.errstate(invalid="ignore", over="ignore")
def backward(
    grad_y,
    x,
    rois,
    offsets=None,
    mask=None,
    *,
    output_size,
    spatial_scale=1.0,
    sampling_ratio=0,
    gamma=0.1,
    lower=-1.0,
):
    """Gradients of sum(grad_y * forward(...)); `lower` as in roi.align."""
    pooled = _roi.pair(output_size)
    g_x = np.zeros(x.shape)
    g_offsets, g_mask = np.zeros((len(rois), 2, *pooled)), np.zeros((len(rois), 1, *pooled))
    for b in _bins(x, rois, offsets, pooled, spatial_scale, sampling_ratio, gamma, lower):
        planes, grad = x[b.image].astype(np.float64), grad_y[b.r, :, b.i, b.j].astype(np.float64)
        delta = grad * (1.0 if mask is None else float(mask[b.r, 0, b.i, b.j])) / b.count
        g_mask[b.r, 0, b.i, b.j] = (grad * _pool(x, b)).sum()
        if b.nan:
            g_offsets[b.r, :, b.i, b.j] = np.nan
            continue
        _roi.scatter(g_x[b.image], delta, b.rows, b.cols)
        along_x = _roi.total(planes, b.rows, b.cols, "weight", "slope")
        along_y = _roi.total(planes, b.rows, b.cols, "slope", "weight")
        g_offsets[b.r, 0, b.i, b.j] = gamma * b.width * (delta * along_x).sum()
        g_offsets[b.r, 1, b.i, b.j] = gamma * b.height * (delta * along_y).sum()
    return Gradients(g_x, None if offsets is None else g_offsets, None if mask is None else g_mask)


def _pool(x, b):
    if b.nan:
        return np.full(x.shape[1], np.nan)
    return _roi.total(x[b.image].astype(np.float64), b.rows, b.cols) / b.count


def _bins(x, rois, offsets, pooled, scale, ratio, gamma, lower=-1.0):
    for r, box in enumerate(rois):
        n, start, length = _roi.align_box(box, scale, aligned=True)
        for i, j in np.ndindex(*pooled):
            taps, counts, nan = [], [], False
            for a, index in enumerate((i, j)):
                first, size = start[a], x.shape[2 + a]
                if offsets is not None:
                    first = first + _roi.reach(box.dtype.type(gamma), length[a]) * offsets[r, 1 - a, i, j]
                nan |= bool(np.isnan(first))
                settled = start[a] if np.isnan(first) else first  # NaN has no positions, but still a number of samples
                positions, count = _roi.align_positions(settled, length[a], pooled[a], index, ratio, size)
                taps.append(_roi.align(positions, size, lower))
                counts.append(count)
            samples = counts[0] * counts[1]
            yield Bin(r, i, j, n, *taps, float(max(samples, 1)), nan and samples > 0, *map(float, length))
