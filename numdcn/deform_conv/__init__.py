"""Deformable convolution, v1 and (with a mask) v2: forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import addressable, check_out
from numdcn._host.weights import PreparedWeights
from numdcn.deform_conv import cpu
from numdcn.deform_conv.problem import Problem, problem

IntPerAxis = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


def deform_conv_forward(
    x: np.ndarray,
    offsets: np.ndarray,
    w: np.ndarray | PreparedWeights,
    bias: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """TODO"""
    arrays = {"x": x, "offsets": offsets, "w": w, "bias": bias, "mask": mask}
    p = problem(arrays, stride, padding, dilation)
    y = _room("out", out, p.out_shape, x.dtype, arrays)
    target = addressable(y)
    cpu.forward(p, _addressable(arrays), target)
    if target is not y:
        y[...] = target
    return y


def _addressable(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: addressable(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def _room(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype, inputs: dict[str, Any]) -> np.ndarray:
    """`out`, checked, or a fresh array."""
    if out is None:
        return np.empty(shape, dtype)
    plain = {n: a.array if isinstance(a, PreparedWeights) else a for n, a in inputs.items() if a is not None}
    check_out(name, out, shape, dtype, plain)
    return out
