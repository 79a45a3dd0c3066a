"""Convolutions on NumPy arrays, deformable or not: scratch memory, copies, packing and threads around their kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import place
from numdcn._host.images_cpu import RimmedImages
from numdcn._host.scratch import Scratch
from numdcn._host.sums_cpu import sum_pixels
from numdcn._host.threads import launch, plan_threads
from numdcn._host.weights import PreparedWeights, pack
from numdcn._kernels.convolution import Convolution
from numdcn._kernels.convolve_cpu import (
    BackwardArrays,
    BackwardCall,
    ForwardArrays,
    ForwardCall,
    Parts,
    SumCall,
    finish_weights,
    sum_parts,
)
from numdcn._kernels.cut_cpu import backward_cut, forward_cut
from numdcn._kernels.weights_cpu import PackBlocks, pack_blocks, packing

SAMPLING = 16  # multiply-adds of the product that making, or writing, one element takes as long as


def forward(kernel: Any, p: Convolution, arrays: dict[str, Any], y: np.ndarray) -> None:
    """Fill y by an operator's kernel. All arrays are addressable and checked."""
    x, w = arrays["x"], arrays["w"]
    dtype = x.dtype
    one, cut = dtype.type(1), forward_cut(p, dtype)
    tasks = p.batch * cut.tiles * cut.parts
    made = SAMPLING * (p.in_channels * p.taps + p.out_channels)
    threads = plan_threads(tasks, float(p.batch) * p.out_size[0] * p.out_size[1] * (cut.weights.size + made))
    prepared = isinstance(w, PreparedWeights)
    weights_bytes = 0 if prepared else (cut.weights.size + 16) * dtype.itemsize  # vectors may run over
    with Scratch(p.batch * cut.image_size * dtype.itemsize, weights_bytes, threads * cut.slot_bytes) as memory:
        images, weights, slots = memory
        bounds = np.array((0, p.in_channels), np.int64)
        RimmedImages(images, cut.image_size, bounds, slots, cut.slot_bytes, threads).pack(x)
        if prepared:
            weights = w.packed
        else:
            pack(w, cut.weights, weights, threads)
        a = ForwardArrays(
            place(x),
            place(arrays.get("offsets")),
            place(arrays.get("mask")),
            place(arrays["bias"]),
            place(y),
            images,
            weights,
            slots,
        )
        launch(kernel, one, ForwardCall(p, cut, a), threads)


def backward(
    kernel: Any, p: Convolution, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray]
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument, by an operator's kernel."""
    if "bias" in grads:
        sum_pixels(grad_y, grads["bias"])
    if not grads.keys() - {"bias"}:
        return
    x, w = arrays["x"], arrays["w"]
    dtype = x.dtype
    one, (cut, bounds, firsts) = dtype.type(1), backward_cut(p, dtype)
    tasks, size = cut.blocks * cut.image_bands, dtype.itemsize
    products = 0 if cut.depthwise else cut.outputs
    work = float(p.batch) * p.out_size[0] * p.out_size[1] * p.taps * p.in_channels * (products + SAMPLING)
    threads = plan_threads(max(tasks, 2), work)
    images_size = p.batch * cut.image_size
    through = bool(grads.keys() & {"x", "offsets", "mask"})  # whether the gradient of the columns is needed
    plane = p.batch * p.offset_groups * p.taps * p.out_size[0] * p.out_size[1] if cut.parts > 1 else 0
    sizes = (
        images_size,
        images_size if "x" in grads else 0,
        cut.blocks * cut.weights_size + 64 if through else 0,
        tasks * cut.sums_size + 64 if "w" in grads else 0,
        2 * cut.parts * plane if "offsets" in grads else 0,
        cut.parts * plane if "mask" in grads else 0,
    )
    with Scratch(*(n * size for n in sizes), threads * cut.slot_bytes) as memory:
        images, grad_images, weights, sums, offset_parts, mask_parts, slots = memory
        a = BackwardArrays(
            place(grad_y), place(arrays.get("offsets")), place(arrays.get("mask")), place(grads.get("x")),
            _parts(grads.get("offsets"), offset_parts, plane), _parts(grads.get("mask"), mask_parts, plane),
            place(grads.get("w")), images, grad_images if "x" in grads else 0, weights if through else 0,
            sums if "w" in grads else 0, bounds.ctypes.data, firsts.ctypes.data, slots,
        )  # fmt: skip
        rimmed, grad_rimmed = (
            RimmedImages(where, cut.image_size, bounds, slots, cut.slot_bytes, threads)
            for where in (images, grad_images)
        )
        rimmed.pack(x)
        if a.grad_images:
            grad_rimmed.clear(p.batch, dtype)
        if through:
            plain = w.array if isinstance(w, PreparedWeights) else w
            how = packing(plain.shape, p.groups, dtype)
            packing_call = PackBlocks(
                how, p.kernel[1], *place(plain), weights, a.bounds, cut.blocks, cut.block, cut.depthwise
            )
            launch(pack_blocks, one, packing_call, min(threads, cut.blocks))
        call = BackwardCall(p, cut, a)
        launch(kernel, one, call, min(threads, tasks))
        if a.grad_images:
            grad_rimmed.unpack(grads["x"])
        if a.sums:
            launch(finish_weights, one, call, min(threads, cut.blocks))
        for name, partial, channels in (("offsets", a.grad_offsets, 2 * p.taps), ("mask", a.grad_mask, p.taps)):
            if plane and name in grads:
                launch(sum_parts, one, SumCall(p, a.firsts, channels, partial, place(grads[name])), threads)


def _parts(grad: np.ndarray | None, address: int, plane: int) -> Parts:
    """Where the parts of a gradient of offsets or mask lie: in the gradient itself, if there is one part."""
    if grad is None:
        return Parts(0, (0, 0, 0, 0, 0))
    if not plane:
        whole = place(grad)
        return Parts(whole.address, (0, *whole.strides))
    _, channels, height, width_ = grad.shape
    image = channels * height * width_
    return Parts(address, (grad.shape[0] * image, image, height * width_, width_, 1))
