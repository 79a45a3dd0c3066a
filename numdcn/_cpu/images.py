"""Kernels that copy whole batches to and from zero-padded channels-last images.

They run before and after an operator's kernels, and transpose in the same per-thread workspaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.arrays import is_half
from numdcn._cpu.arrays import Outline, computed, place
from numdcn._cpu.jit import kernel
from numdcn._cpu.layout import (
    COPY_ELEMENTS,
    clear_padding,
    fill,
    from_channels_last,
    padded_pixels,
    pairs_to_channels_last,
    to_channels_last,
)
from numdcn._cpu.parameters import Numbers, Place, unpack
from numdcn._cpu.simd import at, load_scalar, next_task, pointer
from numdcn._cpu.threads import launch
from numdcn._formulas.jit import helper


class ImagesCall(NamedTuple):
    """Parameters of `pack_images` and `unpack_images`.

    Images are blocked (see `layout`), so that a task of a backward, which owns a block of channels, reads contiguous
    memory that spreads over all cache sets. A forward has a single block of all channels.
    """

    batch: int
    size: tuple[int, int]
    image_size: int  # elements of a blocked image, all blocks together
    plain: Place  # the caller's (N, C, H, W)
    images: int  # address of the zero-padded images
    bounds: int  # address of the first channel of each block, then the number of channels
    blocks: int  # blocks of channels
    pixels: int  # copied per task
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread


@helper
def _fill_image(image, x, strides, first, last, size, channels, zero, buffer):
    """Copy pixels first to last of x to a zero-padded image."""
    clear_padding(image, first, last, size, channels, zero)
    to_channels_last(x, strides, first, last, size, channels, image, buffer)


@helper
def _fill_pairs(image, x, strides, first, last, size, channels, zero, buffer):
    """`_fill_image` of pairs of channels."""
    clear_padding(image, first, last, size, channels, zero)
    pairs_to_channels_last(x, strides, first, last, size, channels, image, buffer)


@helper
def _read_image(image, x, strides, first, last, size, channels, zero, buffer):
    """Copy pixels first to last of a zero-padded image to x."""
    from_channels_last(image, first, last, size, channels, x, strides, buffer)


@helper
def _copy(copy, of_x, one, params, counter, slot):
    """Copy between x, of elements of the type of `of_x`, and zero-padded channels-last images, by `copy`. A task is a
    block of pixels of one image."""
    a = unpack(params, ImagesCall)
    x, buffer, bounds = a.plain, pointer(a.workspaces + slot * a.workspace_bytes, one), pointer(a.bounds, np.int64(0))
    pixels = a.size[0] * a.size[1]
    stretches = (pixels + a.pixels - 1) // a.pixels
    while True:
        task = next_task(counter)
        if task >= a.batch * stretches:
            return
        n, first = task // stretches, task % stretches * a.pixels
        last = min(first + a.pixels, pixels)
        for block_ in range(a.blocks):
            channel, channel_end = load_scalar(bounds, block_), load_scalar(bounds, block_ + 1)
            image = at(pointer(a.images, one), n * a.image_size + channel * padded_pixels(a.size))
            planes = at(pointer(x.address, of_x), n * x.strides[0] + channel * x.strides[1])
            copy(image, planes, x.strides[1:], first, last, a.size, channel_end - channel, one - one, buffer)


@kernel
def pack_images(one, params, counter, slot):
    """Copy x to images of its type."""
    _copy(_fill_image, one, one, params, counter, slot)


@kernel
def pack_float16(one, params, counter, slot):
    """Copy x in float16 to images."""
    _copy(_fill_image, np.uint16(0), one, params, counter, slot)


@kernel
def pack_bfloat16(one, params, counter, slot):
    """Copy x in bfloat16 to images."""
    _copy(_fill_image, np.int16(0), one, params, counter, slot)


@kernel
def pack_pairs(one, params, counter, slot):
    """Copy x in bfloat16 to images of pairs of neighbouring channels, in a single block."""
    _copy(_fill_pairs, np.int16(0), one, params, counter, slot)


@kernel
def unpack_images(one, params, counter, slot):
    """Copy the gradients of images to x of their type."""
    _copy(_read_image, one, one, params, counter, slot)


@kernel
def unpack_float16(one, params, counter, slot):
    """Copy the gradients of images to x in float16."""
    _copy(_read_image, np.uint16(0), one, params, counter, slot)


@kernel
def unpack_bfloat16(one, params, counter, slot):
    """Copy the gradients of images to x in bfloat16."""
    _copy(_read_image, np.int16(0), one, params, counter, slot)


class ClearCall(NamedTuple):
    """Parameters of `clear`."""

    address: int
    size: int  # elements


@kernel
def clear(one, params, counter, slot):
    """Zero elements. A task is a contiguous range of them."""
    a, stretch = unpack(params, ClearCall), 1 << 16
    while True:
        task = next_task(counter)
        if task >= (a.size + stretch - 1) // stretch:
            return
        fill(pointer(a.address, one), task * stretch, min(stretch, a.size - task * stretch), one - one)


def copied_pixels(channels: int) -> int:
    """The number of pixels that a task copies: whole stretches of `layout`'s loops."""
    return min(max(COPY_ELEMENTS // max(channels, 1) // 64, 1), 16) * 64


class PaddedImages:
    """Blocked images in scratch memory, in float32 for arrays of a half type. `bounds` holds the first channel of each
    block, then the number of channels; `launch` runs the kernels, or records that."""

    def __init__(
        self,
        address: int,
        image_size: int,
        bounds: Numbers,
        workspaces: int,
        workspace_bytes: int,
        threads: int,
        launch: Callable[[Any, Any, Any, int], None] = launch,
    ) -> None:
        self.address, self.image_size, self.bounds = address, image_size, bounds
        self.workspaces, self.workspace_bytes, self.threads = workspaces, workspace_bytes, threads
        self.launch = launch

    def _call(self, plain: np.ndarray | Outline) -> ImagesCall:
        """Parameters of a copy from or to `plain` (N, C, H, W)."""
        batch, _, height, width = plain.shape
        blocks = len(self.bounds) - 1
        return ImagesCall(
            batch, (height, width), self.image_size, place(plain), self.address, self.bounds.address, blocks,
            copied_pixels(plain.shape[1]), self.workspaces, self.workspace_bytes,
        )  # fmt: skip

    def _threads(self, plain: np.ndarray | Outline) -> int:
        """The number of threads for a copy from or to `plain`: no more than it has tasks."""
        batch, channels, height, width = plain.shape
        return min(self.threads, batch * -(-height * width // copied_pixels(channels)))

    def pack(self, x: np.ndarray | Outline) -> None:
        """Copy x (N, C, H, W) into these images."""
        kernel = suited(x.dtype, pack_images, pack_float16, pack_bfloat16)
        self.launch(kernel, computed(x.dtype).type(1), self._call(x), self._threads(x))

    def pack_pairs(self, x: np.ndarray | Outline) -> None:
        """Copy x in bfloat16 into these images, whose channels are pairs."""
        self.launch(pack_pairs, np.float32(1), self._call(x), self._threads(x))

    def unpack(self, x: np.ndarray) -> None:
        """Copy these images to x."""
        kernel = suited(x.dtype, unpack_images, unpack_float16, unpack_bfloat16)
        self.launch(kernel, computed(x.dtype).type(1), self._call(x), self._threads(x))

    def clear(self, batch: int, dtype: np.dtype) -> None:
        """Fill the images with zeros."""
        self.launch(clear, dtype.type(1), ClearCall(self.address, batch * self.image_size), self.threads)


def suited(dtype: np.dtype, plain: Any, of_float16: Any, of_bfloat16: Any) -> Any:
    """The kernel for arrays of a type."""
    if not is_half(dtype):
        return plain
    return of_float16 if dtype == np.float16 else of_bfloat16
