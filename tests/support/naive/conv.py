"""Ordinary convolution (cross-correlation), from docs/semantics.md, section b.7: plain NumPy, slow, independent.

The image is padded with zeros, and each tap of the kernel sees a strided window of it; the backward adds into the same
windows. Shapes: x (n, c, h, w), w (c_out, c/groups, kh, kw), bias (c_out). Everything is float64. A padded zero is
multiplied like any other number.
"""

from typing import NamedTuple

import numpy as np


class Gradients(NamedTuple):
    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None


@np.errstate(invalid="ignore", over="ignore")
def forward(x, w, bias=None, *, stride=1, padding=0, dilation=1):
    g = _Geometry(x, w, stride, padding, dilation)
    w, padded = np.asarray(w, np.float64), g.pad(x)
    y = np.zeros((len(x), len(w), *g.out))
    for outputs, inputs, i, j, window in g.terms():
        y[:, outputs] += np.einsum("oc,nchw->nohw", w[outputs, :, i, j], padded[(slice(None), inputs, *window)])
    return y if bias is None else y + np.asarray(bias, np.float64)[:, None, None]


@np.errstate(invalid="ignore", over="ignore")
def backward(grad_y, x, w, bias=None, *, stride=1, padding=0, dilation=1):
    """Gradients of sum(grad_y * forward(...)); for absolute values they are the sums of the magnitudes of all terms."""
    g = _Geometry(x, w, stride, padding, dilation)
    grad_y, w, padded = np.asarray(grad_y, np.float64), np.asarray(w, np.float64), g.pad(x)
    g_padded, g_w = np.zeros(padded.shape), np.zeros(w.shape)
    for outputs, inputs, i, j, window in g.terms():
        seen = (slice(None), inputs, *window)
        g_padded[seen] += np.einsum("oc,nohw->nchw", w[outputs, :, i, j], grad_y[:, outputs])
        g_w[outputs, :, i, j] = np.einsum("nohw,nchw->oc", grad_y[:, outputs], padded[seen])
    return Gradients(g.crop(g_padded), g_w, None if bias is None else grad_y.sum(axis=(0, 2, 3)))


class _Geometry:
    """Sizes read off the arrays, and the loop shared by both directions."""

    def __init__(self, x, w, stride, padding, dilation):
        self.size, self.kernel = x.shape[2:], w.shape[2:]
        self.c_out, self.c_per_group = w.shape[:2]
        self.groups = x.shape[1] // self.c_per_group
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = [_pair(p) for p in _pair(padding)]  # (before, after) of each axis
        self.out = []
        for a in (0, 1):
            room = self.size[a] + sum(self.padding[a]) - (self.dilation[a] * (self.kernel[a] - 1) + 1)
            self.out.append(room // self.stride[a] + 1)

    def pad(self, x):
        return np.pad(np.asarray(x, np.float64), [(0, 0), (0, 0), *self.padding])

    def crop(self, padded):
        (top, _), (left, _) = self.padding
        return padded[:, :, top : top + self.size[0], left : left + self.size[1]]

    def terms(self):
        """(output channels, their input channels, the tap's row and column, the window of the image that it sees)"""
        o, c = self.c_out // self.groups, self.c_per_group
        for g in range(self.groups):
            for i in range(self.kernel[0]):
                for j in range(self.kernel[1]):
                    window = [
                        slice(k * d, k * d + (out - 1) * s + 1, s)
                        for k, d, out, s in zip((i, j), self.dilation, self.out, self.stride, strict=True)
                    ]
                    yield slice(g * o, (g + 1) * o), slice(g * c, (g + 1) * c), i, j, window


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
