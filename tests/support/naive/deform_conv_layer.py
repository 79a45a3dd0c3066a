"""A deformable convolution that predicts its own offsets, written from docs/semantics.md, section b.6.

A plain convolution of x gives z; its first channels are the offsets, followed by the logits of the mask if modulated.
Shapes: x (n, c, h, w), w (c_out, c/groups, kh, kw), offset_w (offset_groups*(2 or 3)*kh*kw, c, kh, kw), offset_b
(its first axis). Offsets and mask may be given, so that a step uses what an earlier one computed.
"""

from typing import NamedTuple

import numpy as np

from naive import conv, deform_conv


class Result(NamedTuple):
    y: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None


class Gradients(NamedTuple):
    x: np.ndarray
    w: np.ndarray
    offset_w: np.ndarray
    offset_b: np.ndarray | None
    bias: np.ndarray | None


def forward(x, w, offset_w, offset_b, bias=None, *, offsets=None, mask=None, modulated=False, mask_scale=1, **geometry):
    if offsets is None:
        offsets, mask = _predict(x, offset_w, offset_b, modulated, mask_scale, geometry)
    return Result(deform_conv.forward(x, offsets, w, bias, mask=mask, **geometry), offsets, mask)


def backward(
    grad_y,
    x,
    w,
    offset_w,
    offset_b,
    bias=None,
    *,
    offsets=None,
    mask=None,
    modulated=False,
    mask_scale=1,
    lower=-1.0,
    **geometry,
):
    """Gradients of sum(grad_y * forward(...).y); `lower` as in naive.deform_conv."""
    if offsets is None:
        offsets, mask = _predict(x, offset_w, offset_b, modulated, mask_scale, geometry)
    g = deform_conv.backward(grad_y, x, offsets, w, bias, mask=mask, lower=lower, **geometry)
    g_z = g.offsets
    if modulated:
        m = np.asarray(mask, np.float64)
        g_z = np.concatenate([g.offsets, g.mask * m * (1 + lower * m / mask_scale)], axis=1)
    g_off = conv.backward(g_z, x, offset_w, offset_b, **geometry)
    return Gradients(g.x + g_off.x, g.w, g_off.w, g_off.bias, g.bias)


@np.errstate(over="ignore")
def _predict(x, offset_w, offset_b, modulated, mask_scale, geometry):
    """(offsets, mask or None)"""
    z = conv.forward(x, offset_w, offset_b, **geometry)
    if not modulated:
        return z, None
    moves = 2 * z.shape[1] // 3
    return z[:, :moves], mask_scale / (1 + np.exp(-z[:, moves:]))
