"""Position-sensitive RoI align on GPU arrays: forward and backward."""

from __future__ import annotations

from typing import Any

from numdcn._host.device_array import DeviceArray
from numdcn._host.options import Options
from numdcn._host.pool_cuda import Grid, align_grid, pool, pool_gradients
from numdcn.ps_roi_align.problem import Problem


def _grid(p: Problem) -> Grid:
    return align_grid(p.sampling_ratio, half_pixel=True, least=None)


def forward(p: Problem, arrays: dict[str, Any], y: DeviceArray, options: Options) -> None:
    """Fill y. All arrays are checked, y is contiguous."""
    pool(p.rois, arrays, y, _grid(p), p.rois.bins)


def backward(
    p: Problem, grad_y: DeviceArray, arrays: dict[str, Any], grads: dict[str, DeviceArray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are checked, the gradients contiguous."""
    pool_gradients(p.rois, grad_y, arrays, grads, options, _grid(p), p.rois.bins)
