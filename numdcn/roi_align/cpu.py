"""RoI align on NumPy arrays: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.options import Options
from numdcn._host.pool_cpu import pool, pool_gradients
from numdcn._host.rois import Boxes, align_boxes
from numdcn.roi_align.problem import Problem


def _boxes(p: Problem) -> Boxes:
    """Shifted by half a pixel if aligned, else at least one pixel long."""
    return align_boxes(p.rois, p.sampling_ratio, half_pixel=p.aligned, least=None if p.aligned else 1.0)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    pool(p.rois, arrays["x"], _boxes(p), y)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    pool_gradients(p.rois, arrays["x"], _boxes(p), grad_y, grads["x"])
