"""Deformable position-sensitive RoI pooling, from docs/semantics.md, section d.2: plain NumPy, slow, independent.

trans (R, 2*classes, part_h, part_w): channels 2*k and 2*k+1 move the bins of class k along x and y, in units of
trans_std times the box. The classes split the output channels into consecutive blocks. Channel (c*gs + gy)*gs + gx of x
serves channel c of y in group (gy, gx). Samples are at the top left of the sub-bins; those outside do not count.
"""

from typing import NamedTuple

import numpy as np

from . import roi as _roi


class Gradients(NamedTuple):
    x: np.ndarray
    trans: np.ndarray | None


class Bin(NamedTuple):
    """A bin of one class."""

    y: tuple  # index of its channels in y
    x: tuple  # index of its planes in x, seen as (batch, c_out, gs, gs, height, width)
    part: tuple  # index of its pair in trans, seen as (R, classes, 2, part_h, part_w)
    rows: tuple  # taps of the active samples
    cols: tuple
    count: int  # number of active samples
    nan: bool
    height: float  # of the box
    width: float


@np.errstate(invalid="ignore", over="ignore")
def forward(x, rois, trans=None, *, output_size, group_size, sample_per_part=4, trans_std=0.1, spatial_scale=1.0):
    pooled = _roi.pair(output_size)
    maps = x.astype(np.float64).reshape(len(x), x.shape[1] // group_size**2, group_size, group_size, *x.shape[2:])
    y = np.zeros((len(rois), maps.shape[1], *pooled))
    for b in _bins(maps, rois, trans, pooled, sample_per_part, trans_std, spatial_scale):
        if b.nan:
            y[b.y] = np.nan
        elif b.count:
            y[b.y] = _roi.total(maps[b.x], b.rows, b.cols) / b.count
    return y


@np.errstate(invalid="ignore", over="ignore")
def backward(
    grad_y,
    x,
    rois,
    trans=None,
    *,
    output_size,
    group_size,
    sample_per_part=4,
    trans_std=0.1,
    spatial_scale=1.0,
    lower=-1.0,
):
    """Gradients of sum(grad_y * forward(...)); `lower` as in roi.align."""
    pooled = _roi.pair(output_size)
    maps = x.astype(np.float64).reshape(len(x), x.shape[1] // group_size**2, group_size, group_size, *x.shape[2:])
    g_maps = np.zeros(maps.shape)
    parts = (1, 1) if trans is None else trans.shape[2:]
    g_trans = np.zeros((len(rois), 1 if trans is None else trans.shape[1] // 2, 2, *parts))
    for b in _bins(maps, rois, trans, pooled, sample_per_part, trans_std, spatial_scale, lower):
        if b.nan:
            g_trans[b.part] = np.nan
        else:  # without samples all sums are 0, which times NaN is NaN
            delta = grad_y[b.y].astype(np.float64) / max(b.count, 1)
            _roi.scatter(g_maps[b.x], delta, b.rows, b.cols)
            along_x = (delta * _roi.total(maps[b.x], b.rows, b.cols, "weight", "slope")).sum()
            along_y = (delta * _roi.total(maps[b.x], b.rows, b.cols, "slope", "weight")).sum()
            g_trans[b.part] += trans_std * b.width * along_x, trans_std * b.height * along_y
    return Gradients(g_maps.reshape(x.shape), None if trans is None else g_trans.reshape(trans.shape))


def _bins(maps, rois, trans, pooled, samples, trans_std, scale, lower=-1.0):
    T = rois.dtype.type
    classes, parts = (1, (1, 1)) if trans is None else (trans.shape[1] // 2, trans.shape[2:])
    per_class, groups = maps.shape[1] // classes, maps.shape[2]
    for r, box in enumerate(rois):
        y1, x1 = (_roi.clipped(_roi.rounded(corner) * T(scale)) - T(0.5) for corner in (box[2], box[1]))
        y2, x2 = (_roi.clipped((_roi.rounded(corner) + T(1)) * T(scale)) - T(0.5) for corner in (box[4], box[3]))
        length = [max(y2 - y1, T(0.1)), max(x2 - x1, T(0.1))]
        for k, i, j in np.ndindex(classes, *pooled):
            part = tuple(index * parts[a] // pooled[a] for a, index in enumerate((i, j)))
            gy, gx = (min(index * groups // pooled[a], groups - 1) for a, index in enumerate((i, j)))
            taps, nan = [], False
            for a, (start, index) in enumerate(((y1, i), (x1, j))):
                step = length[a] / T(pooled[a])
                first = start + T(index) * step
                if trans is not None:
                    first = first + _roi.reach(T(trans_std), length[a]) * trans[(r, 2 * k + 1 - a, *part)]
                nan |= bool(np.isnan(first))
                positions = np.array([first + T(u) * (step / T(samples)) for u in range(samples)], T)
                taps.append(_roi.psroi(positions, maps.shape[4 + a], lower))
            channels = slice(k * per_class, (k + 1) * per_class)
            count = len(taps[0][0].at) * len(taps[1][0].at)
            yield Bin(
                (r, channels, i, j),
                (int(box[0]), channels, gy, gx),
                (r, k, slice(None), *part),
                *taps,
                count,
                nan,
                *map(float, length),
            )
