"""Sampling NumPy arrays at points: copies, scratch memory and threads around the kernels. Options have no effect
here."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from numdcn._call.options import Options
from numdcn._call.points import PointArrays, Sampling
from numdcn._cpu.arrays import Outline, addressable, addressable_arrays, output, output_as, outputs, place
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
from numdcn._cpu.points_blocking import PointsBlocking, backward_panel, forward_panel, points_blocking
from numdcn._cpu.program import Recording, run_recorded
from numdcn._cpu.threads import plan_threads

SAMPLING = 80.0  # what a sample of a channel costs, in multiply-adds of a product; half of what was measured forward


def takes_half_images(p: Sampling) -> bool:
    """Whether x and its gradient may be of a half type."""
    return True


def forward(p: Sampling, arrays: PointArrays, y: np.ndarray, options: Options) -> None:
    """Fill y."""
    x, points = addressable_arrays(arrays)
    with output(y) as whole, output_as(whole, p.batch, p.channels, 1, p.points) as target:
        run_recorded(_forward, p, x, points.reshape(p.batch, p.points, 2), target)


def _forward(recording: Recording, p: Sampling, x: Outline, points: Outline, y: Outline) -> None:
    """Record what fills y."""
    dtype = y.dtype
    blocking = points_blocking(p.points, p.channels, p.size, forward_panel(p.channels, dtype), dtype.itemsize, 0)
    threads = plan_threads(p.batch * blocking.tiling.tiles, SAMPLING * y.size)
    images, workspaces = recording.scratch(
        _images_bytes(p, blocking, dtype.itemsize), threads * blocking.workspace_bytes
    )
    _pack(recording, p, x, blocking, images, workspaces, threads)
    call = PointsCall(
        p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(y), NOWHERE, images, 0, workspaces
    )  # fmt: skip
    recording.launch(forward_tiles, dtype.type(1), call, threads)


def _images_bytes(p: Sampling, blocking: PointsBlocking, itemsize: int) -> int:
    return p.batch * blocking.image_size * itemsize + 64  # vectors may overrun


def _pack(
    recording: Recording,
    p: Sampling,
    x: Outline,
    blocking: PointsBlocking,
    images: int,
    workspaces: int,
    threads: int,
) -> None:
    """Record the copy of x to zero-padded images."""
    bounds = recording.numbers(channel_bounds(p.channels, p.channels).memory)
    room = workspaces, blocking.workspace_bytes
    PaddedImages(images, blocking.image_size, bounds, *room, threads, recording.launch).pack(x)


def backward(p: Sampling, grad_y: np.ndarray, arrays: PointArrays, grads: PointArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    x, points = addressable_arrays(arrays)
    flat, points = addressable(grad_y).reshape(p.batch, p.channels, 1, p.points), points.reshape(p.batch, p.points, 2)
    with outputs(grads) as targets, ExitStack() as stack:
        moved = targets.points
        if moved is not None:
            moved = stack.enter_context(output_as(moved, p.batch, p.points, 2))
        run_recorded(_backward, p, flat, x, points, targets.x, moved)


def _backward(
    recording: Recording,
    p: Sampling,
    grad_y: Outline,
    x: Outline,
    points: Outline,
    grad_x: Outline | None,
    grad_points: Outline | None,
) -> None:
    """Record what fills the gradients."""
    one = grad_y.dtype.type(1)
    blocking = points_blocking(p.points, p.channels, p.size, forward_panel(p.channels, one.dtype), one.itemsize, 0)
    tiles = p.batch * blocking.tiling.tiles
    bands = bands_of(p.batch, p.channels, p.size, backward_panel(p.channels, one.dtype), one.itemsize)
    spreading = spread_blocking(blocking.tiling, bands, one.itemsize)
    threads = plan_threads(tiles, SAMPLING * grad_y.size) if grad_points is not None else 0
    band_threads = plan_threads(p.batch * bands.count * bands.blocks, SAMPLING * grad_y.size)
    spans, images, workspaces = recording.scratch(
        tiles * SPAN * 8,
        _images_bytes(p, blocking, one.itemsize) if threads else 0,
        max(threads * blocking.workspace_bytes, band_threads * spreading.workspace_bytes if grad_x is not None else 0),
    )
    if grad_points is not None:
        _pack(recording, p, x, blocking, images, workspaces, threads)
        call = PointsCall(
            p.batch, p.channels, p.size, (1, p.points), blocking, place(points), place(grad_y), place(grad_points),
            images, spans, workspaces,
        )  # fmt: skip
        recording.launch(point_gradients, one, call, threads)
    if grad_x is not None:
        spread_call = SpreadCall(
            p.batch, p.channels, p.size, (1, p.points), spreading, place(points), place(grad_y), place(grad_x), spans,
            workspaces,
        )  # fmt: skip
        if grad_points is None:  # which notes the spans of tiles, too
            recording.launch(survey_points, one, spread_call, max(1, min(band_threads, -(-tiles // TILES))))
        kernel = suited(grad_x.dtype, spread_points, spread_float16, spread_bfloat16)
        recording.launch(kernel, one, spread_call, band_threads)
