"""Weights in the layouts of the kernels: transposed, or packed for tensor cores.

Packed weights are rows of channels (`in_segments`) or outputs (`by_depth`), padded with zeros, that are copied to
shared memory 16 bytes at a time. A row of channels starts at its first channel's position within a 16-byte vector of
the images: a few zeros come first if that is in the middle of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._call.device_array import DeviceArray
from numdcn._call.device_scratch import stream_key
from numdcn._call.driver import capturing
from numdcn._call.prepared import PreparedWeights
from numdcn._cuda import replay
from numdcn._cuda.jit import BF16, F16, F32, cuda, kernels
from numdcn._cuda.memory import at, put, vector_length, view
from numdcn._cuda.mma import from_bits, per_word, word
from numdcn._cuda.workspace import Workspace, stored

DEPTH = 16  # rows have a multiple of this many words


class Pack(NamedTuple):
    """Parameters of `pack_weights`. Segments are numbered across all groups."""

    source: int  # w, (C_out, C/groups, taps)
    target: int  # (segments, taps, rows, depth)
    segments: int
    segments_of_group: int
    taps: int
    rows: int
    depth: int
    width: int  # channels per row
    group_step: int  # from group to group in w
    segment_step: int  # from segment to segment within a group
    row_step: int
    step: int  # from channel to channel
    first: int  # position of a segment's channels in the images, per preceding segment: 0, or the width


@kernels(Pack, lambda: [(dtype,) for dtype in (F32, F16, BF16)])
def pack_weights(T):
    """Pack weights; float32 is rounded to tf32."""
    V, EACH = vector_length(T), per_word(T)

    def run(c):
        source, target = view(c.source, T), view(c.target, T)
        for task in range(cuda.grid(1), c.segments * c.taps * c.rows * c.depth, cuda.gridsize(1)):
            rest, place = task // c.depth, task % c.depth
            row, tap, segment = rest % c.rows, rest // c.rows % c.taps, rest // (c.rows * c.taps)
            channel = place - segment * c.first % V
            weight = T(0)
            if channel >= 0 and channel < c.width:
                start = segment // c.segments_of_group * c.group_step + segment % c.segments_of_group * c.segment_step
                weight = at(source, start + row * c.row_step + channel * c.step + tap)
                if EACH == 1:
                    weight = from_bits(word(weight, np.float32(0), F32))
            put(target, task, weight)

    return run


def depth_of(width: int, dtype: object, aligned: bool) -> int:
    """The elements of a packed row."""
    whole = DEPTH * per_word(dtype)
    return -(-(width + (0 if aligned else vector_length(dtype) - 1)) // whole) * whole


Weights = DeviceArray | PreparedWeights


def _packed(
    work: Workspace,
    w: Weights,
    layout: tuple[Any, ...],
    shape: tuple[int, ...],
    fill: Callable[[DeviceArray, DeviceArray], Any],
) -> int:
    """The address of memory of this shape, filled by fill(weights, memory): anew, or for prepared weights once per
    stream. `layout` distinguishes it from other layouts."""
    made = _array(work, w, layout, shape, fill)
    return work.layout(layout, made) if isinstance(w, PreparedWeights) else made.address


def _array(
    work: Workspace,
    w: Weights,
    layout: tuple[Any, ...],
    shape: tuple[int, ...],
    fill: Callable[[DeviceArray, DeviceArray], Any],
) -> DeviceArray:
    """The same memory as an array. While a CUDA graph is captured nothing is filled yet, so nothing is remembered: the graph
    fills memory of its own, each time it runs."""
    if not isinstance(w, PreparedWeights):
        return _filled(work, w, shape, fill)
    key = (*layout, *stream_key(work.stream))
    if key not in w.layouts:
        replay.only_now()
        if capturing(work.device, work.stream):
            return _filled(work, w.array, shape, fill)
        made = work.framework.empty(shape, w.dtype, work.device, work.stream)
        fill(w.array, made)
        w.layouts[key] = made
    found: DeviceArray = w.layouts[key]
    return found


def _filled(
    work: Workspace, w: DeviceArray, shape: tuple[int, ...], fill: Callable[[DeviceArray, DeviceArray], Any]
) -> DeviceArray:
    """Memory of the call, filled."""
    made = work.empty(shape, w.dtype)
    fill(w, made)
    return made


def _sizes(p: Convolution) -> tuple[int, int]:
    """Outputs and channels per group."""
    return p.out_channels // p.groups, p.in_channels // p.groups


def _permuted(work: Workspace, p: Convolution, w: Weights, axes: tuple[int, ...]) -> int:
    """The weights (groups, C_out/groups, C/groups, taps) with their axes in another order."""
    sizes = (p.groups, *_sizes(p), p.taps)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        work.permuted(w, sizes, axes, made)

    return _packed(work, w, ("permuted", axes), tuple(sizes[a] for a in axes), fill)


def by_channel(work: Workspace, p: Convolution, w: Weights) -> int:
    """The weights as (groups, taps, C/groups, C_out/groups)."""
    return _permuted(work, p, w, (0, 3, 2, 1))


def by_output(work: Workspace, p: Convolution, w: Weights) -> int:
    """The weights as (groups, taps, C_out/groups, C/groups)."""
    return _permuted(work, p, w, (0, 3, 1, 2))


def by_tap(work: Workspace, p: Convolution, w: Weights) -> int:
    """The weights as (taps, C_out/groups, C)."""
    return _permuted(work, p, w, (3, 1, 0, 2))


def in_place(work: Workspace, w: Weights) -> int:
    """The weights as the caller has them, (C_out, C/groups, taps)."""
    return work.contiguous(w.array if isinstance(w, PreparedWeights) else w).address


def in_segments(work: Workspace, p: Convolution, w: Weights, more: int, whole: bool) -> tuple[int, int, int]:
    """For the forward on tensor cores: in segments of groups, (segments, taps, outputs, depth), with `more` rows after
    the last. A segment is a group if `whole`; otherwise its channels share their offsets. Returns the address, the depth,
    and the channels per segment."""
    (outs, ins), dtype = _sizes(p), stored(w.dtype)
    width = ins if whole else math.gcd(ins, p.in_channels // max(p.offset_groups, 1))
    depth, segments = depth_of(width, dtype, width % vector_length(dtype) == 0), p.in_channels // width

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        call = Pack(
            work.contiguous(w).address, made.address, segments, ins // width, p.taps, outs, depth, width, outs * ins * p.taps,
            width * p.taps, ins * p.taps, p.taps, width,
        )  # fmt: skip
        work.spread(pack_weights(dtype), call, segments * p.taps * outs * depth)

    shape = segments * p.taps * outs + more, depth
    return _packed(work, w, ("in segments", width, more), shape, fill), depth, width


def by_depth(work: Workspace, p: Convolution, w: Weights, depth: int) -> int:
    """For the gradients of columns on tensor cores: along the outputs, (groups, taps, C/groups, depth)."""
    (outs, ins), dtype = _sizes(p), stored(w.dtype)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        call = Pack(
            work.contiguous(w).address, made.address, p.groups, 1, p.taps, ins, depth, outs, outs * ins * p.taps, 0, p.taps,
            ins * p.taps, 0,
        )  # fmt: skip
        work.spread(pack_weights(dtype), call, made.size)

    return _packed(work, w, ("by depth",), (p.groups, p.taps, ins, depth), fill)


def in_rows(work: Workspace, p: Convolution, w: Weights, depth: int, tf32: bool) -> DeviceArray:
    """For the product of a framework: (groups, C_out/groups, taps, depth), zeros after the channels of a group; float32
    is rounded to tf32 if asked for."""
    (outs, ins), dtype = _sizes(p), stored(w.dtype)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        w = work.contiguous(w)
        if dtype != F32 or tf32:
            call = Pack(
                w.address, made.address, p.out_channels, 1, p.taps, 1, depth, ins, ins * p.taps, 0, 0, p.taps, 0
            )  # fmt: skip
            work.spread(pack_weights(dtype), call, made.size)
            return
        if depth > ins:
            work.clear(made)
        source = w.view((p.out_channels, p.taps, ins), (ins * p.taps, 1, p.taps))
        work.copy(source, made.view(source.shape, (p.taps * depth, depth, 1)))

    return _array(work, w, ("in rows", depth, tf32), (p.groups, outs, p.taps, depth), fill)
