"""Position-sensitive RoI align on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.options import Options
from numdcn._host.pool_cpu import pool_planes, pool_planes_gradients
from numdcn._host.rois import Boxes, align_boxes
from numdcn.ps_roi_align.problem import Problem


def _boxes(p: Problem) -> Boxes:
    return align_boxes(p.rois, p.sampling_ratio, half_pixel=True, least=None)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    pool_planes(p.rois, arrays["x"], _boxes(p), p.rois.bins, y)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    boxes = _boxes(p)
    pool_planes_gradients(p.rois, arrays["x"], boxes, p.rois.bins, grad_y, grads["x"])
