"""Kernels that copy whole batches to and from rimmed channels-last images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._kernels.jit_cpu import kernel
from numdcn._kernels.layout_cpu import BLOCK, clear_rim, fill, from_channels_last, rimmed_pixels, to_channels_last
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.simd_cpu import at, load_scalar, next_task, pointer


class ImagesCall(NamedTuple):
    """Parameters of `pack_images` and `unpack_images`.

    An image is stored block of channels by block of channels, each with a rim: the backward's tasks then read
    neighbouring memory, which spreads over all sets of the caches. The forward has one block.
    """

    batch: int
    size: tuple[int, int]
    image_size: int
    plain: Place
    images: int
    bounds: int  # address of the first channels of the blocks, and the end
    blocks: int
    slots: int
    slot_bytes: int


@kernel
def pack_images(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """Copy x to rimmed channels-last images. A task is a block of pixels of an image."""
    a = unpack(params, ImagesCall)
    x, buffer, bounds = a.plain, pointer(a.slots + slot * a.slot_bytes, one), pointer(a.bounds, np.int64(0))
    pixels = a.size[0] * a.size[1]
    blocks = (pixels + BLOCK - 1) // BLOCK
    while True:
        task = next_task(counter)
        if task >= a.batch * blocks:
            return
        n, first = task // blocks, task % blocks * BLOCK
        last = min(first + BLOCK, pixels)
        for block_ in range(a.blocks):
            channel, channel_end = load_scalar(bounds, block_), load_scalar(bounds, block_ + 1)
            image = at(pointer(a.images, one), n * a.image_size + channel * rimmed_pixels(a.size))
            clear_rim(image, first, last, a.size, channel_end - channel, one - one)
            source = at(pointer(x.address, one), n * x.strides[0] + channel * x.strides[1])
            to_channels_last(source, x.strides[1:], first, last, a.size, channel_end - channel, image, buffer)


@kernel
def unpack_images(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """Copy the gradients of the rimmed images to x. A task is a block of pixels of an image."""
    a = unpack(params, ImagesCall)
    x, bounds = a.plain, pointer(a.bounds, np.int64(0))
    buffer = pointer(a.slots + slot * a.slot_bytes, one)
    pixels = a.size[0] * a.size[1]
    blocks = (pixels + BLOCK - 1) // BLOCK
    while True:
        task = next_task(counter)
        if task >= a.batch * blocks:
            return
        n, first = task // blocks, task % blocks * BLOCK
        last = min(first + BLOCK, pixels)
        for block_ in range(a.blocks):
            channel, channel_end = load_scalar(bounds, block_), load_scalar(bounds, block_ + 1)
            image = at(pointer(a.images, one), n * a.image_size + channel * rimmed_pixels(a.size))
            target = at(pointer(x.address, one), n * x.strides[0] + channel * x.strides[1])
            from_channels_last(image, first, last, a.size, channel_end - channel, target, x.strides[1:], buffer)


class ClearCall(NamedTuple):
    """Parameters of `clear`."""

    address: int
    size: int


@kernel
def clear(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """Zero elements. A task is a stretch of them."""
    a, stretch = unpack(params, ClearCall), 1 << 16
    while True:
        task = next_task(counter)
        if task >= (a.size + stretch - 1) // stretch:
            return
        fill(pointer(a.address, one), task * stretch, min(stretch, a.size - task * stretch), one - one)
