"""Weighted samples of NumPy arrays: copies, tables, scratch memory and threads around the kernels. Options have no
effect here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.options import Options
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import addressable_arrays, is_addressable, output, place
from numdcn._cpu.attention.forward import ForwardCall, Sizes, forward_queries
from numdcn._cpu.attention.plan import CORNER_ROWS, PLAN_ROWS, PointsPlace, Table
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.threads import launch, plan_threads

TILE = 64  # queries per task, at most
TILES = 64  # per image, at least, if there are as many queries
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


def _is_dense(array: np.ndarray) -> bool:
    """Whether the channels of a pixel are adjacent, and elements where kernels can address them."""
    return is_addressable(array) and (array.shape[-1] == 1 or array.strides[-1] == array.itemsize)


def _dense(array: np.ndarray) -> np.ndarray:
    """The array, or a copy whose channels are adjacent."""
    return array if _is_dense(array) else np.ascontiguousarray(array)


def _steps(value: np.ndarray) -> tuple[int, int]:
    """Elements from pixel to pixel and from head to head."""
    return value.strides[1] // value.itemsize, value.strides[2] // value.itemsize


def points_place(points: np.ndarray) -> PointsPlace:
    """The place of points (B, Q, M, T, 2)."""
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
