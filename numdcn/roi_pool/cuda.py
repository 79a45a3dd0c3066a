"""RoI pooling on GPU arrays: forward and backward."""

from __future__ import annotations

from typing import Any

from numdcn._host.device_array import DTYPES, DeviceArray
from numdcn._host.options import Options
from numdcn._host.pool_cuda import pool_max, pool_max_gradient
from numdcn._host.work_cuda import Work
from numdcn.roi_pool.problem import Problem


def forward(p: Problem, arrays: dict[str, Any], y: DeviceArray, options: Options) -> None:
    """Fill y; arrays may hold room for `argmax`. All arrays are checked, both results are contiguous."""
    pool_max(p, arrays, y, arrays.get("argmax"))


def backward(
    p: Problem, grad_y: DeviceArray, arrays: dict[str, Any], grads: dict[str, DeviceArray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument; `arrays` may hold the forward's `argmax`, which is
    found again if not. A position in it that is in no image adds nothing. All arrays are checked, the gradients contiguous."""
    with Work(grad_y) as work:
        argmax = arrays.get("argmax")
        if argmax is None:
            argmax = work.empty(p.out_shape, DTYPES["int32"])
            pool_max(p, arrays, None, argmax)
        pool_max_gradient(p, grad_y, arrays, argmax, grads["x"], options)
