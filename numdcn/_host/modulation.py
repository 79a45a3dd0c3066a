"""The arithmetic of a deformable layer between its two convolutions: masks from logits and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import received
from numdcn._host.device_array import DeviceArray
from numdcn._host.door import new_like


def split_prediction(z: Any, channels: int, scale: int) -> tuple[Any, Any]:
    """The first `channels` of z, which are offsets, and scale * sigmoid of the others."""
    if not isinstance(z, DeviceArray):
        logits = z[:, channels:]
        with np.errstate(over="ignore", under="ignore"):  # exp may be infinite: the mask is 0 then
            return z[:, :channels], np.asarray(scale, z.dtype) / (1 + np.exp(-logits))
    from numdcn._host.work_cuda import Work, scalar, stored
    from numdcn._kernels.mask_cuda import Call, masks

    with Work(z) as work:
        offsets = received(z.owner[:, :channels])
        mask = new_like((z.shape[0], z.shape[1] - channels, *z.shape[2:]), z.dtype, z)
        if mask.size:
            first = z.address + channels * z.strides[1] * z.dtype.itemsize
            call = Call(first, mask.address, 0, mask.size, mask.size // len(mask), z.strides[0], scalar(z.dtype)(scale))  # type: ignore[arg-type]
            work.spread(masks(stored(z.dtype)), call, mask.size)
        return offsets, mask


def join_gradients(grad_offsets: Any, grad_mask: Any, mask: Any, scale: int) -> Any:
    """The gradient of z, given those of what `split_prediction` made of it."""
    if not isinstance(grad_mask, DeviceArray):
        with np.errstate(all="ignore"):
            grad_logits = grad_mask * mask * (1 - mask / scale)
        return np.concatenate([grad_offsets, grad_logits], axis=1)
    from numdcn._host.work_cuda import Work, scalar, stored
    from numdcn._kernels.mask_cuda import Call, mask_gradients

    with Work(grad_mask) as work:
        channels = grad_offsets.shape[1]
        shape = (grad_mask.shape[0], channels + grad_mask.shape[1], *grad_mask.shape[2:])
        grad_z = new_like(shape, grad_mask.dtype, grad_mask)
        if grad_z.size:
            work.copy(grad_offsets, received(grad_z.owner[:, :channels]))
            mask, grad_mask = work.contiguous(mask), work.contiguous(grad_mask)
            first = grad_z.address + channels * grad_z.strides[1] * grad_z.dtype.itemsize
            image = grad_mask.size // len(grad_mask)
            one = scalar(grad_z.dtype)(scale)
            call = Call(first, mask.address, grad_mask.address, grad_mask.size, image, grad_z.strides[0], one)  # type: ignore[arg-type]
            work.spread(mask_gradients(stored(grad_z.dtype)), call, grad_mask.size)
        return grad_z


def add_to(target: Any, other: Any) -> None:
    """target += other."""
    if not isinstance(target, DeviceArray):
        with np.errstate(all="ignore"):
            target += other
        return
    if not target.size:
        return
    from numdcn._host.work_cuda import Work, stored
    from numdcn._kernels.mask_cuda import Sum, add

    with Work(target) as work:
        sums = work.contiguous(target)
        work.spread(add(stored(target.dtype)), Sum(sums.address, work.contiguous(other).address, sums.size), sums.size)
        if sums is not target:
            work.copy(sums, target)


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    """Zeros of the dtype of an array, where it is."""
    made = new_like(shape, like.dtype, like)
    if isinstance(made, DeviceArray):
        from numdcn._host.work_cuda import Work

        with Work(made) as work:
            work.clear(made)
    else:
        made[...] = 0
    return made
