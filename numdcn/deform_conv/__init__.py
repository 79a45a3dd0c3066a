"""Deformable convolution, v1 and (with a mask) v2: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import addressable, check_out
from numdcn._host.checks import describe, wanted_names
from numdcn._host.weights import PreparedWeights
from numdcn.deform_conv import cpu
from numdcn.deform_conv.problem import NAMES, check_grad_y, problem

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


class DeformConvGradients(NamedTuple):
    """Gradients of `deform_conv_forward`'s arguments; None where not asked for, or where there is no such input."""

    x: np.ndarray | None = None
    offsets: np.ndarray | None = None
    w: np.ndarray | None = None
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None


def deform_conv_backward(
    grad_y: np.ndarray,
    x: np.ndarray,
    offsets: np.ndarray,
    w: np.ndarray | PreparedWeights,
    bias: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    wrt: str | Iterable[str] | None = None,
    out: DeformConvGradients | None = None,
) -> DeformConvGradients:
    """TODO"""
    arrays = {"x": x, "offsets": offsets, "w": w, "bias": bias, "mask": mask}
    p = problem(arrays, stride, padding, dilation)
    check_grad_y(grad_y, p, x.dtype)
    wanted = wanted_names(wrt, tuple(n for n in NAMES if arrays[n] is not None), NAMES)
    grads = _gradients(out, wanted, arrays, grad_y)
    targets = {name: addressable(grad) for name, grad in grads.items()}
    cpu.backward(p, addressable(grad_y), _addressable(arrays), targets)
    for name, target in targets.items():
        if target is not grads[name]:
            grads[name][...] = target
    return DeformConvGradients(**grads)


def _gradients(out: Any, wanted: frozenset[str], arrays: dict[str, Any], grad_y: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays for the wanted gradients: those of `out`, checked, or fresh ones."""
    if out is None:
        out = DeformConvGradients()
    elif not isinstance(out, DeformConvGradients):
        raise TypeError(f"`out` is {describe(out)}, expected a DeformConvGradients")
    inputs, grads = {"grad_y": grad_y, **arrays}, {}
    for name, given in zip(NAMES, (getattr(out, name) for name in NAMES), strict=True):
        if name in wanted:
            grads[name] = _room(f"out.{name}", given, arrays[name].shape, grad_y.dtype, inputs)
            if given is not None:
                inputs[f"out.{name}"] = given
        elif given is not None:
            raise ValueError(f"`out.{name}` is {describe(given)}, expected None: the gradient of {name} is not asked for")
    return grads


def _addressable(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: addressable(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def _room(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype, inputs: dict[str, Any]) -> np.ndarray:
    """`out`, checked, or a fresh array."""
    if out is None:
        return np.empty(shape, dtype)
    plain = {n: a.array if isinstance(a, PreparedWeights) else a for n, a in inputs.items() if a is not None}
    check_out(name, out, shape, dtype, plain)
    return out
