"""Compiling ahead of the first call."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import check_dtype
from numdcn.deform_conv import deform_conv_backward, deform_conv_forward


def warmup(dtype: Any = np.float32, backward: bool = True) -> None:
    """Compile (or load from the cache) everything that a first call would, so that later calls are at full speed.

    dtype: float32 or float64, as anything that `numpy.dtype` takes. backward: also what the backward needs.

    Raises `TypeError` for another dtype.
    """
    kind = check_dtype("dtype", dtype)
    # one channel more than an offset group's block holds, so that partial sums are needed too
    x, w = np.ones((1, 40, 3, 3), kind), np.ones((2, 40, 1, 1), kind)
    offsets, mask = np.zeros((1, 2, 3, 3), kind), np.ones((1, 1, 3, 3), kind)
    y = deform_conv_forward(x, offsets, w, mask=mask)
    if backward:
        deform_conv_backward(y, x, offsets, w, mask=mask)
