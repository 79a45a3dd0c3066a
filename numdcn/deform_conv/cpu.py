"""Deformable convolution on NumPy arrays: forward and backward.

Forward: x is copied to channels-last with a rim of zeros; then, tile by tile of output pixels and chunk by chunk of
columns: plan (cells and weights), sample, multiply by the packed weights; the sums are turned into y.

Backward, for a block of input channels, tile by tile and tap by tap: the gradient of the tap's columns is a product of
grad_y and the weights; in one sweep over the pixels it is added to the image's gradient, yields the gradients of
offsets and mask, and is replaced by the columns themselves, whose product with grad_y is the gradient of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host import convolve_cpu
from numdcn._host.options import Options
from numdcn._kernels.columns_cpu import read_tap, sample_chunk
from numdcn._kernels.convolve_cpu import compute_gradients, compute_tiles
from numdcn._kernels.jit_cpu import helper, kernel
from numdcn._kernels.layout_cpu import rimmed_pixels
from numdcn._kernels.sample_cpu import (
    GRAD_SCALE,
    GRAD_X,
    GRAD_Y,
    plan_tap,
    sample_tap,
    sample_tap_backward,
    write_plane,
)
from numdcn._kernels.simd_cpu import at, load_scalar, pointer
from numdcn.deform_conv.problem import Problem


@kernel
def forward_tiles(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y, tile by tile, from columns that are sampled."""
    compute_tiles(one, params, counter, slot, sample_chunk)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    convolve_cpu.forward(forward_tiles, p, arrays, y)


@helper
def sample_block(one, p, cut, a, n, number, first, count, tap, tile, runs, pixels, columns):  # type: ignore[no-untyped-def]
    """Turn the gradient of a tap's columns, for the channels of a block, into the columns; add to the other gradients."""
    shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
    per_offset_group, below = p.in_channels // p.offset_groups, (p.in_size[1] + 1) * count
    start = n * cut.image_size + first * rimmed_pixels(p.in_size)
    image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
    firsts = pointer(a.firsts, np.int64(0))
    for g in range(first // per_offset_group, (first + count - 1) // per_offset_group + 1):
        channel, part = g * p.taps + tap, number - load_scalar(firsts, 2 * g)
        read_tap(one, p, a.offsets, a.mask, n, channel, tile, runs)
        plan_tap(tile, pixels, shift, p.in_size, count)
        c = max(first, g * per_offset_group) - first
        c_end = min(first + count, (g + 1) * per_offset_group) - first
        target = at(columns, c)
        if not a.weights:
            sample_tap(at(image, c), tile, pixels, c_end - c, count, below, target, cut.block)
            continue
        sample_tap_backward(
            at(image, c), at(grad_image, c), a.grad_images != 0, tile, pixels, c_end - c, count, below, target, cut.block,
        )  # fmt: skip
        if a.grad_offsets.address:
            strides = a.grad_offsets.strides
            plane = at(
                pointer(a.grad_offsets.address, one), part * strides[0] + n * strides[1] + 2 * channel * strides[2]
            )
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_Y))
            write_plane(at(plane, strides[2]), strides[3:], tile, runs, at(tile.rows, GRAD_X))
        if a.grad_mask.address:
            strides = a.grad_mask.strides
            plane = at(pointer(a.grad_mask.address, one), part * strides[0] + n * strides[1] + channel * strides[2])
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_SCALE))


@kernel
def backward_blocks(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """The gradients, block of channels by block of channels."""
    compute_gradients(one, params, counter, slot, sample_block)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    convolve_cpu.backward(backward_blocks, p, grad_y, arrays, grads)
