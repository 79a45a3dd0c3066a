"""Deformable position-sensitive RoI pooling on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.options import Options
from numdcn._host.pool_cpu import pool_planes, pool_planes_gradients
from numdcn._host.rois import Boxes, sampled_boxes
from numdcn._kernels.bins_cpu import REACH
from numdcn.deform_ps_roi_pool.problem import Problem


def _boxes(p: Problem) -> Boxes:
    return sampled_boxes(p.rois, p.sample_per_part, p.trans_std)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    pool_planes(p.rois, arrays["x"], _boxes(p), p.group_size, y, arrays["trans"])


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    boxes, x, trans, wanted = _boxes(p), arrays["x"], arrays["trans"], "trans" in grads
    slopes = pool_planes_gradients(p.rois, x, boxes, p.group_size, grad_y, grads.get("x"), trans, with_sums=wanted)
    if slopes is None:
        return
    grad, (bins_y, bins_x) = grads["trans"], p.rois.bins
    grad[...] = 0
    reach = boxes.geometry[:, None, None, ::-1, REACH]  # (R, 1, 1, 2), x first
    moved = slopes * reach  # (classes, R, Ph, Pw, 2)
    for i in range(bins_y):
        for j in range(bins_x):  # to (R, 2*classes): several bins may share a part
            part = moved[:, :, i, j].transpose(1, 0, 2).reshape(grad.shape[:2])
            grad[:, :, i * grad.shape[2] // bins_y, j * grad.shape[3] // bins_x] += part
