"""Position-sensitive RoI pooling on GPU arrays: forward and backward."""

from __future__ import annotations

from typing import Any

from numdcn._host.device_array import DeviceArray
from numdcn._host.options import Options
from numdcn._host.pool_cuda import pool_mean, pool_mean_gradient
from numdcn.ps_roi_pool.problem import Problem


def forward(p: Problem, arrays: dict[str, Any], y: DeviceArray, options: Options) -> None:
    """Fill y. All arrays are checked, y is contiguous."""
    pool_mean(p, arrays, y)


def backward(
    p: Problem, grad_y: DeviceArray, arrays: dict[str, Any], grads: dict[str, DeviceArray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are checked, the gradients contiguous."""
    pool_mean_gradient(p, grad_y, arrays, grads["x"], options)
