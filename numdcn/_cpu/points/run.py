"""Sampling NumPy arrays at points: copies, scratch memory and threads around the kernels. Options have no effect
here."""

from __future__ import annotations

import numpy as np

from numdcn._call.options import Options
from numdcn._call.points import PointArrays, Sampling
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import addressable, addressable_arrays, output, output_as, outputs, place
from numdcn._cpu.bands import SPAN, bands_of
from numdcn._cpu.images import PaddedImages, suited
from numdcn._cpu.parameters import NOWHERE, channel_bounds
from numdcn._cpu.points.kernels import PointsCall, forward_tiles, point_gradients
from numdcn._cpu.points.spread import (
    TILES,
    SpreadCall,
    spread_bfloat16,
    spread_blocking,
    spread_float16,
    spread_points,
    survey_points,
)
from numdcn._cpu.points_blocking import backward_panel, forward_panel, points_blocking
from numdcn._cpu.threads import launch, plan_threads
from numdcn._cpu.tile import Tiling

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
    x, one = arrays.x, grad_y.dtype.type(1)
    flat = grad_y.reshape(p.batch, p.channels, 1, p.points)
    points = arrays.points.reshape(p.batch, p.points, 2)
    blocking = points_blocking(p.points, p.channels, p.size, forward_panel(p.channels, one.dtype), one.itemsize, 0)
    tiles = p.batch * blocking.tiling.tiles
    with Scratch(tiles * SPAN * 8) as (spans,):
        if grads.points is not None:
            threads = plan_threads(tiles, SAMPLING * grad_y.size)
            bounds = channel_bounds(p.channels, p.channels)
            images_bytes = p.batch * blocking.image_size * one.itemsize + 64  # vectors may overrun
            shape = (p.batch, p.points, 2)
            with (
                output_as(grads.points, *shape) as target,
                Scratch(images_bytes, threads * blocking.workspace_bytes) as (images, workspaces),
            ):
                PaddedImages(images, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads).pack(x)
                call = PointsCall(
                    p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(flat), place(target),
                    images, spans, workspaces,
                )  # fmt: skip
                launch(point_gradients, one, call, threads)
        if grads.x is not None:
            _spread(p, blocking.tiling, points, flat, grads.x, spans, surveyed=grads.points is not None)


def _spread(
    p: Sampling,
    tiling: Tiling,
    points: np.ndarray,
    grad_y: np.ndarray,
    grad_x: np.ndarray,
    spans: int,
    surveyed: bool,
) -> None:
    """Fill grad_x. `surveyed`: whether the spans of tiles were noted."""
    one = grad_y.dtype.type(1)
    bands = bands_of(p.batch, p.channels, p.size, backward_panel(p.channels, one.dtype), one.itemsize)
    blocking = spread_blocking(tiling, bands, one.itemsize)
    threads = plan_threads(p.batch * bands.count * bands.blocks, SAMPLING * grad_y.size)
    with Scratch(threads * blocking.workspace_bytes) as (workspaces,):
        call = SpreadCall(
            p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(grad_y), place(grad_x), spans,
            workspaces,
        )  # fmt: skip
        if not surveyed:
            launch(survey_points, one, call, max(1, min(threads, -(-p.batch * tiling.tiles // TILES))))
        launch(suited(grad_x.dtype, spread_points, spread_float16, spread_bfloat16), one, call, threads)
