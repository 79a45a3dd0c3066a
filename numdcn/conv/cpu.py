"""Convolution on NumPy arrays: forward and backward.

The kernels of deformable convolution with nothing to interpolate: a tile's columns are copied from the rimmed
channels-last image instead of sampled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host import convolve_cpu
from numdcn._host.options import Options
from numdcn._kernels.columns_cpu import copy_chunk
from numdcn._kernels.convolve_cpu import compute_gradients, compute_tiles
from numdcn._kernels.jit_cpu import helper, kernel
from numdcn._kernels.layout_cpu import rimmed_pixels
from numdcn._kernels.sample_cpu import copy_tap_backward, plan_tap
from numdcn._kernels.simd_cpu import at, pointer
from numdcn.conv.problem import Problem


@kernel
def forward_tiles(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y, tile by tile, from columns that are copied."""
    compute_tiles(one, params, counter, slot, copy_chunk)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    convolve_cpu.forward(forward_tiles, p, arrays, y)


@helper
def copy_block(one, p, cut, a, n, number, first, count, tap, tile, runs, pixels, columns):  # type: ignore[no-untyped-def]
    """Turn the gradient of a tap's columns, for the channels of a block, into the columns; add it to the image's."""
    shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
    start = n * cut.image_size + first * rimmed_pixels(p.in_size)
    image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
    plan_tap(tile, pixels, shift, p.in_size, count)
    copy_tap_backward(image, grad_image, a.grad_images != 0, tile, pixels, count, columns, cut.block)


@kernel
def backward_blocks(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """The gradients, block of channels by block of channels."""
    compute_gradients(one, params, counter, slot, copy_block)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    convolve_cpu.backward(backward_blocks, p, grad_y, arrays, grads)
