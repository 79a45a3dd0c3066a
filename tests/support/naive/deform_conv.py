"""Deformable convolution written from its formulas: plain NumPy, slow, and independent of numdcn.

The formulas are those of docs/semantics.md, sections a.1 (interpolation), 0.1 (edges, NaN) and b (convolution).
Coordinates are computed in the dtype of the offsets, so that the cell is the one the library must choose; everything
after that is float64. Shapes: x (n, c, h, w), offsets (n, offset_groups*taps*2, out_h, out_w) interleaved (y, x),
w (c_out, c/groups, kh, kw), bias (c_out), mask (n, offset_groups*taps, out_h, out_w). Output pixels are one
flat axis l.
"""

from typing import NamedTuple

import numpy as np


class Gradients(NamedTuple):
    x: np.ndarray
    offsets: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None


class Corner(NamedTuple):
    """One corner of the cells of one tap; every field has one entry per output pixel."""

    rows: np.ndarray  # clipped to the image if the corner is outside
    cols: np.ndarray
    inside: np.ndarray  # the sample is active and the corner is a pixel
    weight: np.ndarray
    slope_y: np.ndarray  # derivative of weight
    slope_x: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(x, offsets, w, bias=None, *, mask=None, stride=1, padding=0, dilation=1):
    g = _Geometry(x, offsets, w, stride, padding, dilation)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64).reshape(g.c_out, -1, g.taps)
    y = np.zeros((g.batch, g.c_out, g.pixels))
    for n in range(g.batch):
        columns = np.zeros((g.channels, g.taps, g.pixels))  # mask * sample
        for og, k, channels in g.groups_and_taps():
            corners, nan = _corners(*g.coordinates(offsets, n, og, k), g.size)
            m = 1.0 if mask is None else g.flat(mask)[n, og * g.taps + k]
            columns[channels, k] = m * _sample(x[n, channels], corners, nan, "weight")
        for outputs, inputs in g.conv_groups():
            y[n, outputs] = np.einsum("ock,ckl->ol", w[outputs], columns[inputs])
    if bias is not None:
        y += np.asarray(bias, np.float64)[:, None]
    return y.reshape(g.batch, g.c_out, *g.out)


@np.errstate(invalid="ignore", over="ignore")
def backward(grad_y, x, offsets, w, bias=None, *, mask=None, stride=1, padding=0, dilation=1, lower=-1.0):
    """Gradients of sum(grad_y * forward(...)).

    `lower` is the sign of a lower corner in a slope. With lower=+1 and absolute values of all other arrays the
    results are the sums of the magnitudes of all terms, from which tests derive error bounds.
    """
    g = _Geometry(x, offsets, w, stride, padding, dilation)
    x, w3 = np.asarray(x, np.float64), np.asarray(w, np.float64).reshape(g.c_out, -1, g.taps)
    grad_y = g.flat(grad_y).astype(np.float64)
    g_x, g_w = np.zeros(x.shape), np.zeros(w3.shape)
    g_offsets = np.zeros((g.batch, g.offset_groups * g.taps, 2, g.pixels))
    g_mask = np.zeros((g.batch, g.offset_groups * g.taps, g.pixels))
    for n in range(g.batch):
        a = np.zeros((g.channels, g.taps, g.pixels))  # the column gradient
        for outputs, inputs in g.conv_groups():
            a[inputs] = np.einsum("ock,ol->ckl", w3[outputs], grad_y[n, outputs])
        columns = np.zeros((g.channels, g.taps, g.pixels))
        for og, k, channels in g.groups_and_taps():
            corners, nan = _corners(*g.coordinates(offsets, n, og, k), g.size, lower)
            m = 1.0 if mask is None else g.flat(mask)[n, og * g.taps + k].astype(np.float64)
            s, s_y, s_x = (_sample(x[n, channels], corners, nan, f) for f in ("weight", "slope_y", "slope_x"))
            columns[channels, k] = m * s
            t = og * g.taps + k
            g_offsets[n, t, 0] = m * (a[channels, k] * s_y).sum(axis=0)
            g_offsets[n, t, 1] = m * (a[channels, k] * s_x).sum(axis=0)
            g_mask[n, t] = (a[channels, k] * s).sum(axis=0)
            _scatter(g_x[n, channels], a[channels, k] * m, corners)
        for outputs, inputs in g.conv_groups():
            g_w[outputs] += np.einsum("ol,ckl->ock", grad_y[n, outputs], columns[inputs])
    return Gradients(
        g_x,
        g_offsets.reshape(offsets.shape),
        g_w.reshape(w.shape),
        None if bias is None else grad_y.sum(axis=(0, 2)),
        None if mask is None else g_mask.reshape(mask.shape),
    )


def _corners(p_y, p_x, size, lower=-1.0):
    """The four corners of the floor cell of each (p_y, p_x), and where a coordinate is NaN."""
    height, width = size
    nan = np.isnan(p_y) | np.isnan(p_x)
    active = (p_y >= -1) & (p_y < height) & (p_x >= -1) & (p_x < width)
    p_y, p_x = np.where(active, p_y, 0), np.where(active, p_x, 0)
    cell_y, cell_x = np.floor(p_y).astype(np.int64), np.floor(p_x).astype(np.int64)
    f_y, f_x = p_y.astype(np.float64) - cell_y, p_x.astype(np.float64) - cell_x
    corners = []
    for b_y, w_y, s_y in ((0, 1 - f_y, lower), (1, f_y, 1.0)):
        for b_x, w_x, s_x in ((0, 1 - f_x, lower), (1, f_x, 1.0)):
            rows, cols = cell_y + b_y, cell_x + b_x
            inside = active & (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
            rows, cols = rows.clip(0, height - 1), cols.clip(0, width - 1)
            corners.append(Corner(rows, cols, inside, w_y * w_x, s_y * w_x, w_y * s_x))
    return corners, nan


def _sample(planes, corners, nan, factor):
    """sum over the corners of factor * pixel, for each of `planes` (c, h, w): (c, l)."""
    total = np.zeros((len(planes), len(nan)))
    for corner in corners:
        pixels = np.where(corner.inside, planes[:, corner.rows, corner.cols], 0.0)
        total += getattr(corner, factor) * pixels
    total[:, nan] = np.nan
    return total


def _scatter(planes, values, corners):
    """planes[c, row, col] += weight * values[c, l] for every corner inside the image."""
    for corner in corners:
        at = corner.inside
        for plane, value in zip(planes, values, strict=True):
            np.add.at(plane, (corner.rows[at], corner.cols[at]), corner.weight[at] * value[at])


class _Geometry:
    """Sizes read off the arrays, and the loops shared by both directions."""

    def __init__(self, x, offsets, w, stride, padding, dilation):
        self.batch, self.channels, *self.size = x.shape
        self.c_out, self.c_per_group, self.kh, self.kw = w.shape
        self.taps = self.kh * self.kw
        self.groups = self.channels // self.c_per_group
        self.offset_groups = offsets.shape[1] // (2 * self.taps)
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = [_pair(p) for p in _pair(padding)]  # (before, after) of each axis
        self.out = []
        for a, kernel in enumerate((self.kh, self.kw)):
            room = self.size[a] + sum(self.padding[a]) - (self.dilation[a] * (kernel - 1) + 1)
            self.out.append(room // self.stride[a] + 1)
        self.pixels = self.out[0] * self.out[1]
        assert offsets.shape == (self.batch, self.offset_groups * self.taps * 2, *self.out)

    def flat(self, array):
        return np.asarray(array).reshape(array.shape[0], array.shape[1], self.pixels)

    def groups_and_taps(self):
        """(offset group, tap, the channels that the group moves)"""
        size = self.channels // self.offset_groups
        for g in range(self.offset_groups):
            for k in range(self.taps):
                yield g, k, slice(g * size, (g + 1) * size)

    def conv_groups(self):
        """(output channels, input channels) of each block"""
        for g in range(self.groups):
            o, c = self.c_out // self.groups, self.c_per_group
            yield slice(g * o, (g + 1) * o), slice(g * c, (g + 1) * c)

    def coordinates(self, offsets, n, g, k):
        """(p_y, p_x) of one tap of one offset group, each (l), in the dtype of the offsets."""
        moved = []
        for a, tap in enumerate((k // self.kw, k % self.kw)):
            base = np.arange(self.out[a]) * self.stride[a] - self.padding[a][0] + tap * self.dilation[a]
            base = (base[:, None] if a == 0 else base[None, :]).astype(offsets.dtype)
            moved.append((base + offsets[n, (g * self.taps + k) * 2 + a]).reshape(-1))
        return moved


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
