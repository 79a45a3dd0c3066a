"""Weights on a GPU in the layouts of the convolution kernels. Prepared ones are kept in each layout they were wanted in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numdcn._host.device_array import DeviceArray
from numdcn._host.scratch_cuda import stream_key
from numdcn._host.weights import PreparedWeights
from numdcn._host.work_cuda import Work, stored
from numdcn._kernels.convolution import Convolution
from numdcn._kernels.memory_cuda import vector_length
from numdcn._kernels.weights_cuda import Pack, depth_of, pack_weights

Weights = DeviceArray | PreparedWeights


def _packed(
    work: Work,
    w: Weights,
    layout: tuple[Any, ...],
    shape: tuple[int, ...],
    fill: Callable[[DeviceArray, DeviceArray], Any],
) -> int:
    """The address of memory of a shape that fill(weights, memory) filled: now, or, of prepared weights, once on a stream.
    `layout`: what tells it from other layouts."""
    if not isinstance(w, PreparedWeights):
        made = work.empty(shape, w.dtype)
        fill(w, made)
        return made.address
    key = (*layout, *stream_key(work.stream))
    if key not in w.layouts:
        made = work.framework.empty(shape, w.dtype, work.number, work.stream)
        fill(w.array, made)
        w.layouts[key] = made
    return w.layouts[key].address


def _sizes(p: Convolution) -> tuple[int, int]:
    """Outputs and channels of a group."""
    return p.out_channels // p.groups, p.in_channels // p.groups


def by_channel(work: Work, p: Convolution, w: Weights) -> int:
    """The weights as (groups, taps, C/groups, C_out/groups)."""
    outs, ins = _sizes(p)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        work.permuted(w, (p.groups, outs, ins, p.taps), (0, 3, 2, 1), made)

    return _packed(work, w, ("by channel",), (p.groups, p.taps, ins, outs), fill)


def by_output(work: Work, p: Convolution, w: Weights) -> int:
    """The weights as (groups, taps, C_out/groups, C/groups)."""
    outs, ins = _sizes(p)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        work.permuted(w, (p.groups, outs, ins, p.taps), (0, 3, 1, 2), made)

    return _packed(work, w, ("by output",), (p.groups, p.taps, outs, ins), fill)


def in_parts(work: Work, p: Convolution, w: Weights, more: int) -> tuple[int, int, int]:
    """For the forward on tensor cores: in parts of groups that share their offsets, (parts, taps, outputs, depth), `more` rows
    behind the last. The address, the depth, and the channels of a part."""
    (outs, ins), kind = _sizes(p), stored(w.dtype)
    width = math.gcd(ins, p.in_channels // max(p.offset_groups, 1))
    depth, parts = depth_of(width, kind, width % vector_length(kind) == 0), p.in_channels // width

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        pack = Pack(
            work.contiguous(w).address, made.address, parts, ins // width, p.taps, outs, depth, width, outs * ins * p.taps,
            width * p.taps, ins * p.taps, p.taps, width,
        )  # fmt: skip
        work.spread(pack_weights(kind), pack, parts * p.taps * outs * depth)

    shape = parts * p.taps * outs + more, depth
    return _packed(work, w, ("in parts", width, more), shape, fill), depth, width


def by_depth(work: Work, p: Convolution, w: Weights, depth: int) -> int:
    """For the gradients of columns on tensor cores: along the outputs, (groups, taps, C/groups, depth)."""
    (outs, ins), kind = _sizes(p), stored(w.dtype)

    def fill(w: DeviceArray, made: DeviceArray) -> None:
        pack = Pack(
            work.contiguous(w).address, made.address, p.groups, 1, p.taps, ins, depth, outs, outs * ins * p.taps, 0, p.taps,
            ins * p.taps, 0,
        )  # fmt: skip
        work.spread(pack_weights(kind), pack, made.size)

    return _packed(work, w, ("by depth",), (p.groups, p.taps, ins, depth), fill)
