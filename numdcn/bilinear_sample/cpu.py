"""Bilinear sampling on NumPy arrays: forward and backward.

x is copied to channels-last with a rim of zeros; then, tile by tile of points: plan (cells and weights), sample along
the channels, turn the tile into y. The backward does so for a block of channels, which a task owns: the gradient of the
samples is added to the image's gradient and yields that of the points, of which each block has a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import NOWHERE, place, reshaped
from numdcn._host.images_cpu import RimmedImages
from numdcn._host.options import Options
from numdcn._host.scratch import Scratch
from numdcn._host.threads import launch, plan_threads
from numdcn._kernels.columns_cpu import pack_gradient, write_tile
from numdcn._kernels.jit_cpu import helper, kernel
from numdcn._kernels.layout_cpu import rimmed_pixels
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.points_cpu import PointsCut, backward_panel, forward_panel, points_cut
from numdcn._kernels.sample_cpu import (
    GRAD_X,
    GRAD_Y,
    OFFSET_X,
    OFFSET_Y,
    ROW,
    place_tile,
    plan_tap,
    read_plane,
    sample_tap,
    sample_tap_backward,
    tile_at,
    write_plane,
)
from numdcn._kernels.simd_cpu import at, next_task, pointer
from numdcn.bilinear_sample.problem import Problem


class Call(NamedTuple):
    """Parameters of the kernels."""

    batch: int
    channels: int
    size: tuple[int, int]
    points_size: tuple[int, int]  # as an image of one row
    cut: PointsCut
    points: Place
    bias: Place  # there is none
    y: Place  # in the backward: its gradient
    grad_points: Place
    images: int
    grad_images: int
    slots: int


@helper
def _place_points(one, a, n, number, tile):  # type: ignore[no-untyped-def]
    """Fill in the points of a tile, from base positions that are 0; returns its numbers of runs and of points."""
    runs, pixels = place_tile(tile, a.cut, number, a.points_size, (0, 0), (0, 0))
    strides = a.points.strides
    points = at(pointer(a.points.address, one), n * strides[0])
    read_plane(points, (0, strides[1]), 0, tile, runs, at(tile.rows, OFFSET_Y))
    read_plane(at(points, strides[2]), (0, strides[1]), 0, tile, runs, at(tile.rows, OFFSET_X))
    return runs, pixels


@kernel
def forward_tiles(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y, tile by tile. A task is a tile of the points of an image."""
    a = unpack(params, Call)
    cut = a.cut
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    samples = pointer(base + cut.tile_bytes, one)
    buffer = at(samples, cut.rows * cut.pitch)
    while True:
        task = next_task(counter)
        if task >= a.batch * cut.tiles:
            return
        n = task // cut.tiles
        runs, pixels = _place_points(one, a, n, task % cut.tiles, tile)
        plan_tap(tile, pixels, (0, 0), a.size, a.channels)
        image, below = at(pointer(a.images, one), n * cut.image_size), (a.size[1] + 1) * a.channels
        for c in range(0, a.channels, cut.panel):
            count = min(cut.panel, a.channels - c)
            whole = (count + 3) // 4 * 4 if count > 1 else 1  # faster, and what runs over is never read
            sample_tap(at(image, c), tile, pixels, whole, a.channels, below, samples, cut.pitch)
            write_tile(one, a, n, c, count, tile, runs, pixels, samples, cut.pitch, buffer, False)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y. All arrays are addressable and checked."""
    x, dtype = arrays["x"], y.dtype
    points = arrays["points"].reshape(p.batch, p.points, 2)
    cut = points_cut(p.points, p.channels, p.size, forward_panel(p.channels, dtype), dtype.itemsize, 0)
    threads = plan_threads(p.batch * cut.tiles, 8.0 * y.size)
    bounds = np.array((0, p.channels), np.int64)
    images_bytes = p.batch * cut.image_size * dtype.itemsize + 64  # vectors may run over
    shape = (p.batch, p.channels, 1, p.points)
    with reshaped(y, *shape) as flat, Scratch(images_bytes, threads * cut.slot_bytes) as (images, slots):
        RimmedImages(images, cut.image_size, bounds, slots, cut.slot_bytes, threads).pack(x)
        call = Call(
            p.batch, p.channels, p.size, (1, p.points), cut, place(points), NOWHERE, place(flat), NOWHERE, images, 0, slots
        )  # fmt: skip
        launch(forward_tiles, dtype.type(1), call, threads)


@kernel
def backward_blocks(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """The gradients. A task is a block of channels of an image."""
    a = unpack(params, Call)
    cut = a.cut
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    lines = pointer(base + cut.tile_bytes, one)
    buffer, samples = at(lines, 16 * ROW), at(lines, 16 * ROW + 256)
    while True:
        task = next_task(counter)
        if task >= a.batch * cut.blocks:
            return
        n, block_ = task // cut.blocks, task % cut.blocks
        first = block_ * cut.panel
        count = min(cut.panel, a.channels - first)
        start, below = n * cut.image_size + first * rimmed_pixels(a.size), (a.size[1] + 1) * count
        image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
        strides = a.grad_points.strides
        grad_points = at(pointer(a.grad_points.address, one), block_ * strides[0] + n * strides[1])
        for number in range(cut.tiles):
            runs, pixels = _place_points(one, a, n, number, tile)
            plan_tap(tile, pixels, (0, 0), a.size, count)
            pack_gradient(
                one, a.y, n, first, count, cut, (False, True), tile, runs, pixels, lines, samples, samples, buffer
            )
            sample_tap_backward(
                image, grad_image, a.grad_images != 0, tile, pixels, count, count, below, samples, cut.panel
            )
            if a.grad_points.address:
                write_plane(grad_points, (0, 2), tile, runs, at(tile.rows, GRAD_Y))
                write_plane(at(grad_points, 1), (0, 2), tile, runs, at(tile.rows, GRAD_X))


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    x, dtype = arrays["x"], grad_y.dtype
    panel = backward_panel(p.channels, dtype)
    cut = points_cut(p.points, p.channels, p.size, panel, dtype.itemsize, 0)
    tasks, images_bytes = p.batch * cut.blocks, p.batch * cut.image_size * dtype.itemsize
    threads = plan_threads(tasks, 20.0 * grad_y.size)
    bounds = np.array([*range(0, p.channels, cut.panel), p.channels], np.int64)
    parts_size = tasks * p.points * 2 if "points" in grads else 0
    parts = np.empty((cut.blocks, p.batch, p.points, 2), dtype) if parts_size else None
    flat = grad_y.reshape(p.batch, p.channels, 1, p.points)
    points = arrays["points"].reshape(p.batch, p.points, 2)
    with Scratch(images_bytes, images_bytes if "x" in grads else 0, threads * cut.slot_bytes) as memory:
        address, grad_address, slots = memory
        images, grad_images = (
            RimmedImages(where, cut.image_size, bounds, slots, cut.slot_bytes, threads)
            for where in (address, grad_address)
        )
        images.pack(x)
        if "x" in grads:
            grad_images.clear(p.batch, dtype)
        call = Call(
            p.batch, p.channels, p.size, (1, p.points), cut, place(points), NOWHERE, place(flat), place(parts),
            address, grad_address if "x" in grads else 0, slots,
        )  # fmt: skip
        launch(backward_blocks, dtype.type(1), call, threads)
        if "x" in grads:
            grad_images.unpack(grads["x"])
    if parts is not None:
        grads["points"][...] = np.add.reduce(parts, axis=0).reshape(grads["points"].shape)
