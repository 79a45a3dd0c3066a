"""Ordinary convolution (cross-correlation) written from its formula: the offset-predicting convolution of a pack layer.

One stride, one symmetric padding and one dilation per axis, groups read off the shapes. Everything is float64.
"""

import numpy as np


def forward(x, w, bias=None, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    padded = _pad(x, padding)
    out = _output_size(padded, w, stride, dilation)
    y = np.zeros((x.shape[0], w.shape[0], *out))
    for o, inputs, i, j, rows, cols in _terms(x, w, out, stride, dilation):
        y[:, o] += np.einsum("c,nchw->nhw", w[o, :, i, j], padded[:, inputs, rows, cols])
    return y if bias is None else y + np.asarray(bias, np.float64)[:, None, None]


def backward(grad_y, x, w, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """(g_x, g_w, g_bias)"""
    x, w, grad_y = (np.asarray(a, np.float64) for a in (x, w, grad_y))
    padded = _pad(x, padding)
    g_padded, g_w = np.zeros(padded.shape), np.zeros(w.shape)
    for o, inputs, i, j, rows, cols in _terms(x, w, grad_y.shape[2:], stride, dilation):
        g_padded[:, inputs, rows, cols] += grad_y[:, o, None] * w[o, :, i, j, None, None]
        g_w[o, :, i, j] = np.einsum("nhw,nchw->c", grad_y[:, o], padded[:, inputs, rows, cols])
    height, width = x.shape[2:]
    g_x = g_padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return g_x, g_w, grad_y.sum(axis=(0, 2, 3))


def _terms(x, w, out, stride, dilation):
    """(output channel, its input channels, tap, the rows and columns of the padded image that the tap sees)"""
    c_out, c, kh, kw = w.shape
    per_group = c_out // (x.shape[1] // c)
    for o in range(c_out):
        first = o // per_group * c
        for i in range(kh):
            for j in range(kw):
                rows, cols = (
                    slice(start, start + (size - 1) * step + 1, step)
                    for start, size, step in zip((i * dilation[0], j * dilation[1]), out, stride, strict=True)
                )
                yield o, slice(first, first + c), i, j, rows, cols


def _pad(x, padding):
    return np.pad(x, [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2])


def _output_size(padded, w, stride, dilation):
    return tuple(
        (size - (d * (k - 1) + 1)) // s + 1
        for size, k, s, d in zip(padded.shape[2:], w.shape[2:], stride, dilation, strict=True)
    )
