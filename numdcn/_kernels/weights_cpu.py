"""Weights in the order in which the matrix products read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._kernels.gemm_cpu import panel_width
from numdcn._kernels.jit_cpu import kernel
from numdcn._kernels.simd_cpu import at, load_scalar, next_task, pointer, store


class Packing(NamedTuple):
    """The layout of packed weights: (groups, panels, taps * channels, panel), zero where a panel exceeds the outputs.

    A depthwise convolution (one channel and one output a group) is (1, 1, taps, channels) instead.
    """

    groups: int
    outputs: int  # of a group
    channels: int  # of a group
    taps: int
    panel: int
    panels: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.groups * self.panels * self.taps * self.channels * self.panel


class Blocks(NamedTuple):
    """Blocks of input channels, for a kernel."""

    address: int  # of the first channel of each block, and of the end, as int64
    count: int
    depthwise: int


def is_depthwise(groups: int, shape: tuple[int, ...]) -> bool:
    """Whether each channel makes one output by itself."""
    return shape[1] == 1 and shape[0] == groups and groups > 1


def packing(shape: tuple[int, ...], groups: int, dtype: np.dtype) -> Packing:
    """How weights of a shape (C_out, C/groups, kh, kw) are packed."""
    outputs, channels, taps = shape[0] // groups, shape[1], shape[2] * shape[3]
    if is_depthwise(groups, shape):
        return Packing(1, groups, 1, taps, groups, 1)
    panel = panel_width(outputs, dtype)
    return Packing(groups, outputs, channels, taps, panel, -(-outputs // panel))


@kernel
def pack_weights(one, how, kernel_size, w, strides, packed, counter):  # type: ignore[no-untyped-def]
    """packed[group, panel, tap * channels + channel, output] from w (outputs, channels, kh, kw). A task is a panel."""
    source, target = pointer(w, one), pointer(packed, one)
    rows = how.taps * how.channels
    while True:
        task = next_task(counter)
        if task >= how.groups * how.panels:
            return
        group, first = task // how.panels, task % how.panels * how.panel
        for c in range(how.channels):
            for tap in range(how.taps):
                spot = tap // kernel_size[1] * strides[2] + tap % kernel_size[1] * strides[3]
                row = at(target, (task * rows + tap * how.channels + c) * how.panel)
                column = at(source, (group * how.outputs + first) * strides[0] + c * strides[1] + spot)
                outputs = min(how.panel, how.outputs - first)
                for o in range(outputs):
                    store(row, o, load_scalar(column, o * strides[0]))
                for o in range(outputs, how.panel):
                    store(row, o, one - one)


@kernel
def pack_blocks(one, how, bounds, block, kernel_size, w, strides, packed, counter):  # type: ignore[no-untyped-def]
    """packed[b, tap, output, channel of block b] from w, with rows of `block`, zero past the block. A task is a block.

    bounds: address of the first channel of each block, and of the end. A depthwise w makes packed[b, tap, channel].
    """
    source, target, limits = pointer(w, one), pointer(packed, one), pointer(bounds.address, np.int64(0))
    depthwise = bounds.depthwise
    outputs = 1 if depthwise else how.outputs
    while True:
        task = next_task(counter)
        if task >= bounds.count:
            return
        first, count = load_scalar(limits, task), load_scalar(limits, task + 1) - load_scalar(limits, task)
        for o in range(outputs):
            for tap in range(how.taps):
                row = at(target, ((task * how.taps + tap) * outputs + o) * block)
                spot = tap // kernel_size[1] * strides[2] + tap % kernel_size[1] * strides[3]
                if depthwise:
                    column, stride = at(source, first * strides[0] + spot), strides[0]
                else:
                    output = first // how.channels * how.outputs + o
                    column, stride = at(source, output * strides[0] + first % how.channels * strides[1] + spot), strides[1]
                for c in range(count):
                    store(row, c, load_scalar(column, c * stride))
                for c in range(count, block):
                    store(row, c, one - one)


def pack(w: np.ndarray, how: Packing, address: int, counter: int) -> None:
    """Run `pack_weights` on an addressable array."""
    strides: Any = tuple(s // w.itemsize for s in w.strides)
    pack_weights(w.dtype.type(1), how, w.shape[2:], w.ctypes.data, strides, address, counter)
