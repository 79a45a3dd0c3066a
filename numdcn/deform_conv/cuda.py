"""Deformable convolution on GPU arrays: forward and backward. The kernels are in `_kernels/convolve_*cuda.py`."""

from __future__ import annotations

from typing import Any

from numdcn._host import convolve_cuda
from numdcn._host.device_array import DeviceArray
from numdcn._host.options import Options
from numdcn.deform_conv.problem import Problem


def forward(p: Problem, arrays: dict[str, Any], y: DeviceArray, options: Options) -> None:
    """Fill y. All arrays are checked, y is contiguous."""
    convolve_cuda.forward(p, arrays, y, options)


def backward(
    p: Problem, grad_y: DeviceArray, arrays: dict[str, Any], grads: dict[str, DeviceArray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are checked, the gradients contiguous."""
    convolve_cuda.backward(p, grad_y, arrays, grads, options)
