"""The modulation of a deformable layer on the GPU: masks from logits and back, and sums of two arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

from numdcn._kernels.jit_cuda import BF16, F16, F32, F64, Scalar, cuda, kernels, scalar_type
from numdcn._kernels.memory_cuda import at, narrow, put, view, widen

KINDS = [(kind,) for kind in (F32, F64, F16, BF16)]


class Call(NamedTuple):
    """Parameters of the kernels. The logits are the last channels of an array; the others are contiguous."""

    logits: int  # address of the first; in the backward: of their gradient
    mask: int
    grad_mask: int
    count: int
    image: int  # elements of an image of the mask
    step: int  # elements from an image of the logits to the next
    scale: Scalar


@kernels(Call, lambda: KINDS)
def masks(T):  # type: ignore[no-untyped-def]
    """mask = scale * sigmoid(logits)."""
    S = scalar_type(T)

    def run(c):  # type: ignore[no-untyped-def]
        logits, mask = view(c.logits, T), view(c.mask, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            logit = widen(at(logits, task // c.image * c.step + task % c.image))
            small = S(math.exp(-abs(logit)))  # of either sign: nothing overflows
            upper = S(1) / (S(1) + small)
            share = upper if logit >= S(0) else small * upper
            put(mask, task, narrow(S(c.scale) * share if logit == logit else logit, T))

    return run


@kernels(Call, lambda: KINDS)
def mask_gradients(T):  # type: ignore[no-untyped-def]
    """grad_logits = grad_mask * mask * (1 - mask / scale)."""
    S = scalar_type(T)

    def run(c):  # type: ignore[no-untyped-def]
        logits, mask, grad_mask = view(c.logits, T), view(c.mask, T), view(c.grad_mask, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            value, grad = widen(at(mask, task)), widen(at(grad_mask, task))
            slope = value * (S(1) - value / S(c.scale))
            put(logits, task // c.image * c.step + task % c.image, narrow(grad * slope, T))

    return run


class Sum(NamedTuple):
    """Parameters of `add`."""

    target: int
    other: int
    count: int


@kernels(Sum, lambda: KINDS)
def add(T):  # type: ignore[no-untyped-def]
    """target += other."""

    def run(c):  # type: ignore[no-untyped-def]
        target, other = view(c.target, T), view(c.other, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            put(target, task, narrow(widen(at(target, task)) + widen(at(other, task)), T))

    return run
