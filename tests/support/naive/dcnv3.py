"""DCNv3, written from its formulas: plain NumPy, slow, and independent of numdcn.

Section e of docs/semantics.md. Shapes: x (n, h, w, groups*d), offsets (n, out_h, out_w, groups*points*2) with (x, y),
mask (n, out_h, out_w, groups*points), y (n, out_h, out_w, groups*d). Output pixels are one flat axis q.
"""

from typing import NamedTuple

import numpy as np

from . import weighted


class Gradients(NamedTuple):
    x: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(x, offsets, mask, *, kernel_size=3, stride=1, padding=0, dilation=1, offset_scale=1.0, remove_center=False):
    g = _Geometry(x, offsets, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    y = np.zeros((g.batch, g.pixels, g.groups, g.depth))
    for n, group in np.ndindex(g.batch, g.groups):
        y[n, :, group] = weighted.forward(g.image(n, group), *g.positions(n, group), g.mask[n, :, group])
    return y.reshape(g.batch, *g.out, g.groups * g.depth)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    grad_y, x, offsets, mask, *, kernel_size=3, stride=1, padding=0, dilation=1, offset_scale=1.0, remove_center=False,
    lower=-1.0,
):  # fmt: skip
    """Gradients of sum(grad_y * forward(...)). For `lower` see `weighted.backward`."""
    g = _Geometry(x, offsets, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    grad_y = np.asarray(grad_y, np.float64).reshape(g.batch, g.pixels, g.groups, g.depth)
    g_x, g_offsets, g_mask = np.zeros(g.x.shape), np.zeros(g.offsets.shape), np.zeros(g.mask.shape)
    for n, group in np.ndindex(g.batch, g.groups):
        g_x[n, :, :, group], g_py, g_px, g_mask[n, :, group] = weighted.backward(
            grad_y[n, :, group], g.image(n, group), *g.positions(n, group), g.mask[n, :, group], lower
        )
        g_offsets[n, :, group, :, 0], g_offsets[n, :, group, :, 1] = g.scale * g_px, g.scale * g_py
    return Gradients(g_x.reshape(x.shape), g_offsets.reshape(offsets.shape), g_mask.reshape(mask.shape))


class _Geometry:
    """The arrays by groups, and where points are."""

    def __init__(self, x, offsets, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center):
        self.kernel, self.stride, self.dilation = map(_pair, (kernel_size, stride, dilation))
        self.before = [_pair(p)[0] for p in _pair(padding)]
        (kh, kw), self.scale = self.kernel, float(offset_scale)
        self.points = [(j, i) for i in range(kw) for j in range(kh)]  # (row, column) in the kernel
        if remove_center:
            self.points.remove((kh // 2, kw // 2))
        self.groups = mask.shape[3] // len(self.points)
        self.batch, *size, channels = x.shape
        self.depth, self.out, self.pixels = channels // self.groups, mask.shape[1:3], mask.shape[1] * mask.shape[2]
        self.x = np.asarray(x, np.float64).reshape(self.batch, *size, self.groups, self.depth)
        rows = self.batch, self.pixels, self.groups, len(self.points)
        self.offsets, self.mask = np.reshape(offsets, (*rows, 2)), np.reshape(mask, rows)
        for a in (0, 1):
            room = size[a] + sum(_pair(_pair(padding)[a])) - (self.dilation[a] * (self.kernel[a] - 1) + 1)
            assert self.out[a] == room // self.stride[a] + 1

    def image(self, n, group):
        return self.x[n, :, :, group]

    def positions(self, n, group):
        """(p_y, p_x), each (q, t)."""
        found = []
        for a in (0, 1):
            middle = self.dilation[a] * (self.kernel[a] - 1) // 2
            base = np.arange(self.pixels) // self.out[1] if a == 0 else np.arange(self.pixels) % self.out[1]
            base = base * self.stride[a] - self.before[a] + middle
            taps = [point[a] * self.dilation[a] - middle for point in self.points]
            columns = [
                weighted.position(base, self.scale, tap, self.offsets[n, :, group, k, 1 - a])
                for k, tap in enumerate(taps)
            ]
            found.append(np.stack(columns, axis=1))
        return found


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
