"""Weighted samples of GPU arrays: types, strides, sums of gradients and launches around the kernels."""

from __future__ import annotations

import functools
from typing import Any

from numdcn._call.attention import Attention, AttentionArrays, Level
from numdcn._call.device_array import DTYPES, DeviceArray
from numdcn._call.options import Options
from numdcn._call.results import Output
from numdcn._cuda import jit, replay
from numdcn._cuda.attention.in_order import InOrder, add_in_order
from numdcn._cuda.attention.kernels import SAMPLES, Call, Outputs, Pixels, backward_heads, forward_heads
from numdcn._cuda.attention.points import ENTRIES, FORMS, PLACES, Entries, Entry, Points, Table, write_table
from numdcn._cuda.coordinates import address_of
from numdcn._cuda.lanes import WARP
from numdcn._cuda.memory import vector_length
from numdcn._cuda.workspace import Workspace, scalar, stored, summed

NOTHING = Pixels(0, (0, 0, 0))
MOST = 2**31 - 2**20  # what is counted in 32 bits


@replay.forward
def forward(p: Attention, arrays: AttentionArrays, y: DeviceArray, options: Options) -> None:
    """Fill y."""
    with Workspace(y) as work:
        value = _with_adjacent_channels(work, arrays.value)
        wide = _in_vectors(value, p.channels) and _in_vectors(y, p.channels)
        call = _call(work, p, arrays._replace(value=value), y, wide)
        blocks = -(-call.heads // (jit.THREADS // call.lanes)) * -(-p.channels // (call.lanes * _elements(value, wide)))
        work.launch(forward_heads(stored(value.dtype), wide), call, blocks)


@replay.backward
def backward(
    p: Attention, grad_y: DeviceArray, arrays: AttentionArrays, grads: AttentionArrays, options: Options
) -> None:
    """Fill the gradients in `grads`."""
    with Workspace(grad_y) as work:
        if grads.value is None:
            _backward(work, p, grad_y, arrays, grads, options)
        else:
            with _summed(work, grads.value) as total:
                _backward(work, p, grad_y, arrays, grads._replace(value=total), options)


def _backward(
    work: Workspace,
    p: Attention,
    grad_y: DeviceArray,
    arrays: AttentionArrays,
    grads: AttentionArrays,
    options: Options,
) -> None:
    """The same; the gradient of value is added to, in its type of sums."""
    with_sums = grads.points is not None or grads.weights is not None
    adds = grads.value is not None and not options.deterministic
    value = arrays.value
    if with_sums:  # else only its sizes are used
        value = _with_adjacent_channels(work, value)
    wide = _in_vectors(value, p.channels) and _in_vectors(grad_y, p.channels)
    vectors = wide and adds and work.vectors(value.dtype) and _in_vectors(grads.value, p.channels)
    if adds and not vectors:
        wide = False  # so that the adds of a warp are adjacent
    call = _call(work, p, arrays._replace(value=value), grad_y, wide)
    if with_sums or adds:
        filled = call._replace(grad_value=_pixels(grads.value) if adds else NOTHING)
        if grads.points is not None:
            filled = filled._replace(grad_points=address_of(grads.points), grad_points_strides=grads.points.strides)
        if grads.weights is not None:
            filled = filled._replace(grad_weights=address_of(grads.weights), grad_weights_strides=grads.weights.strides)
        blocks = -(-call.heads // (jit.THREADS // call.lanes))
        work.launch(backward_heads(stored(value.dtype), wide, vectors), filled, blocks)
    if grads.value is not None and options.deterministic:
        first = 0
        for level in p.levels:
            _add_in_order(work, p, level, first, call, grads.value, stored(value.dtype))
            first += level.points


def _add_in_order(
    work: Workspace, p: Attention, level: Level, first: int, call: Call, total: DeviceArray, dtype: Any
) -> None:
    """Add the gradients of a level's samples, whose points start at `first`."""
    lanes, pixels = _lanes(p.channels), level.height * level.width
    across = -(-p.channels // lanes)
    enough = 8 * work.multiprocessors * (jit.THREADS // lanes)
    bands = max(1, min(pixels, enough // max(p.batch * p.heads * across, 1)))
    order = InOrder(
        call.points, call.y, _pixels(total), p.batch, p.channels, lanes, first, level.points, level.start, pixels, bands
    )
    work.launch(add_in_order(dtype), order, p.batch * p.heads * across * -(-bands // (jit.THREADS // lanes)))


def _with_adjacent_channels(work: Workspace, array: DeviceArray) -> DeviceArray:
    """The array, or a copy if its channels are not adjacent."""
    return array if array.strides[3] == 1 or array.shape[3] == 1 else work.contiguous(array)


def _summed(work: Workspace, grad: DeviceArray) -> Output[DeviceArray]:
    """Zeros in which a gradient is accumulated: the array itself if it has the type of sums and adjacent channels."""
    if grad.dtype == summed(grad.dtype) and (grad.strides[3] == 1 or grad.shape[3] == 1):
        work.clear(grad)
        return Output(grad, None, work.copy)
    return Output(grad, work.zeros(grad.shape, summed(grad.dtype)), work.copy)


def _in_vectors(array: DeviceArray, channels: int) -> bool:
    """Whether the channels of every head and pixel are whole vectors of 16 bytes."""
    size = array.dtype.itemsize
    length = vector_length(stored(array.dtype))
    return (
        array.strides[3] == 1
        and channels % length == 0
        and not array.address % 16
        and not any(step * size % 16 for step, n in zip(array.strides[:3], array.shape, strict=False) if n > 1)
    )


def _elements(value: DeviceArray, wide: bool) -> int:
    """Channels per thread."""
    return vector_length(stored(value.dtype)) if wide else 1


def _lanes(units: int) -> int:
    """Threads for so many units, each a channel or a vector of them."""
    return min(WARP, 1 << (units - 1).bit_length())


def _pixels(array: DeviceArray) -> Pixels:
    return Pixels(array.address, array.strides[:3])  # type: ignore[arg-type]


def _call(work: Workspace, p: Attention, arrays: AttentionArrays, y: DeviceArray, wide: bool) -> Call:
    """The parameters, except for gradients."""
    lanes = _lanes(-(-p.channels // _elements(arrays.value, wide)))
    most = SAMPLES // (jit.THREADS // lanes)
    portion = -(-p.points // -(-p.points // most))
    return Call(
        _points(work, p, arrays), _pixels(arrays.value), Outputs(y.address, y.strides), NOTHING, 0, 0, (0,) * 5, (0,) * 4,  # type: ignore[arg-type]
        p.batch * p.queries * p.heads, p.channels, lanes, portion, min(most, portion | 1),
    )  # fmt: skip


def _points(work: Workspace, p: Attention, arrays: AttentionArrays) -> Points:
    grid, number = p.grid, scalar(arrays.value.dtype)
    for what, count in _counts(p).items():
        if count >= MOST:
            raise ValueError(f"there are {count} {what}, expected fewer than 2**31 - 2**20 on a GPU")
    table = _table(work, p, arrays.value.dtype)
    return Points(
        address_of(arrays.points), address_of(arrays.weights), arrays.points.strides, arrays.weights.strides, table,
        p.queries, p.heads, p.points, grid.columns, grid.stride, _numbers(number, grid.origin),  # type: ignore[arg-type]
    )  # fmt: skip


def _numbers(number: Any, pair: tuple[float, float]) -> Any:
    """A pair in the compute type."""
    return number(pair[0]), number(pair[1])


def _counts(p: Attention) -> dict[str, int]:
    """What kernels count in 32 bits."""
    return {
        "pixels of all levels": p.pixels,
        "heads of all queries": p.batch * p.queries * p.heads,
        "points of a head of all queries": p.queries * p.points,
    }


def _table(work: Workspace, p: Attention, dtype: Any) -> Table:
    """The table of points, in memory."""
    places, forms = work.empty((p.points, PLACES), DTYPES["int64"]), work.empty((p.points, FORMS), summed(dtype))
    table, kernel = Table(places.address, forms.address), write_table(jit.compute_type(stored(dtype)))
    for first, count, entries in _entries(p.levels, p.grid.taps, p.grid.scales, dtype):
        work.launch(kernel, Entries(table, first, count, entries), 1, 1)
    return table


@functools.lru_cache(256)
def _entries(
    levels: tuple[Level, ...], taps: tuple[Any, ...], scales: tuple[Any, ...], dtype: Any
) -> list[tuple[int, int, Any]]:
    """(first, count, entries) of each launch that writes the table. Cached, as this costs more than a launch."""
    number = scalar(dtype)
    owners = [level for level in levels for _ in range(level.points)]
    entries = [
        Entry(level.height, level.width, level.start, _numbers(number, tap), _numbers(number, scale))
        for level, tap, scale in zip(owners, taps, scales, strict=True)
    ]
    parts = [entries[first : first + ENTRIES] for first in range(0, len(entries), ENTRIES)]
    padded = [tuple((part + entries[:1] * ENTRIES)[:ENTRIES]) for part in parts]
    return [(n * ENTRIES, len(part), padded[n]) for n, part in enumerate(parts)]
