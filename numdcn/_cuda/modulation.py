"""A deformable layer's modulation on the GPU: masks from logits and back, and sums of two arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

from numdcn._call.arrays import received
from numdcn._call.device_array import DeviceArray
from numdcn._call.results import new_like
from numdcn._cuda.jit import STORED, Scalar, cuda, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, view, widen
from numdcn._cuda.workspace import Workspace, scalar, stored


class Call(NamedTuple):
    """Parameters of the kernels. The logits are the last channels of an array; the other arrays are contiguous."""

    logits: int  # address of the first logit; in the backward: of the gradient
    mask: int
    grad_mask: int
    count: int
    image: int  # elements per image of the mask
    step: int  # elements from one image of the logits to the next
    scale: Scalar


@kernels(Call, lambda: [(dtype,) for dtype in STORED.values()])
def modulate(T):
    """mask = scale * sigmoid(logits), or, with a gradient of the mask, grad_logits = grad_mask * mask * (1 - mask / scale)."""
    S = scalar_type(T)

    def run(c):
        logits, mask, grad_mask = view(c.logits, T), view(c.mask, T), view(c.grad_mask, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            spot = task // c.image * c.step + task % c.image
            if c.grad_mask:
                value, grad = widen(at(mask, task)), widen(at(grad_mask, task))
                slope = value * (S(1) - value / S(c.scale))
                put(logits, spot, narrow(grad * slope, T))
            else:
                logit = widen(at(logits, spot))
                small = S(math.exp(-abs(logit)))  # for either sign, so nothing overflows
                upper = S(1) / (S(1) + small)
                sigmoid = upper if logit >= S(0) else small * upper
                put(mask, task, narrow(S(c.scale) * sigmoid if logit == logit else logit, T))

    return run


def split_prediction(z: DeviceArray, channels: int, scale: int) -> tuple[DeviceArray, DeviceArray]:
    """The first `channels` of z, which are offsets, and scale * sigmoid of the rest."""
    with Workspace(z) as work:
        offsets = received(z.owner[:, :channels])
        mask = new_like((z.shape[0], z.shape[1] - channels, *z.shape[2:]), z.dtype, z)
        if mask.size:
            first = z.address + channels * z.strides[1] * z.dtype.itemsize
            call = Call(first, mask.address, 0, mask.size, mask.size // len(mask), z.strides[0], scalar(z.dtype)(scale))  # type: ignore[arg-type]
            work.spread(modulate(stored(z.dtype)), call, mask.size)
        return offsets, mask


def join_gradients(grad_offsets: DeviceArray, grad_mask: DeviceArray, mask: DeviceArray, scale: int) -> DeviceArray:
    """The gradient of z, given those of the results of `split_prediction`."""
    with Workspace(grad_mask) as work:
        channels = grad_offsets.shape[1]
        shape = (grad_mask.shape[0], channels + grad_mask.shape[1], *grad_mask.shape[2:])
        grad_z = new_like(shape, grad_mask.dtype, grad_mask)
        if grad_z.size:
            work.copy(grad_offsets, received(grad_z.owner[:, :channels]))
            mask, grad_mask = work.contiguous(mask), work.contiguous(grad_mask)
            first = grad_z.address + channels * grad_z.strides[1] * grad_z.dtype.itemsize
            image = grad_mask.size // len(grad_mask)
            factor = scalar(grad_z.dtype)(scale)
            call = Call(first, mask.address, grad_mask.address, grad_mask.size, image, grad_z.strides[0], factor)  # type: ignore[arg-type]
            work.spread(modulate(stored(grad_z.dtype)), call, grad_mask.size)
        return grad_z


def add_to(target: DeviceArray, other: DeviceArray) -> None:
    """target += other."""
    with Workspace(target) as work:
        work.add(other, target)
