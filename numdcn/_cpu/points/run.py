"""Sampling NumPy arrays at points: copies, scratch memory and threads around the kernels. Options have no effect
here."""

from __future__ import annotations

import numpy as np

from numdcn._call.options import Options
from numdcn._call.points import PointArrays, Sampling
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import addressable, addressable_arrays, output, output_as, outputs, place
from numdcn._cpu.images import PaddedImages
from numdcn._cpu.parameters import NOWHERE, channel_bounds
from numdcn._cpu.points.kernels import PointsCall, backward_blocks, forward_tiles
from numdcn._cpu.points_blocking import backward_panel, forward_panel, points_blocking
from numdcn._cpu.threads import launch, plan_threads

SAMPLING = 80.0  # what a sample of a channel costs, in multiply-adds of a product; half of what was measured forward


def takes_half_images(p: Sampling) -> bool:
    """Whether x and its gradient may be of a half type."""
    return True


def forward(p: Sampling, arrays: PointArrays, y: np.ndarray, options: Options) -> None:
    """Fill y."""
    with output(y) as target:
        _forward(p, addressable_arrays(arrays), target)


def _forward(p: Sampling, arrays: PointArrays, y: np.ndarray) -> None:
    """Fill y; all arrays are addressable."""
    x, dtype = arrays.x, y.dtype
    points = arrays.points.reshape(p.batch, p.points, 2)
    blocking = points_blocking(p.points, p.channels, p.size, forward_panel(p.channels, dtype), dtype.itemsize, 0)
    threads = plan_threads(p.batch * blocking.tiling.tiles, SAMPLING * y.size)
    bounds = channel_bounds(p.channels, p.channels)
    images_bytes = p.batch * blocking.image_size * dtype.itemsize + 64  # vectors may overrun
    shape = (p.batch, p.channels, 1, p.points)
    with (
        output_as(y, *shape) as flat,
        Scratch(images_bytes, threads * blocking.workspace_bytes) as (images, workspaces),
    ):
        PaddedImages(images, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads).pack(x)
        call = PointsCall(
            p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(flat), NOWHERE, images, 0,
            workspaces,
        )  # fmt: skip
        launch(forward_tiles, dtype.type(1), call, threads)


def backward(p: Sampling, grad_y: np.ndarray, arrays: PointArrays, grads: PointArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    with outputs(grads) as targets:
        _backward(p, addressable(grad_y), addressable_arrays(arrays), targets)


def _backward(p: Sampling, grad_y: np.ndarray, arrays: PointArrays, grads: PointArrays) -> None:
    """Fill the gradients; all arrays are addressable."""
    x, dtype = arrays.x, grad_y.dtype
    panel = backward_panel(p.channels, dtype)
    blocking = points_blocking(p.points, p.channels, p.size, panel, dtype.itemsize, 0)
    tasks, images_bytes = p.batch * blocking.blocks, p.batch * blocking.image_size * dtype.itemsize
    threads = plan_threads(tasks, SAMPLING * grad_y.size)
    bounds = channel_bounds(p.channels, blocking.panel)
    shape = (blocking.blocks, p.batch, p.points, 2)
    partials = np.empty(shape, dtype) if grads.points is not None else None
    flat = grad_y.reshape(p.batch, p.channels, 1, p.points)
    points = arrays.points.reshape(p.batch, p.points, 2)
    with Scratch(
        images_bytes, images_bytes if grads.x is not None else 0, threads * blocking.workspace_bytes
    ) as memory:
        address, grad_address, workspaces = memory
        images, grad_images = (
            PaddedImages(where, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads)
            for where in (address, grad_address)
        )
        images.pack(x)
        if grads.x is not None:
            grad_images.clear(p.batch, dtype)
        call = PointsCall(
            p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(flat), place(partials),
            address, grad_address if grads.x is not None else 0, workspaces,
        )  # fmt: skip
        launch(backward_blocks, dtype.type(1), call, threads)
        if grads.x is not None:
            grad_images.unpack(grads.x)
    if partials is not None:
        with np.errstate(all="ignore"):
            grads.points[...] = np.add.reduce(partials, axis=0).reshape(grads.points.shape)
