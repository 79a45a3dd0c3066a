"""Weighted samples of NumPy arrays: copies, tables, scratch memory and threads around the kernels. Options have no
effect here."""

from __future__ import annotations

import functools
import itertools
from contextlib import ExitStack
from typing import Any

import numpy as np

from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.options import Options
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import addressable_arrays, is_addressable, output, place
from numdcn._cpu.attention.forward import ForwardCall, Sizes, forward_queries
from numdcn._cpu.attention.plan import CORNER_ROWS, PLAN_ROWS, Notes, PointsPlace, Table
from numdcn._cpu.attention.points import PointsCall, point_gradients
from numdcn._cpu.attention.spread import NUMBER_ROWS, POINTS, Bands, SpreadCall, note_points, spread
from numdcn._cpu.parameters import Numbers
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.threads import launch, plan_threads

TILE = 64  # queries per task, at most
SMALL_TILE = 4  # queries per task, at least
TILES = 64  # per image, at least, if there are enough queries
BAND_BYTES = 256 * 1024  # of the sums of a band, at most, if it has more than two rows
BAND_POINTS = 1024  # that a call has for each band, at least, if bands are to share the work alone
READS = 24.0  # cost of a sample of a channel, in multiply-adds of a product


def forward(p: Attention, arrays: AttentionArrays, y: np.ndarray, options: Options) -> None:
    """Fill y."""
    arrays = addressable_arrays(arrays)
    value = _dense(arrays.value)
    sizes = _sizes(p, y.dtype)
    table, keep = _table(p, y.dtype, *_steps(value))
    threads = plan_threads(sizes.batch * sizes.tiles, READS * y.size * sizes.points)
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
    sizes, (notes, kept) = _sizes(p, grad_y.dtype), _notes(p)
    by_points, by_value = grads.points is not None or grads.weights is not None, grads.value is not None
    rows_bytes = sizes.batch * sizes.tiles * p.heads * notes.levels * 16 if by_value else 0
    points_bytes = 3 * notes.count * sizes.one_bytes if by_value else 0
    threads = plan_threads(sizes.batch * sizes.tiles, 2 * READS * grad_y.size * sizes.points)
    workspaces_bytes = threads * sizes.workspace_bytes
    with Scratch(rows_bytes, points_bytes, workspaces_bytes) as (rows, points, workspaces), ExitStack() as stack:
        targets: list[Any] = [None if g is None else stack.enter_context(output(g, _is_dense)) for g in grads]
        notes = notes._replace(rows=rows if by_value else 0, points=points)
        if by_points:
            value = _dense(arrays.value)
            table, also = _table(p, value.dtype, *_steps(value))
            call = PointsCall(
                sizes, notes, table, place(value), points_place(arrays.points), place(arrays.weights), place(grad_y),
                points_place(targets[1]), place(targets[2]), workspaces,
            )  # fmt: skip
            launch(point_gradients, value.dtype.type(1), call, threads)
            del also
        if by_value:
            _spread(p, grad_y, arrays, targets[0], notes, noted=by_points)
    del kept


def _spread(
    p: Attention, grad_y: np.ndarray, arrays: AttentionArrays, grad_value: np.ndarray, notes: Notes, noted: bool
) -> None:
    """Fill the gradient of value. `noted`: whether the points were noted."""
    dtype, one = grad_y.dtype, grad_y.dtype.type(1)
    sizes, (bands, band_bytes, kept) = _sizes(p, dtype), _bands(p, dtype)
    table, also = _table(p, dtype, *_steps(grad_value))
    workspace = max(sizes.workspace_bytes, -(-band_bytes // 4096) * 4096)
    tiles, tasks = sizes.batch * sizes.tiles, sizes.batch * p.heads * bands.bands
    threads = plan_threads(max(tasks, tiles), 2 * READS * grad_y.size * sizes.points)
    with Scratch(threads * workspace) as (workspaces,):
        call = SpreadCall(
            sizes, bands, notes, table, points_place(arrays.points), place(arrays.weights), place(grad_y),
            place(grad_value), workspaces, workspace,
        )  # fmt: skip
        if not noted:
            launch(note_points, one, call, min(threads, tiles))
        launch(spread, one, call, min(threads, tasks))
    del kept, also


@functools.lru_cache(64)
def _notes(p: Attention) -> tuple[Notes, Numbers]:
    """The levels, with no place for notes yet, and what keeps their table's memory."""
    rows, point = [], 0
    for level in p.levels:
        rows += [level.height, level.width, level.start, point, level.points]
        point += level.points
    kept = Numbers(rows)
    return Notes(len(p.levels), kept.address, 0, 0, p.batch * p.queries * p.heads * p.points), kept


@functools.lru_cache(64)
def _bands(p: Attention, dtype: np.dtype) -> tuple[Bands, int, Any]:
    """The bands of the levels, the bytes of a workspace, and what keeps their tables' memory."""
    wide = 64 // dtype.itemsize
    padded = -(-p.channels // wide) * wide
    owners = p.batch * p.heads * len(p.levels)
    wanted = -(-min(TILES, p.batch * p.queries * p.heads * p.points // BAND_POINTS) // owners)
    band_rows, most = [], 0
    for number, level in enumerate(p.levels):
        row_bytes = (level.width + 2) * padded * dtype.itemsize
        count = max(-(-level.height * row_bytes // BAND_BYTES), wanted)
        count = min(count, max(1, level.height // 2))
        cuts = [level.height * i // count for i in range(count + 1)]
        for first, end in itertools.pairwise(cuts):
            band_rows += [number, first, end]
            most = max(most, (end - first + 2) * row_bytes)
    longest = max(level.points for level in p.levels)
    chunk = max(1, POINTS // longest)
    pitch = -(-chunk * longest // OVERRUN) * OVERRUN + OVERRUN  # a multiple, so that pixels begin at cache lines
    kept = Numbers(band_rows)
    bands = Bands(len(kept) // 3, kept.address, chunk, pitch, padded)
    chunk_bytes = pitch * (NUMBER_ROWS * 8 + 4 * dtype.itemsize) + chunk * padded * dtype.itemsize
    return bands, chunk_bytes + most + 128, kept


def _is_dense(array: np.ndarray) -> bool:
    """Whether the channels of a pixel are adjacent, and elements where kernels can address them."""
    return is_addressable(array) and (array.shape[-1] == 1 or array.strides[-1] == array.itemsize)


def _dense(array: np.ndarray) -> np.ndarray:
    """The array, or a copy whose channels are adjacent."""
    return array if _is_dense(array) else np.array(array, order="C")


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
    size, tile = dtype.itemsize, min(TILE, max(SMALL_TILE, p.queries // TILES))
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
