"""DCNv4, written from its formulas: plain NumPy, slow, and independent of numdcn.

Section e.5 of docs/semantics.md: offsets and mask unpacked, then dcnv3, then gradients packed. Shapes: x and y as there,
offset_mask (n, out_h, out_w, channels): of each group x and y of every point, then the weights; then padding.
"""

from typing import NamedTuple

import numpy as np

from . import dcnv3


class Gradients(NamedTuple):
    x: np.ndarray
    offset_mask: np.ndarray


def forward(x, offset_mask, *, groups, **options):
    return dcnv3.forward(x, *unpacked(offset_mask, groups, **options), **options)


def backward(grad_y, x, offset_mask, *, groups, lower=-1.0, **options):
    """Gradients of sum(grad_y * forward(...)). For `lower` see `weighted.backward`."""
    g = dcnv3.backward(grad_y, x, *unpacked(offset_mask, groups, **options), lower=lower, **options)
    return Gradients(g.x, packed(g.offsets, g.mask, groups, offset_mask.shape[3]))


def unpacked(offset_mask, groups, *, kernel_size=3, remove_center=False, **_):
    """(offsets, mask)"""
    kh, kw = (kernel_size, kernel_size) if np.ndim(kernel_size) == 0 else kernel_size
    points = kh * kw - bool(remove_center)
    offsets, mask = [], []
    for group in range(groups):
        first = 3 * points * group
        offsets.append(offset_mask[..., first : first + 2 * points])
        mask.append(offset_mask[..., first + 2 * points : first + 3 * points])
    return np.concatenate(offsets, axis=-1), np.concatenate(mask, axis=-1)


def packed(offsets, mask, groups, channels):
    """An array of this many channels; those that are left over are 0."""
    made = np.zeros((*mask.shape[:3], channels), mask.dtype)
    points = mask.shape[3] // groups
    for group in range(groups):
        first = 3 * points * group
        made[..., first : first + 2 * points] = offsets[..., 2 * points * group : 2 * points * (group + 1)]
        made[..., first + 2 * points : first + 3 * points] = mask[..., points * group : points * (group + 1)]
    return made
