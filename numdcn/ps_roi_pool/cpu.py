"""Position-sensitive RoI pooling on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.options import Options
from numdcn._host.pool_cpu import pool_planes, pool_planes_gradients
from numdcn._host.rois import whole_boxes
from numdcn.ps_roi_pool.problem import Problem


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    pool_planes(p, arrays["x"], whole_boxes(p, inclusive=False), p.bins, y)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    boxes = whole_boxes(p, inclusive=False)
    pool_planes_gradients(p, arrays["x"], boxes, p.bins, grad_y, grads["x"])
