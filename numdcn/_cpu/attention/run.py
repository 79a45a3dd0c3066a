"""Weighted samples of NumPy arrays: copies, tables, scratch memory and threads around the kernels. Options have no
effect here."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import numpy as np

from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.options import Options
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import addressable_arrays, is_addressable, output, place
from numdcn._cpu.attention.forward import ForwardCall, Sizes, forward_queries
from numdcn._cpu.attention.plan import CORNER_ROWS, PLAN_ROWS, PointsPlace, Table
from numdcn._cpu.attention.points import PointsCall, point_gradients
from numdcn._cpu.attention.spread import POINTS, Bands, SpreadCall, find_rows, spread
from numdcn._cpu.parameters import Numbers
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.threads import launch, plan_threads

TILE = 64  # queries per task, at most
TILES = 64  # per image, at least, if there are as many queries
BAND_BYTES = 256 * 1024  # of the sums of a band, at most, if it has more than two rows
READS = 24.0  # cost of a sample of a channel, in multiply-adds of a product


def forward(p: Attention, arrays: AttentionArrays, y: np.ndarray, options: Options) -> None:
    """Fill y."""
    arrays = addressable_arrays(arrays)
    value = _dense(arrays.value)
    sizes = _sizes(p, y.dtype)
    table, keep = _table(p, y.dtype, *_steps(value))
    threads = plan_threads(sizes.batch * sizes.tiles, READS * y.size * p.points)
    with output(y, _is_dense) as target, Scratch(threads * sizes.workspace_bytes) as (workspaces,):
        call = ForwardCall(
            sizes, table, place(value), points_place(arrays.points), place(arrays.weights), place(target), workspaces
        )
        launch(forward_queries, y.dtype.type(1), call, threads)
    del keep


def backward(
    p: Attention, grad_y: np.ndarray, arrays: AttentionArrays, grads: AttentionArrays, options: Options
) -> None:
    """Fill the gradients in `grads`."""
    arrays, grad_y = addressable_arrays(arrays), _dense(grad_y)
    with ExitStack() as stack:
        targets = [None if g is None else stack.enter_context(output(g, _is_dense)) for g in grads[:1]]
        targets += [None if g is None else stack.enter_context(output(g)) for g in grads[1:]]
        if targets[1] is not None or targets[2] is not None:
            _point_gradients(p, grad_y, arrays, targets[1], targets[2])
        if targets[0] is not None:
            _spread(p, grad_y, arrays, targets[0])


def _point_gradients(
    p: Attention,
    grad_y: np.ndarray,
    arrays: AttentionArrays,
    grad_points: np.ndarray | None,
    grad_weights: np.ndarray | None,
) -> None:
    """Fill the gradients of points and weights."""
    value = _dense(arrays.value)
    sizes = _sizes(p, value.dtype)
    table, keep = _table(p, value.dtype, *_steps(value))
    threads = plan_threads(sizes.batch * sizes.tiles, 2 * READS * grad_y.size * p.points)
    with Scratch(threads * sizes.workspace_bytes) as (workspaces,):
        call = PointsCall(
            sizes, table, place(value), points_place(arrays.points), place(arrays.weights), place(grad_y),
            points_place(grad_points), place(grad_weights), workspaces,
        )  # fmt: skip
        launch(point_gradients, value.dtype.type(1), call, threads)
    del keep


def _spread(p: Attention, grad_y: np.ndarray, arrays: AttentionArrays, grad_value: np.ndarray) -> None:
    """Fill the gradient of value."""
    dtype = grad_y.dtype
    sizes, (bands, band_bytes, keep) = _sizes(p, dtype), _bands(p, dtype)
    table, also = _table(p, dtype, *_steps(grad_value))
    workspace = max(sizes.workspace_bytes, -(-band_bytes // 4096) * 4096)
    reach_bytes = sizes.batch * sizes.tiles * p.heads * bands.levels * 16
    tasks = sizes.batch * p.heads * bands.bands
    threads = plan_threads(max(tasks, sizes.batch * sizes.tiles), 2 * READS * grad_y.size * p.points)
    with Scratch(reach_bytes, threads * workspace) as (reach, workspaces):
        call = SpreadCall(
            sizes, bands, table, points_place(arrays.points), place(arrays.weights), place(grad_y), place(grad_value),
            reach, workspaces, workspace,
        )  # fmt: skip
        one = dtype.type(1)
        launch(find_rows, one, call, min(threads, sizes.batch * sizes.tiles))
        launch(spread, one, call, min(threads, tasks))
    del keep, also


@functools.lru_cache(64)
def _bands(p: Attention, dtype: np.dtype) -> tuple[Bands, int, Any]:
    """The bands of the levels, the bytes of a workspace, and what keeps their tables' memory."""
    wide = 64 // dtype.itemsize
    padded = -(-p.channels // wide) * wide
    wanted = -(-TILES // (p.batch * p.heads * len(p.levels)))
    level_rows, band_rows, most, point = [], [], 0, 0
    for number, level in enumerate(p.levels):
        row_bytes = (level.width + 2) * padded * dtype.itemsize
        count = max(-(-level.height * row_bytes // BAND_BYTES), wanted)
        rows = max(2, -(-level.height // count))
        for first in range(0, level.height, rows):
            band_rows += [number, first, min(first + rows, level.height)]
        most = max(most, (min(rows, level.height) + 2) * row_bytes)
        level_rows += [level.height, level.width, level.start, point, level.points]
        point += level.points
    longest = max(level.points for level in p.levels)
    chunk = max(1, POINTS // longest)
    pitch = chunk * longest + OVERRUN
    kept = Numbers(level_rows), Numbers(band_rows)
    bands = Bands(len(p.levels), len(band_rows) // 3, kept[0].address, kept[1].address, chunk, pitch, padded)
    return bands, pitch * (16 + PLAN_ROWS * dtype.itemsize) + most + 128, kept


def _is_dense(array: np.ndarray) -> bool:
    """Whether the channels of a pixel are adjacent, and elements where kernels can address them."""
    return is_addressable(array) and (array.shape[-1] == 1 or array.strides[-1] == array.itemsize)


def _dense(array: np.ndarray) -> np.ndarray:
    """The array, or a copy whose channels are adjacent."""
    return array if _is_dense(array) else np.ascontiguousarray(array)


def _steps(value: np.ndarray) -> tuple[int, int]:
    """Elements from pixel to pixel and from head to head."""
    return value.strides[1] // value.itemsize, value.strides[2] // value.itemsize


def points_place(points: np.ndarray | None) -> PointsPlace:
    """The place of points (B, Q, M, T, 2); address 0 if there are none."""
    if points is None:
        return PointsPlace(0, (0, 0, 0, 0, 0))
    a, b, c, d, e = (s // points.itemsize for s in points.strides)
    return PointsPlace(points.ctypes.data, (a, b, c, d, e))


@functools.lru_cache(256)
def _sizes(p: Attention, dtype: np.dtype) -> Sizes:
    """The sizes of a call."""
    size, tile = dtype.itemsize, min(TILE, max(1, p.queries // TILES))
    plan_bytes = -(-_pitch(p) * (CORNER_ROWS * 8 + PLAN_ROWS * size) // 64) * 64
    workspace = -(-(plan_bytes + (p.channels + OVERRUN) * size) // 4096) * 4096
    twice = [round(2 * origin) for origin in p.grid.origin]
    return Sizes(
        p.batch, p.queries, p.heads, p.channels, p.points, p.grid.columns, p.grid.stride, (twice[0], twice[1]), tile,
        -(-p.queries // tile), size, plan_bytes, workspace,
    )  # fmt: skip


def _pitch(p: Attention) -> int:
    """Elements per row of a plan or table."""
    return -(-p.heads * p.points // OVERRUN) * OVERRUN + OVERRUN


@functools.lru_cache(64)
def _table(p: Attention, dtype: np.dtype, pixel_stride: int, head_stride: int) -> tuple[Table, Any]:
    """The table of points of a query, and what keeps its memory."""
    pitch, count = _pitch(p), p.heads * p.points
    floats, numbers = np.zeros((6, pitch), dtype), np.zeros((3, pitch), np.int64)
    taps, scales = (np.tile(np.array(rows, dtype).T, p.heads) for rows in (p.grid.taps, p.grid.scales))
    levels = [level for level in p.levels for _ in range(level.points)] * p.heads
    floats[:2, :count], floats[2:4, :count] = taps, scales
    floats[4, :count] = numbers[2, :count] = [level.height for level in levels]
    floats[5, :count] = numbers[0, :count] = [level.width for level in levels]
    heads = np.repeat(np.arange(p.heads), p.points) * head_stride
    numbers[1, :count] = heads + np.array([level.start for level in levels]) * pixel_stride
    return Table(floats.ctypes.data, numbers.ctypes.data, pitch, pixel_stride), (floats, numbers)
