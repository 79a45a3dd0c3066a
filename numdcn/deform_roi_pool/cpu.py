"""Deformable RoI pooling on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.options import Options
from numdcn._host.pool_cpu import pool, pool_gradients
from numdcn._host.rois import Boxes, align_boxes
from numdcn._kernels.bins_cpu import REACH, SAMPLES
from numdcn.deform_roi_pool.problem import Problem


def _boxes(p: Problem) -> Boxes:
    return align_boxes(p.rois, p.sampling_ratio, half_pixel=True, least=None, reach=p.gamma)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    pool(p.rois, arrays["x"], _boxes(p), y, arrays["offsets"], arrays["mask"])


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    boxes, offsets, mask = _boxes(p), arrays["offsets"], arrays["mask"]
    wanted = bool(grads.keys() & {"offsets", "mask"})
    sums = pool_gradients(p.rois, arrays["x"], boxes, grad_y, grads.get("x"), offsets, mask, with_sums=wanted)
    if sums is None:
        return
    samples = np.maximum(boxes.geometry[:, :, SAMPLES].prod(axis=1), 1)
    by_value, by_y, by_x = np.moveaxis(sums / samples[:, None, None, None], -1, 0)
    if "mask" in grads:
        grads["mask"][:, 0] = by_value
    if "offsets" in grads:
        scale: Any = 1 if mask is None else mask[:, 0]
        for channel, slopes, axis in ((0, by_x, 1), (1, by_y, 0)):
            grads["offsets"][:, channel] = slopes * scale * boxes.geometry[:, axis, REACH, None, None]
